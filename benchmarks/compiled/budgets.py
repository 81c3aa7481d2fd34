"""What compiled kernels may cost: a record beyond any of these budgets fails the build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Up to 128 registers, two CTAs of 8 warps share a multiprocessor. 96 spills where a C or a norm is added.
HOPPER_POINTER = 128
HOPPER_DESCRIPTOR = {"AB^T": 96, "aX + PX": 96}
HOPPER_DESCRIPTOR_MORE = 112
DEFAULT_REGISTERS = {"sm_80": 176, "sm_100": 160}
TENSOR_CORES = {"sm_80": "HMMA.16816", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma", "gfx950": "v_mfma"}


def breaches(record: dict[str, Any]) -> list[str]:
    """Compare one compiled kernel with the budgets.

    Args:
        record: what distmuon.benchmarks.compiled.catalog wrote about it.

    Returns:
        One sentence per breach that names kernel, target, figure and budget; none if all is well.
    """
    name = f"{record['kernel']} {record['variant']} ({record['form']}, {record['dtype']}, {record['tile']})"
    if "error" in record:
        return [f"{name} on {record['target']} does not compile: {record['error']}"]
    rules = [*memory(record), *(matrix(record) if record["kernel"] != "momentum" else [])]
    return [f"{name} on {record['target']}: {sentence}" for sentence in rules]


def memory(record: dict[str, Any]) -> Iterator[str]:
    """Nothing spills, and loads move whole vectors, but at odd sizes, where they cannot."""
    for figure in ("spill_stores", "spill_loads", "spill_vector", "stack"):
        yield from at_most(record, figure, 0)
    if record["aligned"]:
        yield from at_most(record, "ldg", 0)


def matrix(record: dict[str, Any]) -> Iterator[str]:
    """Products run on matrix units, and registers leave room for the CTAs that hide latency."""
    if record["dtype"] == "float32" or not record["aligned"]:
        return
    target, unit = record["target"], TENSOR_CORES[record["target"]]
    if not any(name.startswith(unit) for name in record["tensor"]):
        yield f"the hot loop has no {unit} instruction, but {record['tensor'] or 'none'}"
    if record["default"] and target in DEFAULT_REGISTERS:
        yield from at_most(record, "registers", DEFAULT_REGISTERS[target])
    if target == "sm_90" and record["tile"] == "128x128x64" and record["warps"] == 8:
        descriptor = HOPPER_DESCRIPTOR.get(record["form"], HOPPER_DESCRIPTOR_MORE)
        yield from at_most(record, "registers", HOPPER_POINTER if record["variant"] == "pointer" else descriptor)
        if "HGMMA.64x128x16" not in record["tensor"]:
            yield f"the hot loop has no HGMMA.64x128x16 instruction, but {record['tensor'] or 'none'}"
        if record["stages"] == 3 and record["ctas"] < 2:
            yield f"ctas per multiprocessor is {record['ctas']} (by {record['limited_by']}), at least 2"


def at_most(record: dict[str, Any], figure: str, budget: int) -> Iterator[str]:
    """A sentence if a figure is above its budget; figures that a target does not have are fine."""
    if record.get(figure, 0) > budget:
        yield f"{figure} is {record[figure]}, at most {budget}"
