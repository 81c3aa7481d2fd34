"""Counts collectives where they enter torch's communication library, whoever issues them.

Independent of the optimizer's own tally. A dispatch mode sees what Python calls as well as what the reducer of
DistributedDataParallel launches from C++.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes up to which a collective carries norms, flags or counts.
SMALL = 1024.0
# Operator -> (its argument with the full payload, bytes sent per payload byte and (d - 1) / d in the ring model).
_RING = {
    "allreduce_": ("tensors", 2),
    "allreduce_coalesced_": ("tensors", 2),
    "reduce_": ("tensors", 1),
    "broadcast_": ("tensors", 1),
    "allgather_": ("output_tensors", 1),
    "allgather_coalesced_": ("output_lists", 1),
    "allgather_into_tensor_coalesced_": ("outputs", 1),
    "_allgather_base_": ("output_tensor", 1),
    "reduce_scatter_": ("input_tensors", 1),
    "reduce_scatter_tensor_coalesced_": ("inputs", 1),
    "_reduce_scatter_base_": ("input_tensor", 1),
    "alltoall_": ("input_tensors", 1),
    "alltoall_base_": ("input", 1),
    "gather_": ("input_tensors", 1),
    "scatter_": ("output_tensors", 1),
}


@dataclass
class Tally:
    """Calls of each collective and the bytes that this rank sends for them in the ring model."""

    calls: dict[str, int] = field(default_factory=dict)
    wire: dict[str, float] = field(default_factory=dict)
    large_calls: dict[str, int] = field(default_factory=dict)
    """Those of more than a norm or a flag."""

    def add(self, name: str, wire: float) -> None:
        """Count one call.

        Args:
            name: of the collective.
            wire: bytes that this rank sends.
        """
        self.calls[name] = self.calls.get(name, 0) + 1
        self.wire[name] = self.wire.get(name, 0.0) + wire
        if wire > SMALL:
            self.large_calls[name] = self.large_calls.get(name, 0) + 1

    def total_wire(self) -> float:
        """All bytes sent."""
        return sum(self.wire.values())


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tallies the collectives that are issued while it is entered; groups of one rank do not count.

    Attributes:
        tally: what was issued so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self._count(func.overloadpacket.__name__, given | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, given: dict[str, Any]) -> None:
        if operator == "barrier" or operator.startswith("recv"):
            return
        size = dist.ProcessGroup.unbox(given["process_group"]).size()
        if size == 1:
            return
        name = operator.strip("_")
        if operator == "send":
            self.tally.add(name, _bytes(given["tensors"]))
        elif operator == "alltoall_base_" and given["input_split_sizes"]:
            rank = dist.ProcessGroup.unbox(given["process_group"]).rank()
            counts, payload = given["input_split_sizes"], given["input"]
            rows = sum(count for peer, count in enumerate(counts) if peer != rank)
            self.tally.add(name, rows * payload[:1].numel() * payload.element_size())
        else:
            # An operator that is not listed must not be taken for free.
            argument, factor = _RING[operator]
            self.tally.add(name, factor * _bytes(given[argument]) * (size - 1) / size)


def _bytes(payload: Any) -> int:
    if isinstance(payload, Tensor):
        return payload.nbytes
    return sum(_bytes(part) for part in payload)
