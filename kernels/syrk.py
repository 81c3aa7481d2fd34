"""Batched symmetric product Y = alpha A B^T + beta C + gamma I that computes the lower triangle of tiles only.

Shapes: B matrices, M rows, K the side that the product sums over. All tensors are contiguous. The grid has
B * t(t + 1)/2 programs, t = ceil(M / BLOCK_M).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(index: tl.tensor, tiles: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Map a number to a tile of the lower triangle, in integers alone, so exactly for any number of tiles.

    Bands of GROUP rows are walked column by column, so that programs running together share their operands in the L2
    cache. A tall band is paired with a short one: all pairs have one length, so that a division finds the band.

    Args:
        index: number below tiles(tiles + 1)/2.
        tiles: tile rows of the matrix.
        GROUP: rows of a band.

    Returns:
        (row, column) of the tile, column <= row.
    """
    rest = tiles % GROUP
    bands = tiles // GROUP
    top = rest * (rest + 1) // 2
    in_top = index < top
    past_top = tl.maximum(index - top, 0)
    pair_size = GROUP * (2 * rest + (bands - 1) * GROUP + GROUP + 1)
    pair = past_top // pair_size
    within = past_top % pair_size
    tall = bands - 1 - pair
    tall_size = GROUP * (rest + tall * GROUP) + GROUP * (GROUP + 1) // 2
    in_tall = within < tall_size
    first = tl.where(in_top, 0, rest + tl.where(in_tall, tall, pair) * GROUP)
    within = tl.where(in_top, index, tl.where(in_tall, within, within - tall_size))
    height = tl.where(in_top, rest, GROUP)
    # A band is a rectangle, left of its own diagonal block, and that block's triangle: rows paired in the same way.
    left = first * height
    corner = tl.maximum(within - left, 0)
    pair = corner // (height + 1)
    corner = corner % (height + 1)
    in_long = corner < height - pair
    corner_row = first + tl.where(in_long, height - 1 - pair, pair)
    corner_column = first + tl.where(in_long, corner, corner - (height - pair))
    in_left = within < left
    row = tl.where(in_left, first + within % height, corner_row)
    column = tl.where(in_left, within // height, corner_column)
    return row, column


@triton.jit
def _place(m: tl.tensor, BLOCK_M: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """This program's matrix, the number of its tile, and the tile's first row and column."""
    tiles = tl.cdiv(m, BLOCK_M)
    count = tiles * (tiles + 1) // 2
    tile = tl.program_id(0) % count
    tile_row, tile_column = lower_tile(tile, tiles, GROUP)
    return tl.program_id(0) // count, tile, tile_row * BLOCK_M, tile_column * BLOCK_M


@triton.jit
def _combine(product: tl.tensor, old: tl.tensor, scalars: tl.tensor) -> tl.tensor:
    """alpha product + beta old, in float32."""
    result = tl.load(scalars) * product
    if old is not None:
        result += tl.load(scalars + 1) * old.to(tl.float32)
    return result


@triton.jit
def _lower_half(result: tl.tensor, gammas: tl.tensor) -> tl.tensor:
    """A diagonal tile with gammas added on its diagonal and zeros above it, and the diagonal's sum of squares."""
    span = tl.arange(0, result.shape[0])
    diagonal = tl.where(span[:, None] == span[None, :], result + gammas[:, None], 0.0)
    return tl.where(span[:, None] > span[None, :], result, diagonal), tl.sum(diagonal * diagonal)


@triton.jit
def _mirror(lower: tl.tensor) -> tl.tensor:
    """Fill the zeros above a tile's diagonal with the mirror image of what is below."""
    width: tl.constexpr = lower.dtype.primitive_bitwidth
    # Or of the bits takes half the registers of a select, and leaves the diagonal, equal on both sides, as it is.
    bits = lower.to(tl.int16 if width == 16 else tl.int32, bitcast=True)
    return (bits | tl.trans(bits)).to(lower.dtype, bitcast=True)


@triton.jit
def _pointer_product(
    a: tl.tensor,
    b: tl.tensor,
    batch: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A tile of A B^T. Rows of A past the end count as zeros; what those of B give is not to be used."""
    span, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside_row = (row + span < m)[:, None]
    a += (batch * m + row) * k
    b += (batch * m + column) * k
    a_offsets = span[:, None] * k + depth[None, :]
    b_offsets = tl.minimum(span, m - 1 - column)[:, None] * k + depth[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        # Columns are masked: clamping the contiguous axis would make its loads scalar.
        inside = (depth < k - start)[None, :]
        a_tile = tl.load(a + a_offsets, mask=inside_row & inside, other=0.0)
        b_tile = tl.load(b + b_offsets, mask=inside, other=0.0)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    return product


@triton.jit
def symmetric_pointer(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    sum_stride: tl.tensor,
    scalars: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    scalar_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Compute a tile of Y and its mirror image through pointers.

    Args:
        a: [B, M, K] float16, bfloat16 or float32.
        b: [B, M, K], same dtype; A B^T is symmetric.
        c: [B, M, M] symmetric, same dtype, or None.
        y: [B, M, M] output, same dtype, exactly symmetric.
        sums: [B, at least t(t + 1)/2] float32 output: each tile's share of the sum of squares before rounding; or None.
        sum_stride: columns of sums.
        scalars: float32 (alpha, beta, gamma), of one matrix or of all.
        m: M.
        k: K.
        scalar_stride: 3 if each matrix has its own scalars, else 0.
        BLOCK_M: rows and columns of a tile.
        BLOCK_K: columns of A and B multiplied at a time.
        GROUP: tile rows of a band, see lower_tile.
    """
    batch, tile, row, column = _place(m, BLOCK_M, GROUP)
    batch = batch.to(tl.int64)
    product = _pointer_product(a, b, batch, row, column, m, k, BLOCK_M, BLOCK_K)
    span = tl.arange(0, BLOCK_M)
    inside_row, inside_column = row + span < m, column + span < m
    offsets = span[:, None] * m + span[None, :]
    inside = inside_row[:, None] & inside_column[None, :]
    lower = (batch * m + row) * m + column
    old = None
    if c is not None:
        old = tl.load(c + lower + offsets, mask=inside, other=0.0)
    scalars += batch * scalar_stride
    result = _combine(product, old, scalars)
    # Two separate endings: a shared one would hold the registers of both.
    if row == column:
        result, on_diagonal = _lower_half(result, tl.where(inside_row, tl.load(scalars + 2), 0.0))
        if sums is not None:
            tl.store(sums + batch * sum_stride + tile, 2.0 * tl.sum(result * result) - on_diagonal)
        tl.store(y + lower + offsets, _mirror(result.to(y.dtype.element_ty)), mask=inside)
    else:
        if sums is not None:
            tl.store(sums + batch * sum_stride + tile, 2.0 * tl.sum(result * result))
        rounded = result.to(y.dtype.element_ty)
        tl.store(y + lower + offsets, rounded, mask=inside)
        upper = (batch * m + column) * m + row
        tl.store(y + upper + offsets, tl.trans(rounded), mask=inside_column[:, None] & inside_row[None, :])


@triton.jit
def symmetric_descriptor(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    sum_stride: tl.tensor,
    scalars: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    scalar_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Compute a tile of Y and its mirror image through tensor descriptors, whose hardware clips at the edges.

    Args:
        a: descriptor of [B, M, K] with boxes [1, BLOCK_M, BLOCK_K].
        b: the same of B.
        c: descriptor of [B, M, M] with boxes [1, BLOCK_M, BLOCK_M], or None.
        y: the same of the output.
        sums: as in symmetric_pointer, like all that follow.
        sum_stride: see there.
        scalars: see there.
        m: see there.
        k: see there.
        scalar_stride: see there.
        BLOCK_M: see there.
        BLOCK_K: see there.
        GROUP: see there.
    """
    batch, tile, row, column = _place(m, BLOCK_M, GROUP)
    product = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a_tile = a.load([batch, row, start]).reshape(BLOCK_M, BLOCK_K)
        b_tile = b.load([batch, column, start]).reshape(BLOCK_M, BLOCK_K)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision="ieee")
    old = None
    if c is not None:
        old = c.load([batch, row, column]).reshape(BLOCK_M, BLOCK_M)
    scalars += batch.to(tl.int64) * scalar_stride
    result = _combine(product, old, scalars)
    if row == column:
        inside_row = row + tl.arange(0, BLOCK_M) < m
        result, on_diagonal = _lower_half(result, tl.where(inside_row, tl.load(scalars + 2), 0.0))
        if sums is not None:
            tl.store(sums + batch.to(tl.int64) * sum_stride + tile, 2.0 * tl.sum(result * result) - on_diagonal)
        rounded = _mirror(result.to(y.dtype))
        y.store([batch, row, column], rounded.reshape(1, BLOCK_M, BLOCK_M))
    else:
        if sums is not None:
            tl.store(sums + batch.to(tl.int64) * sum_stride + tile, 2.0 * tl.sum(result * result))
        rounded = result.to(y.dtype)
        y.store([batch, row, column], rounded.reshape(1, BLOCK_M, BLOCK_M))
        y.store([batch, column, row], tl.trans(rounded).reshape(1, BLOCK_M, BLOCK_M))
