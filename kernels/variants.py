"""What the compiler must be told about each kernel: its function, the types of its arguments and its constants.

The launchers and ahead-of-time compilation read the same description, so that what is inspected is what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distmuon.kernels import momentum, polynomial, syrk
from distmuon.kernels.reference import NORM_BLOCK
from distmuon.kernels.tuning import Config, Variant

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, eq=False)
class Specialization:
    """One kernel with everything fixed that is fixed when it is compiled; each exists once and is compared by identity.

    Args:
        function: the jitted function.
        signature: type of each argument that is passed at run time, in Triton's notation.
        constants: the constexpr arguments, among them the optional tensors that are left out, as None.
        divisible: arguments that are multiples of 16 (pointers: aligned to 16 bytes) where the shape allows.
        boxes: shape of the boxes of each argument that is a tensor descriptor.
        options: compiler options.
    """

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    boxes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]


@functools.cache
def symmetric(config: Config, variant: Variant, dtype: torch.dtype, has_c: bool, has_sums: bool) -> Specialization:
    """Describe the symmetric product.

    Args:
        config: tile sizes; block_n is not used.
        variant: through pointers or through tensor descriptors.
        dtype: of A, B, C and Y.
        has_c: whether there is a C.
        has_sums: whether the sums of squares are wanted.

    Returns:
        The kernel's description.
    """
    m, k = config.block_m, config.block_k
    boxes: dict[str, tuple[int, ...]] = {"a": (1, m, k), "b": (1, m, k), "c": (1, m, m), "y": (1, m, m)}
    others = {"sums": "*fp32", "sum_stride": "i32", "scalars": "*fp32", "m": "i32", "k": "i32"}
    others["scalar_stride"] = "i32"
    constants: dict[str, Any] = {"BLOCK_M": m, "BLOCK_K": k, "GROUP": config.group}
    absent = {name: None for name, present in (("c", has_c), ("sums", has_sums)) if not present}
    function = syrk.symmetric_pointer if variant == "pointer" else syrk.symmetric_descriptor
    return _describe(function, boxes, others, constants | absent, dtype, config)


@functools.cache
def add_product(config: Config, variant: Variant, dtype: torch.dtype) -> Specialization:
    """Describe the product aX + PX.

    Args:
        config: tile sizes.
        variant: through pointers or through tensor descriptors.
        dtype: of X, P and Y.

    Returns:
        The kernel's description.
    """
    m, n, k = config.block_m, config.block_n, config.block_k
    boxes: dict[str, tuple[int, ...]] = {"x": (1, k, n), "p": (1, m, k), "old": (1, m, n), "y": (1, m, n)}
    others = {"scalars": "*fp32", "m": "i32", "n": "i32", "scalar_stride": "i32"}
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": config.group}
    function = polynomial.add_product_pointer if variant == "pointer" else polynomial.add_product_descriptor
    return _describe(function, boxes, others, constants, dtype, config)


@functools.cache
def momentum_cast(dtype: torch.dtype, nesterov: bool) -> Specialization:
    """Describe the fused momentum update.

    Args:
        dtype: of the result.
        nesterov: whether the result looks ahead.

    Returns:
        The kernel's description.
    """
    pointers = {"momentum": "*fp32", "grad": "*fp32", "u": f"*{TYPES[dtype]}", "partials": "*fp32"}
    return Specialization(
        function=momentum.momentum_step,
        signature=pointers | {"mu": "fp32", "length": "i32"},
        constants={"NESTEROV": nesterov, "BLOCK": NORM_BLOCK},
        divisible=(*pointers, "length"),
        boxes={},
        options={"num_warps": 8, "enable_fp_fusion": False},
    )


def _describe(
    function: Any,
    boxes: dict[str, tuple[int, ...]],
    others: dict[str, str],
    constants: dict[str, Any],
    dtype: torch.dtype,
    config: Config,
) -> Specialization:
    """Give the matrices of a kernel their types: pointers, or descriptors with the given boxes."""
    descriptors = function in (syrk.symmetric_descriptor, polynomial.add_product_descriptor)
    names = [name for name in function.arg_names if name in boxes and name not in constants]
    types = dict.fromkeys(names, f"*{TYPES[dtype]}")
    if descriptors:
        types = {name: f"tensordesc<{TYPES[dtype]}[{','.join(map(str, boxes[name]))}]>" for name in names}
    signature = types | {name: kind for name, kind in others.items() if name not in constants}
    limit = {} if config.registers is None else {"maxnreg": config.registers}
    aligned = {"n", "m", "k"} | {name for name, kind in signature.items() if kind.startswith("*")}
    return Specialization(
        function=function,
        signature=signature,
        constants=constants,
        divisible=tuple(name for name in signature if name in aligned),
        boxes={name: boxes[name] for name in names} if descriptors else {},
        options={"num_warps": config.warps, "num_stages": config.stages} | limit,
    )
