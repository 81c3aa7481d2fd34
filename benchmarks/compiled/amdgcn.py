"""Reads AMD machine code as LLVM prints it: registers, spills, scratch memory and matrix instructions."""

from __future__ import annotations

import re
from collections import Counter

from distmuon.benchmarks.compiled import flow

FIELDS = {
    "registers": r"\.vgpr_count:\s+(\d+)",
    "spill_vector": r"\.vgpr_spill_count:\s+(\d+)",
    "spill_scalar": r"\.sgpr_spill_count:\s+(\d+)",
    "stack": r"\.private_segment_fixed_size:\s+(\d+)",
}
LABEL = re.compile(r"^(\.LBB\w+):")
BRANCH = re.compile(r"^\s+s_c?branch\w*\s+(\.LBB\w+)")
NAME = re.compile(r"^\s+([a-z][a-z0-9_]+)")
MATRIX = re.compile(r"^v_s?mfma_")
VECTOR = re.compile(r"^v_(?:pk_)?(?:fma|fmac|mad)_f32")
GLOBAL = re.compile(r"^(?:global|buffer|flat)_load_")


def figures(text: str) -> dict[str, object]:
    """Count what matters in a kernel's machine code.

    Args:
        text: LLVM's assembly of the kernel, metadata included.

    Returns:
        The same fields as of NVIDIA's machine code. Global loads of a loop go through registers on gfx942 unless they
        are direct to shared memory; "ldg" counts those of less than 4 bytes.

    Raises:
        ValueError: if the metadata lacks a field.
    """
    result: dict[str, object] = {}
    for field, pattern in FIELDS.items():
        match = re.search(pattern, text)
        if match is None:
            raise ValueError(f"the assembly has no metadata field that matches {pattern!r}")
        result[field] = int(match[1])
    lines = text.split(".section")[0].splitlines()
    loop = hot_loop(lines)
    names = names_of(loop or lines)
    loads = [name for name in names if GLOBAL.match(name)]
    return result | {
        "instructions": len(names_of(lines)),
        "has_loop": bool(loop),
        "loop": len(names),
        "tensor": dict(sorted(Counter(name for name in names if MATRIX.match(name)).items())),
        "ldg": sum(narrow(name) for name in loads),
        "global_loads": dict(sorted(Counter(loads).items())),
        "shared_loads": sum(name.startswith("ds_read") for name in names),
        "barriers": names.count("s_barrier"),
    }


def names_of(lines: list[str]) -> list[str]:
    """The instructions among lines of assembly."""
    return [m[1] for m in map(NAME.match, lines) if m]


def narrow(load: str) -> bool:
    """Whether a global load fetches less than 4 bytes per lane."""
    return re.search(r"_(?:u|s)?(?:byte|short|i8|u8|b8|b16|d16)", load) is not None


def hot_loop(lines: list[str]) -> list[str]:
    """Find the loop with the most multiply-adds, on matrix units or else scalar ones; empty without such a loop."""
    unit = MATRIX if any(MATRIX.match(name) for name in names_of(lines)) else VECTOR
    labels = {m[1]: at for at, m in enumerate(map(LABEL.match, lines)) if m}
    work, successors = [], []
    for at, line in enumerate(lines):
        branch, name = BRANCH.match(line), (names_of([line]) or [""])[0]
        targets = [labels[branch[1]]] if branch and branch[1] in labels else []
        successors.append(targets if name in {"s_branch", "s_endpgm"} else [*targets, at + 1])
        work.append(int(unit.match(name) is not None))
    return [lines[at] for at in flow.hot_loop(successors, work)]
