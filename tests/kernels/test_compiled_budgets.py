"""A kernel beyond a budget is noticed and named."""

from __future__ import annotations

from typing import Any

import pytest

from distmuon.benchmarks.compiled import budgets, table
from distmuon.benchmarks.compiled.roofline import product, symmetric
from distmuon.benchmarks.compiled.targets import TARGETS, resident

GOOD: dict[str, Any] = {
    **{"kernel": "symmetric", "target": "sm_90", "variant": "pointer", "form": "AB^T + C", "dtype": "bfloat16"},
    **{"tile": "128x128x64", "stages": 3, "warps": 8, "aligned": True, "default": True},
    **{"registers": 128, "stack": 0, "spill_stores": 0, "spill_loads": 0, "ldg": 0, "shared": 98304},
    **{"ctas": 2, "limited_by": "registers", "tensor": {"HGMMA.64x128x16": 4}},
}
AMD: dict[str, Any] = {
    **{key: value for key, value in GOOD.items() if not key.startswith("spill")},
    **{"target": "gfx942", "spill_vector": 0, "spill_scalar": 0, "tensor": {"v_mfma_f32_32x32x8_bf16": 16}},
}
AMPERE = GOOD | {"target": "sm_80", "registers": 176, "tensor": {"HMMA.16816": 64}, "ctas": 1}
BLACKWELL = GOOD | {"target": "sm_100", "registers": 160, "tensor": {"UTCHMMA": 4}, "ctas": 1}
MOMENTUM = GOOD | {"kernel": "momentum", "tile": "4096", "tensor": {}, "registers": 200, "ctas": 1}


@pytest.mark.parametrize("record", [GOOD, AMD, AMPERE, BLACKWELL, MOMENTUM])
def test_kernels_within_the_budgets_pass(record: dict[str, Any]) -> None:
    assert budgets.breaches(record) == []


@pytest.mark.parametrize(
    ("record", "change", "said"),
    [
        (GOOD, {"spill_stores": 4}, "spill_stores is 4, at most 0"),
        (GOOD, {"spill_loads": 8}, "spill_loads is 8, at most 0"),
        (GOOD, {"stack": 16}, "stack is 16, at most 0"),
        (GOOD, {"ldg": 32}, "ldg is 32, at most 0"),
        (GOOD, {"registers": 129}, "registers is 129, at most 128"),
        (GOOD, {"variant": "descriptor", "registers": 113}, "registers is 113, at most 112"),
        (GOOD, {"variant": "descriptor", "form": "AB^T", "registers": 97}, "registers is 97, at most 96"),
        (GOOD, {"variant": "descriptor", "form": "aX + PX", "registers": 97}, "registers is 97, at most 96"),
        (GOOD, {"ctas": 1}, "ctas per multiprocessor is 1 (by registers), at least 2"),
        (GOOD, {"tensor": {"HGMMA.64x64x16": 8}}, "no HGMMA.64x128x16 instruction"),
        (GOOD, {"tensor": {"HMMA.16816": 64}}, "no HGMMA instruction"),
        (GOOD, {"tensor": {}, "stages": 4, "tile": "64x64x64"}, "no HGMMA instruction"),
        (AMPERE, {"registers": 177}, "registers is 177, at most 176"),
        (AMPERE, {"tensor": {}}, "no HMMA.16816 instruction"),
        (BLACKWELL, {"registers": 161}, "registers is 161, at most 160"),
        (BLACKWELL, {"tensor": {"HMMA.16816": 64}}, "no UTC instruction"),
        (AMD, {"spill_vector": 1}, "spill_vector is 1, at most 0"),
        (AMD, {"stack": 4}, "stack is 4, at most 0"),
        (AMD, {"ldg": 1}, "ldg is 1, at most 0"),
        (AMD, {"tensor": {}}, "no v_mfma instruction"),
        (MOMENTUM, {"ldg": 8}, "ldg is 8, at most 0"),
        (MOMENTUM, {"spill_stores": 8}, "spill_stores is 8, at most 0"),
        (GOOD, {"error": "PassManager::run failed"}, "does not compile: PassManager::run failed"),
    ],
)
def test_a_breach_names_kernel_target_figure_and_budget(
    record: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    broken = record | change
    sentences = budgets.breaches(broken)
    assert any(said in sentence for sentence in sentences)
    assert all(broken["kernel"] in sentence and f"on {broken['target']}" in sentence for sentence in sentences)


def test_budgets_of_the_first_choice_do_not_bind_other_tiles() -> None:
    assert budgets.breaches(AMPERE | {"default": False, "registers": 255}) == []
    assert budgets.breaches(GOOD | {"stages": 4, "ctas": 1}) == []
    assert budgets.breaches(GOOD | {"aligned": False, "ldg": 64, "registers": 200}) == []
    assert budgets.breaches(GOOD | {"dtype": "float32", "tensor": {}, "registers": 255}) == []
    assert budgets.breaches(GOOD | {"aligned": False, "spill_stores": 4}) != []


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_90", 128, 96 * 1024, 8, 0, (2, "registers")),
        ("sm_90", 129, 96 * 1024, 8, 0, (1, "registers")),
        ("sm_90", 90, 96 * 1024, 8, 0, (2, "registers")),
        ("sm_90", 90, 128 * 1024, 8, 0, (1, "shared memory")),
        ("sm_90", 32, 113 * 1024, 8, 0, (2, "shared memory")),
        ("sm_90", 32, 114 * 1024, 8, 0, (1, "shared memory")),
        ("sm_90", 16, 1024, 8, 0, (8, "warps")),
        ("sm_80", 80, 48 * 1024, 4, 0, (3, "shared memory")),
        ("sm_100", 80, 32 * 1024, 4, 256, (2, "tensor memory")),
        ("gfx942", 128, 32 * 1024, 8, 0, (2, "registers")),
        ("gfx942", 130, 32 * 1024, 8, 0, (1, "registers")),
        ("gfx942", 64, 64 * 1024, 8, 0, (1, "shared memory")),
        ("gfx950", 32, 64 * 1024, 8, 0, (2, "shared memory")),
        ("gfx950", 32, 0, 8, 0, (4, "registers")),
    ],
)
def test_resident_ctas(
    target: str, registers: int, shared: int, warps: int, columns: int, expected: tuple[int, str]
) -> None:
    assert resident(TARGETS[target], registers, shared, warps, columns) == expected


