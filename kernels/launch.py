"""Choice of a kernel's variant and tile sizes for tensors at hand, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distmuon.kernels import tuning
from distmuon.kernels.tuning import Config, Kernel, Variant
from distmuon.kernels.variants import Specialization

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
# Of the architectures whose kernels the interpreter can run, one that has every variant.
INTERPRETED = "sm_90"


def candidates(
    kernel: Kernel,
    tensors: Iterable[Tensor],
    shape: tuple[int, int, int],
    variant: Variant | None,
    config: Config | None,
) -> tuple[Variant, tuple[Config, ...]]:
    """Choose how a kernel reads its matrices and which tile sizes to consider.

    Args:
        kernel: which kernel.
        tensors: its matrices, contiguous and of one dtype.
        shape: (rows of the result, its columns or the depth, matrices), as tuning.prune takes them.
        variant: a choice made already, or None.
        config: the same of the tile sizes.

    Returns:
        The variant, and one or more configurations; one if the kernel is interpreted, where there is nothing to time.

    Raises:
        ValueError: there is no such variant here.
    """
    tensors = list(tensors)
    name = _architecture(tensors[0].device)
    # Descriptors take rows and matrices that start at multiples of 16 bytes.
    aligned = all(tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.itemsize % 16 == 0 for tensor in tensors)
    # What the compiler is told of pointers and sizes: whether they are multiples of 16.
    divisible = aligned and all(tensor.shape[-1] % 16 == 0 for tensor in tensors)
    if variant is None:
        wide = tensors[0].itemsize == 4
        variant = "descriptor" if aligned and not wide and tuning.has_descriptors(name) else "pointer"
    elif variant == "descriptor" and not aligned:
        raise ValueError(
            f"The {kernel} kernel got variant='descriptor' for matrices of {[tuple(t.shape) for t in tensors]}; it "
            f"takes rows that start at multiples of 16 bytes; use variant='pointer'."
        )
    if config is not None:
        return variant, (config,)
    configs = tuning.prune(tuning.configs(name, kernel, variant, tensors[0].itemsize, divisible), *shape)
    return variant, configs[:1] if triton.knobs.runtime.interpret else configs


def launch(specializations: Sequence[Specialization], grid: Grid, arguments: Mapping[str, Any]) -> None:
    """Launch a kernel; of several specializations the fastest, timed when the shape is new.

    Args:
        specializations: one or more of the same kernel for different configurations.
        grid: number of programs, from the kernel's constants.
        arguments: the run-time arguments, descriptors still as tensors.
    """
    first = specializations[0]
    passed = {name: arguments[name] for name in first.signature}
    tensors = [argument for argument in passed.values() if isinstance(argument, Tensor)]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    for name, box in first.boxes.items():
        passed[name] = TensorDescriptor.from_tensor(passed[name], list(box))
    with torch.cuda.device(tensors[0].get_device()):
        if len(specializations) == 1:
            first.function[grid](**passed, **first.constants, **first.options)
        else:
            _tuner(tuple(specializations), shapes)[grid](**passed)


@functools.cache
def _tuner(specializations: tuple[Specialization, ...], shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The autotuner of one kernel for one set of shapes; it remembers what was fastest."""
    choices = [
        triton.Config(dict(each.constants), **each.options, pre_hook=functools.partial(_prepare, each.boxes))
        for each in specializations
    ]
    return triton.autotune(choices, key=[])(specializations[0].function)


def _prepare(boxes: Mapping[str, tuple[int, ...]], arguments: Mapping[str, Any]) -> None:
    """Fit the arguments to a configuration before it runs, and clear partial sums that one with smaller tiles left."""
    for name, box in boxes.items():
        arguments[name].block_shape = list(box)
    if arguments.get("sums") is not None:
        arguments["sums"].zero_()


def _architecture(device: torch.device) -> str:
    """The architecture to take configurations of."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    if device.type != "cuda":
        raise ValueError(
            f"The Triton kernels got tensors on {device}; they run on CUDA and ROCm; use the torch kernels elsewhere."
        )
    return _device_architecture(device)


@functools.cache
def _device_architecture(device: torch.device) -> str:
    return tuning.architecture(tuning.device_name(device))
