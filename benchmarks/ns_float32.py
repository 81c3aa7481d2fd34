"""What oneDNN's float32 products gain, where they are float32 products at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distmuon.benchmarks.timing import Clock, interleave, ratio
from distmuon.kernels import cpu_float32

SIZE = 1024


def probe(clock: Clock, rounds: int) -> dict[str, Any] | None:
    """Measure error and gain of the switch by itself, and ask the library what it made of it.

    Args:
        clock: how to time.
        rounds: turns of both.

    Returns:
        A record; None where this torch has no switch.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return None
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))

    def switched(x: Tensor) -> Tensor:
        with cpu_float32.switched():
            return x @ b

    exact = a.double() @ b.double()
    relative = float((switched(a).double() - exact).norm() / exact.norm())
    calls: dict[str, Callable[[Tensor], object]] = {"torch": lambda x: x @ b, "switched": switched}
    seconds = interleave(calls, lambda _: a, rounds, clock)
    return {
        "error": relative,
        "legal": cpu_float32.EXACT,
        "accepted": cpu_float32.is_exact(),
        "gain": asdict(ratio(seconds["torch"], seconds["switched"])),
    }
