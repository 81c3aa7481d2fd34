"""Long 1-D tensors in blocks that a CPU's cache holds, so that one operation leaves there what the next one reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A few blocks of this many float32 elements fit the second-level cache.
_CACHED = 2**15


def blocks(part: slice, device: torch.device) -> Iterator[slice]:
    """Divide a range of elements.

    Args:
        part: from its start to its stop.
        device: where the elements are.

    Yields:
        Consecutive ranges; one for anything but a CPU.
    """
    size = _CACHED if device.type == "cpu" else max(1, part.stop - part.start)
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))


def sum_of_squares(x: Tensor) -> Tensor:
    """Add up squares exactly enough that the order does not show in float32.

    Args:
        x: [n] of any floating dtype.

    Returns:
        float64 scalar.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in blocks(slice(0, x.numel()), x.device):
        wide = x[part].double()
        total += torch.dot(wide, wide)
    return total
