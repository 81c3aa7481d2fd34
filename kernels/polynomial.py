"""Batched Y = aX + PX, the last product of a Newton-Schulz step.

Shapes: B matrices, M rows, N columns. All tensors are contiguous. One program per tile of Y.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(index: tl.tensor, tile_rows: tl.tensor, tile_columns: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Row and column of a tile: bands of GROUP rows, column by column, so that neighbours share operands in L2."""
    band = index // (GROUP * tile_columns)
    within = index % (GROUP * tile_columns)
    height = tl.minimum(tile_rows - band * GROUP, GROUP)
    return band * GROUP + within % height, within // height


@triton.jit
def add_product_pointer(
    x: tl.tensor,
    p: tl.tensor,
    y: tl.tensor,
    scalars: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    scalar_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Compute a tile of Y through pointers.

    Args:
        x: [B, M, N] float16, bfloat16 or float32.
        p: [B, M, M], same dtype.
        y: [B, M, N] output, same dtype; it must not overlap x, which other programs still read.
        scalars: float32 a, of one matrix or of all.
        m: M.
        n: N.
        scalar_stride: 1 if each matrix has its own scalar, else 0.
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of a tile.
        BLOCK_K: columns of P multiplied at a time.
        GROUP: tile rows of a band.
    """
    tile_rows, tile_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    count = tile_rows * tile_columns
    batch = (tl.program_id(0) // count).to(tl.int64)
    tile_row, tile_column = _tile(tl.program_id(0) % count, tile_rows, tile_columns, GROUP)
    row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
    span_m, span_n, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_n = (column + span_n < n)[None, :]
    p += (batch * m + row) * m
    p_offsets = tl.minimum(span_m, m - 1 - row)[:, None] * m + depth[None, :]
    x_offsets = depth[:, None] * n + span_n[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, m, BLOCK_K):
        p_tile = tl.load(p + p_offsets, mask=(depth < m - start)[None, :], other=0.0)
        corner = x + (batch * m + start) * n + column
        x_tile = tl.load(corner + x_offsets, mask=(depth < m - start)[:, None] & inside_n, other=0.0)
        product = tl.dot(p_tile, x_tile, product, input_precision="ieee")
        p += BLOCK_K
    inside = (row + span_m < m)[:, None] & inside_n
    offsets = span_m[:, None] * n + span_n[None, :]
    corner = (batch * m + row) * n + column
    x_tile = tl.load(x + corner + offsets, mask=inside, other=0.0)
    result = tl.load(scalars + batch * scalar_stride) * x_tile.to(tl.float32) + product
    tl.store(y + corner + offsets, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_product_descriptor(
    x: tl.tensor,
    p: tl.tensor,
    old: tl.tensor,
    y: tl.tensor,
    scalars: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    scalar_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Compute a tile of Y through tensor descriptors, whose hardware clips at the edges.

    Args:
        x: descriptor of [B, M, N] with boxes [1, BLOCK_K, BLOCK_N], the factor.
        p: descriptor of [B, M, M] with boxes [1, BLOCK_M, BLOCK_K].
        old: descriptor of X with boxes [1, BLOCK_M, BLOCK_N], the summand.
        y: descriptor of the output with boxes [1, BLOCK_M, BLOCK_N]; it must not overlap x.
        scalars: as in add_product_pointer, like all that follow.
        m: see there.
        n: see there.
        scalar_stride: see there.
        BLOCK_M: see there.
        BLOCK_N: see there.
        BLOCK_K: see there.
        GROUP: see there.
    """
    tile_rows, tile_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    count = tile_rows * tile_columns
    batch = tl.program_id(0) // count
    tile_row, tile_column = _tile(tl.program_id(0) % count, tile_rows, tile_columns, GROUP)
    row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, m, BLOCK_K):
        p_tile = p.load([batch, row, start]).reshape(BLOCK_M, BLOCK_K)
        x_tile = x.load([batch, start, column]).reshape(BLOCK_K, BLOCK_N)
        product = tl.dot(p_tile, x_tile, product, input_precision="ieee")
    old_tile = old.load([batch, row, column]).reshape(BLOCK_M, BLOCK_N)
    result = tl.load(scalars + batch.to(tl.int64) * scalar_stride) * old_tile.to(tl.float32) + product
    y.store([batch, row, column], result.to(y.dtype).reshape(1, BLOCK_M, BLOCK_N))
