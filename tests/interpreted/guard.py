"""Tensors beside unreadable pages: an access out of bounds ends the process, which is a child of pytest."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PAGE = mmap.PAGESIZE
PROT_NONE = 0
EMPTY = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
ZEROS = (torch.zeros, torch.zeros_like, torch.Tensor.new_zeros)
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(x: Tensor, side: str) -> Tensor:
    """A copy of ``x`` that begins right after ("before") or ends right before ("after") a page that nobody may touch.

    The pages are never given back: use it in a process that ends.
    """
    if x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    body = -(-size // PAGE) * PAGE
    region = mmap.mmap(-1, body + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for fence in (start, start + PAGE + body):
        if libc.mprotect(fence, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if side == "before" else PAGE + body - size
    flat = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset)
    return flat.view(x.shape).copy_(x)


class GuardedOutputs(TorchFunctionMode):
    """Tensors made inside lie against an unreadable page; empty ones hold NaN."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in EMPTY + ZEROS or out.numel() == 0:
            return out
        self.made += 1
        with torch._C.DisableTorchFunction():
            if func in EMPTY and out.is_floating_point():
                out.fill_(torch.nan)
            return guarded(out, self.side)


def exit_code(function: Callable[..., None], *args: Any) -> int:
    """Run the function in a child; 0, 1 for an exception, or minus the signal that ended the child."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(function, args))
    child.start()
    child.join(timeout=60)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode if child.exitcode is not None else 1


def _run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)
