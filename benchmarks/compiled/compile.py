"""Compiles a Triton kernel for a GPU that is not there, with the specialization a launch on it would get."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distmuon.benchmarks.compiled import amdgcn, sass
from distmuon.benchmarks.compiled.targets import Target, resident


class AbsentGPU:
    """Stands in for a GPU's driver as far as compiling asks: it names the target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        backend, arch = ("cuda", self.target.capability) if self.target.nvidia else ("hip", self.target.name)
        return GPUTarget(backend, arch, self.target.warp_size)

    def get_current_device(self) -> str:
        """The key of Triton's cache in memory."""
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        """A stream that nothing is launched on."""
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch; tensors may be stand-ins with a dtype.

    Args:
        kernel: the jitted function.
        arguments: by name, compile-time constants included.
        options: num_warps, num_stages and other options of the compiler.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@contextlib.contextmanager
def present(target: Target) -> Iterator[None]:
    """Let Triton believe that a GPU of this architecture is there."""
    before = driver._active
    driver.set_active(AbsentGPU(target))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(launch: Launch, target: Target) -> dict[str, Any]:
    """Compile a launch and read the machine code.

    Args:
        launch: the kernel and its arguments.
        target: the architecture.

    Returns:
        Registers per thread, spills, shared memory in bytes, CTAs per multiprocessor, and counts of instructions.

    Raises:
        ValueError: if the compiler's output lacks a figure.
    """
    log = io.StringIO()
    with (
        present(target),
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        # Of a kernel that is found in a cache, ptxas would report nothing.
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        launch.kernel.device_caches.clear()
        options = {"enable_fp_fusion": True, **launch.options}
        compiled = launch.kernel.warmup(grid=(1,), **launch.arguments, **options)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    if target.nvidia:
        record = sass.registers_and_spills(log.getvalue()) | sass.figures(disassemble(compiled.asm["cubin"]))
    else:
        record = amdgcn.figures(compiled.asm["amdgcn"])
    ctas, limit = resident(target, cast(int, record["registers"]), shared, warps, columns)
    return {"warps": warps, "shared": shared, "tensor_columns": columns, "ctas": ctas, "limited_by": limit, **record}


def disassemble(cubin: bytes) -> str:
    """Print machine code with the cuobjdump of Triton's package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return done.stdout
