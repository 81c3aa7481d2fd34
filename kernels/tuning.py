"""Tile sizes of the matrix kernels per architecture, as plain data; which suits a shape is measured on the device.

Every entry was compiled ahead of time for its architecture, without spills and, unless it is for indivisible sizes,
without scalar loads in the inner loop. None was ever run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kernel = Literal["symmetric", "polynomial"]
Variant = Literal["pointer", "descriptor"]


@dataclass(frozen=True)
class Config:
    """How a matrix kernel is cut into programs.

    Args:
        block_m: rows of a tile of the result; for the symmetric kernel, columns too.
        block_n: columns of a tile of the result.
        block_k: depth multiplied at a time.
        warps: warps of a program.
        stages: tiles in flight in the inner loop.
        group: tile rows walked together, for the L2 cache.
        registers: most registers of a thread on NVIDIA devices, where the compiler would take more than it needs and
            so halve the programs that a multiprocessor holds; None leaves it free.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    registers: int | None = None


# Two programs share a multiprocessor up to 128 registers; the compiler spills below these limits, not at them.
_AMPERE = (Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 3))
_HOPPER = (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4))
_WIDE = (Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4))
_CDNA = (Config(128, 128, 64, 8, 2), Config(128, 128, 32, 8, 2), Config(64, 64, 64, 4, 2))


def _capped(registers: int) -> tuple[Config, ...]:
    return tuple(replace(each, registers=registers) if each.warps == 8 else each for each in _HOPPER)


CONFIGS: dict[tuple[str, Kernel, Variant], tuple[Config, ...]] = {
    ("sm_80", "symmetric", "pointer"): _AMPERE,
    ("sm_80", "polynomial", "pointer"): _AMPERE,
    ("sm_90", "symmetric", "pointer"): _capped(128),
    ("sm_90", "symmetric", "descriptor"): _capped(112),
    ("sm_90", "polynomial", "pointer"): (*_HOPPER, *_WIDE),
    ("sm_90", "polynomial", "descriptor"): (*_HOPPER, *_WIDE),
    ("sm_100", "symmetric", "pointer"): _capped(160),
    ("sm_100", "symmetric", "descriptor"): _capped(128),
    ("sm_100", "polynomial", "pointer"): _HOPPER,
    ("sm_100", "polynomial", "descriptor"): (*_HOPPER, *_WIDE),
    ("gfx942", "symmetric", "pointer"): _CDNA,
    ("gfx942", "polynomial", "pointer"): (*_CDNA, Config(128, 256, 32, 8, 2)),
    ("gfx950", "symmetric", "pointer"): _CDNA,
    ("gfx950", "polynomial", "pointer"): (*_CDNA, Config(128, 256, 32, 8, 2)),
}
# True float32 products run outside NVIDIA's matrix units.
FLOAT32 = (Config(64, 64, 16, 4, 3),)
FLOAT32_CDNA = (Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2))
# Sizes that are no multiples of 16 are read element by element, which takes registers.
INDIVISIBLE = (Config(64, 64, 32, 4, 2),)
INDIVISIBLE_FLOAT32 = (Config(32, 32, 32, 4, 2),)
ARCHITECTURES = tuple(dict.fromkeys(architecture for architecture, _, _ in CONFIGS))


def device_name(device: torch.device) -> tuple[int, int] | str:
    """What a device calls its architecture.

    Args:
        device: a CUDA or ROCm device.

    Returns:
        CUDA compute capability (major, minor), or the name of an AMD architecture.
    """
    properties = torch.cuda.get_device_properties(device)
    return str(properties.gcnArchName) if torch.version.hip else (properties.major, properties.minor)


def architecture(device: tuple[int, int] | str) -> str:
    """Name of the architecture whose configurations fit a device.

    Args:
        device: CUDA compute capability (major, minor), or the name of an AMD architecture such as "gfx942:sramecc+".

    Returns:
        One of ARCHITECTURES.

    Raises:
        ValueError: no architecture fits.
    """
    if isinstance(device, str):
        name = device.split(":")[0]
        if name in ARCHITECTURES:
            return name
    elif device[0] in (9, 10):
        return f"sm_{device[0]}0"
    elif device[0] >= 8:
        # Consumer and later parts lack the wgmma and tcgen05 instructions of the data centre parts.
        return "sm_80"
    raise ValueError(
        f"The Triton kernels got a device of architecture {device!r}; they have configurations for compute capability "
        f"8.0 or higher, gfx942 and gfx950; use the torch kernels on this device."
    )


def has_descriptors(architecture: str) -> bool:
    """Whether an architecture has hardware that reads memory by tensor descriptors."""
    return (architecture, "symmetric", "descriptor") in CONFIGS


def configs(
    architecture: str, kernel: Kernel, variant: Variant, itemsize: int, divisible: bool = True
) -> tuple[Config, ...]:
    """All configurations of a kernel, the most generally good first.

    Args:
        architecture: one of ARCHITECTURES.
        kernel: which kernel.
        variant: through pointers or through tensor descriptors.
        itemsize: bytes of an element, 2 or 4.
        divisible: whether rows start at multiples of 16 bytes and all sizes are multiples of 16.

    Returns:
        One or more configurations.

    Raises:
        ValueError: the architecture has no such variant.
    """
    found = CONFIGS.get((architecture, kernel, variant))
    if found is None:
        raise ValueError(
            f"The {kernel} kernel has no variant {variant!r} for {architecture}; it has 'pointer' everywhere and "
            f"'descriptor' on sm_90 and sm_100; leave the variant out to have it chosen."
        )
    if variant == "pointer" and not divisible:
        return INDIVISIBLE if itemsize == 2 else INDIVISIBLE_FLOAT32
    if itemsize == 4:
        return FLOAT32_CDNA if architecture.startswith("gfx") else FLOAT32
    return found


def prune(configs: Sequence[Config], m: int, n: int, batch: int) -> tuple[Config, ...]:
    """Leave out configurations that cannot be the fastest for a shape.

    Args:
        configs: one or more candidates.
        m: rows of the result.
        n: its columns, or for the symmetric kernel the depth.
        batch: matrices.

    Returns:
        One or more of the candidates, in their order.
    """
    smallest = min(config.block_m for config in configs)
    largest = max(config.block_m for config in configs)
    # From here on, large tiles keep every multiprocessor of the largest devices busy several times over.
    enough = batch * (m // largest) ** 2 >= 1024
    kept = [config for config in configs if config.block_m < 2 * m and config.block_n < 2 * n]
    kept = [config for config in kept if not enough or config.block_m == largest]
    return tuple(kept) or tuple(config for config in configs if config.block_m == smallest)
