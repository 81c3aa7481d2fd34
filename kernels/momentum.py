"""Fused momentum: m <- mu m + g, Nesterov's look-ahead, the cast, and partial norms of what the cast leaves.

It must be compiled without fused multiply-add (``enable_fp_fusion=False``): then every element gets the bits of torch's
separate multiplications and additions, wherever shards begin and end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def momentum_step(
    momentum: tl.tensor,
    grad: tl.tensor,
    u: tl.tensor,
    partials: tl.tensor,
    mu: tl.tensor,
    length: tl.tensor,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block of elements.

    Args:
        momentum: [length] float32, updated in place.
        grad: [length] float32.
        u: [length] output, bfloat16, float16 or float32: mu m + g if NESTEROV else m, of the new m.
        partials: [blocks, 2] float32 output: largest |u| of the block and the sum of squares of u / 2^e, where 2^e is
            the largest power of two that is not above it.
        mu: decay, float32.
        length: number of elements.
        NESTEROV: whether u looks ahead.
        BLOCK: elements of a block.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    span = tl.arange(0, BLOCK)
    inside = span < length - start
    g = tl.load(grad + start + span, mask=inside, other=0.0)
    m = tl.load(momentum + start + span, mask=inside, other=0.0) * mu + g
    tl.store(momentum + start + span, m, mask=inside)
    rounded = (m * mu + g if NESTEROV else m).to(u.dtype.element_ty)
    tl.store(u + start + span, rounded, mask=inside)
    largest, squares = _scaled_squares(rounded.to(tl.float32))
    tl.store(partials + 2 * tl.program_id(0).to(tl.int64), largest)
    tl.store(partials + 2 * tl.program_id(0).to(tl.int64) + 1, squares)


@triton.jit
def _scaled_squares(values: tl.tensor) -> tl.tensor:
    """Largest |value| and the sum of (value / 2^e)^2; scaling all values by a power of two keeps the sum's bits."""
    # The bits of non-negative floats compare like integers, with NaN above infinity: a NaN is not lost.
    largest_bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    largest = largest_bits.to(tl.float32, bitcast=True)
    # Brings 2^e and 1 / 2^e well inside the normal range; exact but for values too small to count beside the largest.
    centre = tl.where(largest < 2.0**-62, 2.0**64, tl.where(largest > 2.0**62, 2.0**-64, 1.0))
    # 2^e >= 2^-126, the least normal number, which is 2^-62 here.
    power_bits = tl.maximum((largest * centre).to(tl.int32, bitcast=True) & 0x7F800000, 0x20800000)
    inverse = (0x7F000000 - power_bits).to(tl.float32, bitcast=True)
    # The sum over a block with an infinity or a NaN becomes NaN.
    scaled = values * centre * tl.where(largest < float("inf"), inverse, 0.0)
    return largest, tl.sum(scaled * scaled, axis=0)