@pytest.mark.parametrize(("n", "t"), [(1, 1), (128, 1), (129, 2), (1000, 8), (4096, 32)])
def test_a_symmetric_launch_computes_the_triangle_alone(n: int, t: int) -> None:
    work = symmetric(3, n, 256, 128, 64)
    assert work.tiles == 3 * t * (t + 1) // 2
    assert work.flops == work.tiles * 2 * 128 * 128 * 256


def test_work_and_bounds() -> None:
    work = symmetric(2, 1024, 100, 128, 64, has_c=True)
    assert work.flops == 2 * 36 * 2 * 128 * 128 * 128
    assert work.full_flops == 2 * 2 * 1024 * 1024 * 100
    assert work.bytes == 2 * 2 * (1024 * 100 + 2 * 1024 * 1024)
    whole = product(2, 200, 300, (128, 64), 64)
    assert whole.tiles == 2 * 2 * 5
    assert whole.flops == whole.tiles * 2 * 128 * 64 * 256
    assert whole.full_flops == 2 * 2 * 200 * 200 * 300
    assert whole.bytes == 2 * 2 * (200 * 200 + 2 * 200 * 300)


def test_bounds() -> None:
    target = TARGETS["sm_90"]
    assert target.multiprocessors == 132
    # Two matrices of 2080 tiles on 132 multiprocessors: the busiest computes 32 tiles.
    large = symmetric(2, 8192, 8192, 128, 64)
    tile = 2 * 128 * 128 * 8192
    assert large.bound(target) == (pytest.approx(32 * tile * 132 / target.peak), "arithmetic")
    # The fewer tiles than multiprocessors do not finish sooner for the idle ones.
    assert symmetric(1, 1024, 8192, 128, 64).bound(target)[0] == pytest.approx(tile * 132 / target.peak)
    small = symmetric(64, 128, 64, 128, 64)
    assert small.bound(target) == (small.bytes / target.bandwidth, "memory")


def test_tables_show_spills_and_kernels_that_do_not_compile() -> None:
    assert "| 12 |" in table.compiled([GOOD | {"spill_stores": 4, "spill_loads": 8}])
    assert "does not compile" in table.compiled([GOOD | {"error": "no"}])
    public = GOOD | {"repository": "a/b", "computes": "bA + cAA^T", "tile": "128x128x64 s3 w8", "kernel": "k"}
    rows = table.rivals([public | {"registers": 99, "spill_stores": 7}], [GOOD], "sm_90").splitlines()[2:]
    assert rows == [
        "| bA + cAA^T | b `k` | 99 / 96 / 2, spills 7 B |",
        "| bA + cAA^T | **distmuon, pointer** | 128 / 96 / 2 |",
    ]
