"""Launchers of the Triton kernels; the functions of ``reference`` of the same names say what they compute.

Shapes: B matrices, M rows, N columns, K the side that a product sums over, T tiles. No launcher waits for the device,
except that the first launch of a shape on a GPU times the configurations that suit it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from distmuon.kernels import variants
from distmuon.kernels.launch import candidates, launch
from distmuon.kernels.reference import NORM_BLOCK
from distmuon.kernels.tuning import Config, Variant


def symmetric_product(
    a_BMK: Tensor,
    b_BMK: Tensor,
    c_BMM: Tensor | None,
    scalars: Tensor,
    *,
    variant: Variant | None = None,
    config: Config | None = None,
) -> Tensor:
    """Compute Y = alpha A B^T + beta C + gamma I, for operands that make Y symmetric.

    Args:
        a_BMK: [B, M, K] bfloat16, float16 or float32. Not written to.
        b_BMK: [B, M, K] in the same dtype. Not written to.
        c_BMM: [B, M, M] symmetric, in the same dtype; None leaves the term out. Not written to.
        scalars: float32 [3] or [B, 3] on the same device: alpha, beta, gamma.
        variant: through pointers or tensor descriptors; None takes what suits the device and the shape.
        config: tile sizes; None takes the fastest of those that suit the device and the shape.

    Returns:
        [B, M, M] in the same dtype, symmetric bit for bit, rounded once.

    Raises:
        ValueError: the tensors do not go together, or the device has no such kernel.
    """
    return _symmetric(a_BMK, b_BMK, c_BMM, scalars, variant, config, has_sums=False)[0]


def symmetric_product_norm(
    a_BMK: Tensor,
    b_BMK: Tensor,
    c_BMM: Tensor | None,
    scalars: Tensor,
    *,
    variant: Variant | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``symmetric_product`` and the squared Frobenius norm of each result before it is rounded.

    Args:
        a_BMK: as in ``symmetric_product``.
        b_BMK: as in ``symmetric_product``.
        c_BMM: as in ``symmetric_product``.
        scalars: as in ``symmetric_product``.
        variant: as in ``symmetric_product``.
        config: as in ``symmetric_product``.

    Returns:
        [B, M, M] results and [B] float32 sums of squares, the same in every run of one configuration.

    Raises:
        ValueError: as in ``symmetric_product``.
    """
    y_BMM, sums_BT = _symmetric(a_BMK, b_BMK, c_BMM, scalars, variant, config, has_sums=True)
    return y_BMM, sums_BT.sum(dim=1)


