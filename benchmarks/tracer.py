"""Counts collectives where they enter ``torch.distributed``, whoever issues them.

Independent of the optimizer's own tally. Must be installed before DeepSpeed is imported, which keeps references.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Collective -> (its argument with the full payload, bytes sent per payload byte and (d - 1) / d in the ring model).
_RING = {
    "all_reduce": ("tensor", 2),
    "reduce": ("tensor", 1),
    "broadcast": ("tensor", 1),
    "all_gather": ("tensor_list", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "all_gather_single": ("output", 1),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input", 1),
    "reduce_scatter_single": ("input", 1),
    "all_to_all_single": ("input", 1),
    "all_to_all": ("input_tensor_list", 1),
}


@dataclass
class Tracer:
    """Calls and ring-model bytes per collective since the last reset."""

    calls: dict[str, int] = field(default_factory=dict)
    wire: dict[str, float] = field(default_factory=dict)
    _depth: int = 0

    def install(self) -> None:
        """Wrap the functions of ``torch.distributed``."""
        for name, (argument, factor) in _RING.items():
            function = getattr(dist, name, None)
            if function is not None:
                wrapped = self._wrap(name, function, argument, factor)
                setattr(dist, name, wrapped)
                setattr(dist.distributed_c10d, name, wrapped)

    def reset(self) -> None:
        """Start counting from zero."""
        self.calls.clear()
        self.wire.clear()

    def _wrap(self, name: str, function: Callable[..., Any], argument: str, factor: int) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            # One collective may be written in terms of another; only the outermost call is counted.
            if self._depth == 0:
                given = signature.bind(*args, **kwargs).arguments
                payload = given.get(argument, given.get(f"{argument}_tensor"))
                size = dist.get_world_size(given.get("group"))
                if size > 1:
                    self.calls[name] = self.calls.get(name, 0) + 1
                    self.wire[name] = self.wire.get(name, 0.0) + factor * _bytes(payload) * (size - 1) / size
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return traced


def _bytes(payload: Any) -> int:
    if isinstance(payload, Tensor):
        return payload.nbytes
    return sum(_bytes(part) for part in payload)
