"""Float32 products on CPUs where oneDNN computes them faster than BLAS, and as exactly."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

# True float32 products of this size differ from float64 by about 4e-7, those through bfloat16 units by 2e-3.
PROBE = 256
EXACT = 1e-6

# The switch belongs to the process: one thread at a time may set it and set it back.
_switch = threading.RLock()


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Let oneDNN compute float32 products of this block, if a probe finds that it rounds no operand on this CPU.

    Elsewhere, and on a torch without the switch, nothing changes. The setting is restored afterwards; it belongs to the
    process, so other threads see it meanwhile.
    """
    if not is_exact():
        yield
        return
    with switched():
        yield


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN's float32 products are float32 products, or would be computed in bfloat16.

    Returns:
        The finding for this CPU, which is made once.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, PROBE, PROBE, generator=generator, dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", enabled=False), switched():
        found = (a @ b).double()
    exact = a.double() @ b.double()
    return bool((found - exact).norm() <= EXACT * exact.norm())


@contextlib.contextmanager
def switched() -> Iterator[None]:
    """Let oneDNN compute float32 products of this block, exact or not; the setting is restored afterwards."""
    with _switch:
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