def _symmetric(
    a_BMK: Tensor,
    b_BMK: Tensor,
    c_BMM: Tensor | None,
    scalars: Tensor,
    variant: Variant | None,
    config: Config | None,
    *,
    has_sums: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the tiles' shares of its sum of squares: [B, T], or [B, 0] where they are not wanted."""
    batch, m, k = _shape("a_BMK", a_BMK)
    _check("b_BMK", b_BMK, a_BMK, (batch, m, k))
    y_BMM = a_BMK.new_empty((batch, m, m))
    if c_BMM is not None:
        _check("c_BMM", c_BMM, a_BMK, y_BMM.shape)
    scalars_B3 = _scalars(scalars, a_BMK, 3)
    if batch == 0:
        return y_BMM, scalars.new_empty((0, 0))
    tensors = {"a": a_BMK.contiguous(), "b": b_BMK.contiguous(), "y": y_BMM}
    if c_BMM is not None:
        tensors["c"] = c_BMM.contiguous()
    variant, configs = candidates("symmetric", tensors.values(), (m, k, batch), variant, config)
    smallest = min(each.block_m for each in configs)
    sums_BT = scalars.new_empty((batch, _triangle(m, smallest) if has_sums else 0))
    numbers = {"m": m, "k": k, "scalar_stride": scalars_B3.stride(0), "sum_stride": sums_BT.shape[1]}

    def grid(meta: Mapping[str, Any]) -> tuple[int, ...]:
        return (batch * _triangle(m, meta["BLOCK_M"]),)

    traits = (variant, a_BMK.dtype, c_BMM is not None, has_sums)
    specializations = [variants.symmetric(each, *traits) for each in configs]
    launch(specializations, grid, tensors | {"scalars": scalars_B3, "sums": sums_BT} | numbers)
    return y_BMM, sums_BT


def add_product(
    x_BMN: Tensor, p_BMM: Tensor, scalars: Tensor, *, variant: Variant | None = None, config: Config | None = None
) -> Tensor:
    """Compute Y = a X + P X.

    Args:
        x_BMN: [B, M, N] bfloat16, float16 or float32. Not written to.
        p_BMM: [B, M, M] in the same dtype. Not written to.
        scalars: float32 [1] or [B, 1] on the same device: a.
        variant: as in ``symmetric_product``.
        config: as in ``symmetric_product``.

    Returns:
        [B, M, N] in the same dtype, rounded once.

    Raises:
        ValueError: as in ``symmetric_product``.
    """
    batch, m, n = _shape("x_BMN", x_BMN)
    _check("p_BMM", p_BMM, x_BMN, (batch, m, m))
    scalars_B1 = _scalars(scalars, x_BMN, 1)
    y_BMN = x_BMN.new_empty((batch, m, n))
    if batch == 0:
        return y_BMN
    tensors = {"x": x_BMN.contiguous(), "p": p_BMM.contiguous(), "y": y_BMN}
    variant, configs = candidates("polynomial", tensors.values(), (m, n, batch), variant, config)
    numbers = {"m": m, "n": n, "scalar_stride": scalars_B1.stride(0)}

    def grid(meta: Mapping[str, Any]) -> tuple[int, ...]:
        return (batch * triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    specializations = [variants.add_product(each, variant, x_BMN.dtype) for each in configs]
    launch(specializations, grid, tensors | {"old": tensors["x"], "scalars": scalars_B1} | numbers)
    return y_BMN


def momentum_cast(
    momentum: Tensor, grad: Tensor, mu: float, nesterov: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Advance heavy-ball momentum, cast the Newton-Schulz input, and measure it block by block.

    Args:
        momentum: flat float32, contiguous, updated in place: m <- mu m + g.
        grad: flat float32 of the same length, contiguous. Not written to.
        mu: momentum coefficient in [0, 1).
        nesterov: return g + mu m instead of m.
        dtype: dtype of the input: bfloat16, float16 or float32.

    Returns:
        The input u with the bits of torch's separate operations, and for every block of ``NORM_BLOCK`` elements of it
        (float32 [blocks, 2]) the largest |u| and the sum of squares of u / 2^e, where 2^e is the largest power of two
        up to it.

    Raises:
        ValueError: the tensors do not go together, or the device has no such kernel.
    """
    for name, tensor in (("momentum", momentum), ("grad", grad)):
        _check(name, tensor, momentum, (momentum.numel(),))
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; it must be contiguous float32.")
    if dtype not in variants.TYPES:
        raise ValueError(f"dtype = {dtype} is not legal; use one of {', '.join(map(str, variants.TYPES))}.")
    blocks = triton.cdiv(momentum.numel(), NORM_BLOCK)
    u, partials = torch.empty_like(momentum, dtype=dtype), momentum.new_empty((blocks, 2))
    if blocks:
        arguments = {"momentum": momentum, "grad": grad, "u": u, "partials": partials}
        numbers = {"mu": float(mu), "length": momentum.numel()}
        launch([variants.momentum_cast(dtype, nesterov)], lambda meta: (blocks,), arguments | numbers)
    return u, partials


def _triangle(rows: int, block: int) -> int:
    """Tiles of the lower triangle."""
    tiles: int = triton.cdiv(rows, block)
    return tiles * (tiles + 1) // 2


def _shape(name: str, matrices: Tensor) -> tuple[int, int, int]:
    """The three sizes of a batch of matrices that a kernel can take."""
    if matrices.ndim != 3 or 0 in matrices.shape[1:] or matrices.dtype not in variants.TYPES:
        raise ValueError(
            f"{name} is {matrices.dtype} of shape {tuple(matrices.shape)}; it must be a batch of matrices, with rows "
            f"and columns, in one of {', '.join(map(str, variants.TYPES))}."
        )
    batch, rows, columns = matrices.shape
    return batch, rows, columns


def _check(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has a shape, and another's dtype and device."""
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; with the tensors before it, "
            f"it must be {like.dtype} of shape {tuple(shape)} on {like.device}."
        )


def _scalars(scalars: Tensor, like: Tensor, count: int) -> Tensor:
    """View scalars as [B, count]; its stride between matrices is 0 where they share theirs."""
    batch = like.shape[0]
    shapes = ((count,), (batch, count))
    if scalars.shape not in shapes or scalars.dtype != torch.float32 or scalars.device != like.device:
        raise ValueError(
            f"scalars is {scalars.dtype} of shape {tuple(scalars.shape)} on {scalars.device}; it must be float32 of "
            f"shape {shapes[0]} or {shapes[1]} on {like.device}."
        )
    return scalars.contiguous().expand(batch, count)
