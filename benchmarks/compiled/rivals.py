"""Compiles the symmetric-product kernels of public Muon implementations from local clones of their repositories."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distmuon.benchmarks.compiled.compile import Launch, compile_launch
from distmuon.benchmarks.compiled.targets import TARGETS

HEADER = "import triton\nimport triton.language as tl\n"
ROWS, COLUMNS = 4096, 16384


@dataclass(frozen=True)
class Rival:
    """One public kernel: the repository, the file and the function, and what it computes."""

    repository: str
    file: str
    kernel: str
    computes: str


@dataclass(frozen=True)
class Tile:
    """Block sizes, pipeline stages and warps."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} s{self.stages} w{self.warps}"


DION = ("microsoft/dion", "dion/newton_schulz_triton.py")
MODDED = ("KellerJordan/modded-nanogpt", "triton_kernels.py")
EMERGING = ("NVIDIA-NeMo/Emerging-Optimizers", "emerging_optimizers/triton_kernels/syrk.py")
FLASH = ("nil0x9/flash-muon", "flash_muon/matmul_transpose_triton.py")
RIVALS = (
    Rival(*DION, "ns_line_1_kernel", "AA^T"),
    Rival(*MODDED, "XXT_kernel", "AA^T"),
    Rival(*FLASH, "mmt_kernel", "AA^T"),
    Rival(*EMERGING, "syrk_kernel_bf16", "AA^T"),
    Rival(*DION, "ns_line_2_kernel", "bA + cAA^T"),
    Rival(*MODDED, "ba_plus_cAA_kernel", "bA + cAA^T"),
    Rival(*EMERGING, "syrk_kernel_bf16", "bA + cAA^T"),
    Rival(*DION, "ns_line_3_kernel", "aX + BX"),
)
TILES = (
    Tile(128, 128, 64, 3, 8),
    Tile(128, 128, 64, 4, 8),
    Tile(64, 128, 128, 4, 8),
    Tile(128, 256, 64, 3, 8),
    Tile(128, 128, 64, 3, 4),
    Tile(64, 64, 64, 4, 4),
)


def compile_rivals(clones: Path, said: Callable[[str], None]) -> list[dict[str, Any]]:
    """Compile every public kernel at every tile for every NVIDIA target.

    Args:
        clones: folder with one git clone per repository, named as the repository without its owner.
        said: called with one line per kernel and target.

    Returns:
        One record per kernel, tile and target, with the commit the source was read from.
    """
    records = []
    for rival in RIVALS:
        clone = clones / rival.repository.split("/")[1]
        commit = git(clone, "rev-parse", "HEAD").strip()
        source = git(clone, "show", f"HEAD:{rival.file}")
        with tempfile.TemporaryDirectory() as directory:
            kernel = getattr(load(Path(directory) / "rival.py", source), rival.kernel)
            for target in (target for target in TARGETS.values() if target.nvidia):
                said(f"{rival.repository} {rival.kernel} {target.name}")
                for tile in tiles(rival):
                    launch = Launch(
                        kernel,
                        arguments(rival, kernel.arg_names, tile),
                        {"num_warps": tile.warps, "num_stages": tile.stages},
                    )
                    identity = {**vars(rival), "commit": commit, "target": target.name, "tile": str(tile)}
                    records.append(identity | compile_launch(launch, target))
    return records


def git(clone: Path, *command: str) -> str:
    """Run git in a clone."""
    done = subprocess.run(["git", "-C", str(clone), *command], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout


def load(path: Path, source: str) -> Any:
    """Import the jitted functions of a module alone, without their autotuners: the rest may need a GPU."""
    path.write_text(HEADER + "\n\n".join(jitted(source)))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def jitted(source: str) -> Iterator[str]:
    """The functions of a module that Triton compiles."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            yield "\n".join(["@triton.jit", *lines, ""])


def tiles(rival: Rival) -> Iterator[Tile]:
    """The tiles that a kernel takes: flash-muon's are square."""
    yield from (tile for tile in TILES if rival.repository != FLASH[0] or tile.rows == tile.columns)


def arguments(rival: Rival, names: list[str], tile: Tile) -> dict[str, Any]:
    """What a launch on aligned contiguous bfloat16 matrices would pass, by the names that the kernels use."""
    tensor = MockTensor(torch.bfloat16)
    sizes: dict[str, Any] = {"BLOCK_SIZE_M": tile.rows, "BLOCK_SIZE_N": tile.columns, "BLOCK_SIZE_K": tile.depth}
    sizes |= {"TILE_M": tile.rows, "TILE_N": tile.columns, "TILE_K": tile.depth, "GROUP_SIZE_M": 8}
    shapes = {"M": ROWS, "K": COLUMNS, "N": ROWS if rival.repository == EMERGING[0] else COLUMNS}
    values: dict[str, Any] = sizes | shapes | {"LOWER_UPPER": 1, "INPUT_PRECISION": "tf32", "WARP_SPECIALIZE": False}
    added = rival.computes == "bA + cAA^T"
    values |= {"SKIP_UPPER_TRIANGLE": False, "TRANS": False, "alpha": 2.0, "beta": 0.5 if added else 0.0}
    values |= {
        "d_desc": descriptor(ROWS, tile.rows, tile.columns),
        "d_t_desc": descriptor(ROWS, tile.columns, tile.rows),
        "a_desc": descriptor(COLUMNS, tile.rows, tile.depth),
        "a_t_desc": descriptor(COLUMNS, tile.columns, tile.depth),
        "c_desc": descriptor(ROWS, tile.rows, tile.columns) if added else None,
    }
    return {
        name: values[name] if name in values else tensor if "stride" not in name else stride(name) for name in names
    }


def stride(name: str) -> int:
    """The stride that an argument's name speaks of, of one contiguous matrix."""
    if name.endswith(("_c", "_xk", "_yn")):
        return 1
    return 0 if name.endswith("_b") else COLUMNS


def descriptor(columns: int, *block: int) -> TensorDescriptor:
    """A descriptor of a contiguous bfloat16 matrix."""
    return TensorDescriptor(torch.empty(8, dtype=torch.bfloat16), [ROWS, columns], [columns, 1], list(block))
