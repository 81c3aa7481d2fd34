"""Every collective that a process issues, seen below torch.distributed's Python functions."""

# mypy: disable-error-code="no-untyped-call, attr-defined"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon.comm import Group

_NAMES = ("allreduce", "reduce_scatter", "allgather", "alltoall", "broadcast", "reduce", "barrier")


@dataclass(frozen=True)
class Call:
    """One collective."""

    phase: str
    name: str
    world: int
    numel: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of its largest tensor."""
        return self.numel * int(getattr(torch, self.dtype).itemsize)

    @property
    def wire(self) -> float:
        """Bytes that this rank sends in the ring model."""
        once = self.bytes * (self.world - 1) / self.world
        return 2 * once if self.name == "allreduce" else once


class Recorder(TorchDispatchMode):
    """Records the collectives of more than one rank; ``phase`` says where."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside."""
        self._phase = name
        try:
            yield
        finally:
            self._phase = ""

    @contextmanager
    def families(self) -> Iterator[None]:
        """Name DistMuon's own calls by what they do: on gloo they are point-to-point messages, one to each rank."""
        with pytest.MonkeyPatch.context() as patch:
            for method, family in (("reduce_scatter", "reduce_scatter"), ("all_gather", "allgather")):
                patch.setattr(Group, method, self._named(getattr(Group, method), family))
            yield

    def _named(self, issue: Any, family: str) -> Any:
        def named(group: Any, full: Tensor, lengths: Any, *rest: Any) -> Any:
            before, self.calls = self.calls, []
            pending = issue(group, full, lengths, *rest)
            sent = sum(call.numel for call in self.calls if call.name == "send")
            assert {call.name for call in self.calls} <= {"send", "recv_"}
            self.calls = before
            if group.size > 1:
                own = lengths[group.rank]
                assert sent == (full.numel() - own if family == "reduce_scatter" else own * (group.size - 1))
                dtype = str(full.dtype).removeprefix("torch.")
                self.calls.append(Call(self._phase, family, group.size, full.numel(), dtype))
            return pending

        return named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._opname, [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _record(self, op: str, args: list[Any]) -> None:
        tensors: list[Tensor] = []
        world = 1
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif isinstance(arg, list):
                tensors += [t for part in arg for t in (part if isinstance(part, list) else [part])]
            elif isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                world = dist.ProcessGroup.unbox(arg).size()
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        if world > 1 and tensors:
            largest = max(tensors, key=lambda t: t.numel())
            name = next((name for name in _NAMES if op.strip("_").startswith(name)), op)
            self.calls.append(
                Call(self._phase, name, world, largest.numel(), str(largest.dtype).removeprefix("torch."))
            )

    def select(self, *names: str, phase: str | None = None) -> list[Call]:
        """Calls of these collectives, in one phase or all."""
        return [c for c in self.calls if c.name in names and phase in (None, c.phase)]
