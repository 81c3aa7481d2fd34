"""How many programs are launched, and which tile of the lower triangle each of them takes."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from distmuon.kernels import triton_ops
from distmuon.kernels.syrk import lower_tile
from distmuon.kernels.tuning import Config
from tests.interpreted.checks import BRAIN, SINGLE, matrices
from tests.interpreted.interpreter import Launch, launches
from tests.interpreted.launchers import CONFIG, DESCRIPTOR, KERNELS, TINY, launchers

ONE = torch.tensor([1.0, 0.0, 0.0])


def symmetric_programs(launch: Launch, batch: int, rows: int) -> int:
    tiles = math.ceil(rows / launch.arguments["BLOCK_M"])
    return batch * tiles * (tiles + 1) // 2


@pytest.mark.parametrize("variant", KERNELS)
@pytest.mark.parametrize(
    ("rows", "batch", "config"),
    [(8, 0, CONFIG), (8, 3, CONFIG), (64, 1, CONFIG), (72, 3, CONFIG), (136, 1, CONFIG), (72, 2, TINY)],
    ids=str,
)
def test_only_the_lower_triangle_of_tiles_is_launched(rows: int, batch: int, config: Config, variant: str) -> None:
    x = matrices(batch, rows, 8, BRAIN)
    for name in ("symmetric_product", "symmetric_product_norm"):
        with launches() as found:
            getattr(launchers(variant, config), name)(x, x, None, ONE)
        assert len(found) == (batch > 0)
        for kernel in found:
            assert kernel.arguments["BLOCK_M"] == config.block_m
            assert kernel.programs == symmetric_programs(kernel, batch, rows)


@pytest.mark.parametrize("rows", [1, 127, 257])
def test_the_configuration_chosen_here_launches_the_lower_triangle_too(rows: int) -> None:
    x = matrices(2, rows, 3, SINGLE)
    with launches() as found:
        triton_ops.symmetric_product(x, x, None, ONE)
    assert found[0].programs == symmetric_programs(found[0], 2, rows)


@pytest.mark.parametrize("variant", KERNELS)
def test_one_program_for_every_tile_of_a_product(variant: str) -> None:
    x, p = matrices(3, 72, 136, BRAIN), matrices(3, 72, 72, BRAIN)
    with launches() as found:
        launchers(variant).add_product(x, p, ONE[:1])
        launchers(variant).add_product(x[:0], p[:0], ONE[:1])
    assert [kernel.programs for kernel in found] == [3 * 2 * 3]


def test_one_program_for_every_row_of_partial_norms() -> None:
    with launches() as found:
        _, partials = triton_ops.momentum_cast(torch.zeros(30000), torch.zeros(30000), 0.9, True, BRAIN)
    assert [kernel.programs for kernel in found] == [partials.shape[0]]
    assert partials.shape[0] > 1


@triton.jit
def tiles_of(rows, columns, count, tiles, N: tl.constexpr, GROUP: tl.constexpr):
    index = tl.arange(0, N)
    row, column = lower_tile(index, tiles, GROUP)
    tl.store(rows + index, row, mask=index < count)
    tl.store(columns + index, column, mask=index < count)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tiles", [*range(1, 20), 31, 32, 33, 100])
def test_every_tile_of_the_lower_triangle_once(tiles: int, group: int) -> None:
    count = tiles * (tiles + 1) // 2
    rows, columns = torch.full((2, count), -1, dtype=torch.int32).unbind()
    tiles_of[(1,)](rows, columns, count, tiles, triton.next_power_of_2(count), group)
    expected = {(row, column) for row in range(tiles) for column in range(row + 1)}
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_descriptors_take_what_is_aligned_and_pointers_the_rest() -> None:
    taken = {}
    for columns in (8, 9):
        x = matrices(1, 16, columns, BRAIN)
        with launches() as found:
            triton_ops.symmetric_product(x, x, None, ONE)
        taken[columns] = found[0].name
    assert taken == {8: "symmetric_descriptor", 9: "symmetric_pointer"}


@pytest.mark.parametrize(("dtype", "rows", "columns"), [(BRAIN, 8, 4), (BRAIN, 4, 8), (SINGLE, 8, 6), (SINGLE, 6, 8)])
def test_descriptors_refuse_rows_off_16_bytes(dtype: torch.dtype, rows: int, columns: int) -> None:
    x = matrices(1, rows, columns, dtype)
    with pytest.raises(ValueError, match="16 bytes"):
        launchers(DESCRIPTOR).symmetric_product(x, x, None, ONE)
