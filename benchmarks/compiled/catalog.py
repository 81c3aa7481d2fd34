"""Every kernel as it ships: its forms, dtypes and tile sizes on each target, each a launch that can be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distmuon.benchmarks.compiled.compile import Launch, compile_launch
from distmuon.benchmarks.compiled.targets import TARGETS
from distmuon.kernels import tuning, variants
from distmuon.kernels.tuning import Config, Variant
from distmuon.kernels.variants import Specialization

KERNELS = ("symmetric", "polynomial", "momentum")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sizes of one launch; the JIT asks only whether they are 1 or multiples of 16. Per-matrix scalars: stride 3 or 1.
ALIGNED = {"m": 4096, "n": 16384, "k": 16384, "sum_stride": 528, "length": 1 << 24}
ODD = {"m": 4095, "n": 16383, "k": 16383, "sum_stride": 2080, "length": (1 << 24) - 1}
FORMS = {(False, False): "AB^T", (True, False): "AB^T + C", (False, True): "AB^T, norm", (True, True): "AB^T + C, norm"}


@dataclass(frozen=True)
class Case:
    """One kernel to compile for one target.

    Args:
        kernel: one of KERNELS.
        target: name of one of TARGETS.
        variant: through pointers or through tensor descriptors.
        form: what it computes.
        dtype: of its operands, for momentum of its result.
        config: tile sizes; None for momentum.
        aligned: whether sizes are multiples of 16.
        default: whether it is the first choice of the target.
    """

    kernel: Literal["symmetric", "polynomial", "momentum"]
    target: str
    variant: Variant
    form: str
    dtype: torch.dtype
    config: Config | None
    aligned: bool
    default: bool

    @property
    def identity(self) -> dict[str, Any]:
        """The case as it stands in the results."""
        constants = specialization(self).constants
        tile = str(constants.get("BLOCK"))
        if self.config is not None:
            rows = constants["BLOCK_M"]
            tile = f"{rows}x{constants.get('BLOCK_N', rows)}x{constants['BLOCK_K']}"
        identity = {"kernel": self.kernel, "target": self.target, "variant": self.variant, "form": self.form}
        identity |= {"dtype": str(self.dtype).removeprefix("torch."), "tile": tile}
        stages = self.config.stages if self.config is not None else 1
        return identity | {"stages": stages, "aligned": self.aligned, "default": self.default}


def cases(targets: list[str], kernels: list[str], *, quick: bool) -> Iterator[Case]:
    """What to compile.

    Args:
        targets: names of targets.
        kernels: names of kernels.
        quick: one form of each kernel and variant, in bfloat16, at the target's first choice of tiles.

    Yields:
        One case at a time.
    """
    for target in targets:
        for kernel in kernels:
            found = momentum(target) if kernel == "momentum" else matrix(target, kernel)
            for case in found:
                main = case.form in ("AB^T + C", "aX + PX", "mu m + g")
                if not quick or (case.default and main and case.aligned and case.dtype == torch.bfloat16):
                    yield case


def matrix(target: str, kernel: Any) -> Iterator[Case]:
    """All forms and tiles in bfloat16; the main form in the other dtypes, and at sizes that are not multiples of 16."""
    for variant in variants_of(target):
        for at, config in enumerate(tuning.configs(target, kernel, variant, 2)):
            for form in FORMS.values() if kernel == "symmetric" else ("aX + PX",):
                yield Case(kernel, target, variant, form, torch.bfloat16, config, aligned=True, default=at == 0)
        main = "AB^T + C" if kernel == "symmetric" else "aX + PX"
        for dtype in (torch.float16, torch.float32):
            config = tuning.configs(target, kernel, variant, dtype.itemsize)[0]
            yield Case(kernel, target, variant, main, dtype, config, aligned=True, default=True)
        for dtype in (torch.bfloat16, torch.float32) if variant == "pointer" else ():
            config = tuning.configs(target, kernel, variant, dtype.itemsize, divisible=False)[0]
            yield Case(kernel, target, variant, main, dtype, config, aligned=False, default=True)


def momentum(target: str) -> Iterator[Case]:
    """Every dtype of the result, plain momentum, and lengths that are not multiples of 16."""
    for dtype in DTYPES.values():
        yield Case("momentum", target, "pointer", "mu m + g", dtype, None, aligned=True, default=True)
    yield Case("momentum", target, "pointer", "m", torch.bfloat16, None, aligned=True, default=True)
    yield Case("momentum", target, "pointer", "mu m + g", torch.bfloat16, None, aligned=False, default=True)


def variants_of(target: str) -> tuple[Variant, ...]:
    """The variants of the matrix kernels that a target has."""
    return ("pointer", "descriptor") if tuning.has_descriptors(target) else ("pointer",)


def specialization(case: Case) -> Specialization:
    """The launchers' own description of a case."""
    if case.config is None:
        return variants.momentum_cast(case.dtype, case.form != "m")
    if case.kernel == "polynomial":
        return variants.add_product(case.config, case.variant, case.dtype)
    has_c, has_sums = next(key for key, form in FORMS.items() if form == case.form)
    return variants.symmetric(case.config, case.variant, case.dtype, has_c, has_sums)


def launch_of(described: Specialization, sizes: dict[str, int], scalar_stride: int) -> Launch:
    """The launch of a description, with stand-ins for its tensors."""
    numbers = {**sizes, "scalar_stride": scalar_stride}
    arguments = dict(described.constants)
    for name, kind in described.signature.items():
        if kind.startswith("tensordesc"):
            arguments[name] = descriptor(described.boxes[name], DTYPES[kind[len("tensordesc<") :].split("[")[0]])
        elif kind.startswith("*"):
            arguments[name] = MockTensor(DTYPES[kind[1:]])
        else:
            arguments[name] = numbers[name] if kind.startswith("i") else 0.5
    return Launch(described.function, arguments, described.options)


def descriptor(box: tuple[int, ...], dtype: torch.dtype) -> TensorDescriptor:
    """A descriptor with these boxes; its shape is not a constant of the kernel."""
    return TensorDescriptor(torch.empty(8, dtype=dtype), [4, 4096, 4096], [4096 * 4096, 4096, 1], list(box))


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one case.

    Returns:
        Its identity and figures, or "error" with what the compiler says.
    """
    sizes = ALIGNED if case.aligned else ODD
    launch = launch_of(specialization(case), sizes, scalar_stride=1 if case.kernel == "polynomial" else 3)
    try:
        return case.identity | compile_launch(launch, TARGETS[case.target])
    except Exception as error:
        return case.identity | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
