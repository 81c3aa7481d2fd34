"""The launchers as the tests call them: one variant of the kernels in one configuration, or the plain torch twins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distmuon.kernels import reference, triton_ops
from distmuon.kernels.tuning import Config

POINTER, DESCRIPTOR, TWIN = "pointer", "descriptor", "twin"
KERNELS = (POINTER, DESCRIPTOR)
EVERY = (*KERNELS, TWIN)
# Small tiles and bands of two, so that small matrices have whole and ragged tiles, and pairs of bands.
CONFIG = Config(block_m=64, block_n=64, block_k=32, warps=4, stages=2, group=2)
TINY = Config(block_m=16, block_n=32, block_k=16, warps=4, stages=2, group=2)


@dataclass(frozen=True)
class Launchers:
    symmetric_product: Callable[..., Any]
    symmetric_product_norm: Callable[..., Any]
    add_product: Callable[..., Any]


def launchers(variant: str, config: Config = CONFIG) -> Launchers:
    if variant == TWIN:
        return Launchers(reference.symmetric_product, reference.symmetric_product_norm, reference.add_product)
    names = ("symmetric_product", "symmetric_product_norm", "add_product")
    return Launchers(*(functools.partial(getattr(triton_ops, name), variant=variant, config=config) for name in names))


def takes(variant: str, dtype: torch.dtype, *columns: int) -> bool:
    """Whether a variant takes rows of these lengths: tensor descriptors want multiples of 16 bytes."""
    return variant != DESCRIPTOR or all(n * dtype.itemsize % 16 == 0 for n in columns)
