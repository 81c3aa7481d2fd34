"""Which matrix products run on a device."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from distmuon.kernels import tuning
from distmuon.kernels.cpu import CpuProducts
from distmuon.kernels.cpu_float32 import fast_float32
from distmuon.kernels.products import Products, TorchProducts

Choice = Literal["auto", "torch", "triton"]
# (momentum, grad, mu, nesterov, dtype) -> (input, partial norms), as ``reference.momentum_cast``.
MomentumCast = Callable[[Tensor, Tensor, float, bool, torch.dtype], tuple[Tensor, Tensor]]
VARIABLE = "DISTMUON_KERNELS"

log = logging.getLogger(__name__)


def products(device: torch.device, choice: Choice) -> Products:
    """Choose the matrix products for a device.

    Args:
        device: where the matrices are.
        choice: "torch" takes torch's own, "triton" the Triton kernels, "auto" what the environment variable
            ``DISTMUON_KERNELS`` says or else what is fastest: Triton on CUDA, row panels on a CPU.

    Returns:
        The products. Where "auto" finds no Triton kernels for a device, it says so once and takes torch's.

    Raises:
        ValueError: the variable has another value, or "triton" was asked for and cannot run.
    """
    found = _find(device, choice)
    if found == "triton":
        from distmuon.kernels.triton_products import TritonProducts

        return TritonProducts()
    return CpuProducts() if found == "cpu" else TorchProducts()


def fused_momentum(device: torch.device, choice: Choice) -> MomentumCast | None:
    """Choose the kernel that advances momentum.

    Args:
        device: where the momentum is.
        choice: as for ``products``.

    Returns:
        ``triton_ops.momentum_cast`` where Triton kernels run, None where separate operations are to do it.

    Raises:
        ValueError: as for ``products``.
    """
    if _find(device, choice) != "triton":
        return None
    from distmuon.kernels.triton_ops import momentum_cast

    return momentum_cast


def _find(device: torch.device, choice: Choice) -> Literal["cpu", "torch", "triton"]:
    asked = f'kernels = "{choice}"'
    if choice == "auto":
        choice = _from_environment()
        asked = f'{VARIABLE} = "{choice}"'
    if choice == "torch":
        return "torch"
    if choice == "auto" and device.type == "cpu":
        return "cpu"
    missing = _missing(device)
    if missing is None:
        return "triton"
    if choice == "triton":
        raise ValueError(f'{asked} cannot run on {device}: {missing}; use "auto" or "torch".')
    _say_once(device.type, missing)
    return "torch"


def _from_environment() -> Choice:
    asked = os.environ.get(VARIABLE, "auto")
    for legal in get_args(Choice):
        if asked == legal:
            return cast(Choice, legal)
    raise ValueError(f'{VARIABLE} = "{asked}" is not legal; use one of {", ".join(get_args(Choice))}.')


@functools.cache
def _missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    try:
        from triton import knobs
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return "Triton 3.4 or later is not installed"
    if device.type == "cpu":
        return None if knobs.runtime.interpret else "Triton runs on a CPU only in its interpreter, TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"there are none for {device.type} devices"
    name = tuning.device_name(device)
    try:
        tuning.architecture(name)
    except ValueError:
        return f"there are none for architecture {name}, but for 8.0 and higher, gfx942 and gfx950"
    return None


@functools.cache
def _say_once(kind: str, missing: str) -> None:
    log.warning("%s: torch computes Newton-Schulz on %s instead of the Triton kernels.", missing, kind)


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """How float32 products are computed meanwhile.

    Args:
        device: where.
        dtype: of the products.

    Returns:
        A context manager.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return fast_float32()
    return contextlib.nullcontext()
