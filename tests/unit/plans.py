"""What tests of plans share: random models, published shapes, and where a plan puts every element."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from hypothesis import settings
from hypothesis import strategies as st

from distmuon.bricks import Kind, Matrix, ParamSpec
from distmuon.placement import Piece
from distmuon.plan import BucketPlan, Plan

HYPOTHESIS = settings(derandomize=True, database=None, deadline=None, max_examples=50)
WAYS = [("flat", "auto"), ("balanced", "scatter"), ("balanced", "owner"), ("balanced", "auto"), ("team", "auto")]
"""Every policy with every transport that goes with it."""

_side = st.integers(0, 6)
_split = st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple)


def _spec(shape: tuple[int, ...], kind: Kind, split: tuple[int, ...] = ()) -> ParamSpec:
    return ParamSpec("w", shape, kind, split)


_elementwise = st.lists(st.integers(0, 9), max_size=2).map(lambda shape: _spec(tuple(shape), "adamw"))
_matrix = st.one_of(st.tuples(_side, _side), st.tuples(_side, _side, _side)).map(lambda shape: _spec(shape, "muon"))
_fused = st.builds(
    lambda split, cols, stack: _spec((*stack, sum(split), cols), "muon", split),
    *(_split, st.integers(1, 7), st.sampled_from([(), (1,), (3,)])),
)
_long = st.sampled_from([(3, 20), (21, 4), (9, 9), (2, 3, 17)]).map(lambda shape: _spec(shape, "muon"))
models = st.lists(st.one_of(_elementwise, _matrix, _fused, _long), max_size=8).map(
    lambda specs: [ParamSpec(f"p{i}", s.shape, s.kind, s.split) for i, s in enumerate(specs)]
)
worlds, bucket_sizes, ways = st.integers(1, 9), st.integers(1, 250), st.sampled_from(WAYS)


def specs(shapes: Sequence[tuple[tuple[int, ...], Kind]]) -> list[ParamSpec]:
    """Parameters named by their position."""
    return [ParamSpec(f"p{i}", shape, kind) for i, (shape, kind) in enumerate(shapes)]


def elements(piece: Piece) -> list[int]:
    """Every element of a piece in the order of the shard, counted within its parameter."""
    width, stride = (piece.width, piece.stride) if piece.width else (piece.length, 0)
    return [piece.start + i // width * stride + i % width for i in range(piece.length)]


def held(bucket: BucketPlan, rank: int, matrix: Matrix) -> list[int]:
    """Elements of a matrix in a rank's shard, in its order, counted within the matrix."""
    mine = [i for p in bucket.pieces[rank] if p.param == matrix.param for i in elements(p)]
    return [i - matrix.start for i in mine if matrix.start <= i < matrix.start + matrix.rows * matrix.cols]


def blocks_of_rows(spec: ParamSpec) -> Iterator[tuple[int, int, int]]:
    """(first element, rows, columns) of every matrix of a parameter."""
    if spec.kind == "muon" and 0 not in spec.shape:
        *stack, rows, cols = spec.shape
        start = 0
        for size in (spec.split or (rows,)) * (stack[0] if stack else 1):
            yield start, size, cols
            start += size * cols


def flops_by_rank(plan: Plan) -> list[float]:
    """Newton-Schulz FLOPs of every rank."""
    return [plan.newton_schulz_flops(rank) for rank in range(plan.world)]


def spread(plan: Plan) -> float:
    """Newton-Schulz FLOPs of the busiest rank over their mean."""
    found = flops_by_rank(plan)
    return max(found) * plan.world / sum(found)


def products(short: int, long: int, segments: Sequence[int]) -> int:
    """FLOPs of Newton-Schulz, product by product: (rows, inner, columns) of each."""
    wide, square = (short, long, short), (short, short, short)
    back = (short, short, long)
    counted: Counter[tuple[int, int, int]] = Counter()
    for steps in segments:
        # R = XX^T; R^2 of each step; between two steps R <- WRW in two products and Q <- WQ in one; X <- QX.
        counted.update([wide, *[square] * steps, *[square] * 3 * (steps - 1), back])
    return sum(2 * rows * inner * cols * number for (rows, inner, cols), number in counted.items())


def costs(model: Sequence[ParamSpec], segments: Sequence[int]) -> list[int]:
    """FLOPs of Newton-Schulz of every matrix of a model."""
    blocks = [block for spec in model for block in blocks_of_rows(spec)]
    return [products(min(rows, cols), max(rows, cols), segments) for _, rows, cols in blocks]


def plain_blocks(layers: int, width: int = 128, vocabulary: int = 512) -> list[ParamSpec]:
    """A GPT with a fused projection: qkv, o, up and down a block, between an embedding and a head."""
    block: list[tuple[tuple[int, ...], Kind]] = [((3 * width, width), "muon"), ((width, width), "muon")]
    block += [((4 * width, width), "muon"), ((width, 4 * width), "muon")]
    table: tuple[tuple[int, ...], Kind] = ((vocabulary, width), "adamw")
    return specs([table, *block * layers, table])


def llama3_8b() -> list[ParamSpec]:
    """Llama 3 8B."""
    return specs([*_decoder(32, 4096, 4096, 1024, [(14336, 4096), (14336, 4096), (4096, 14336)], 128_256)])


def qwen3_30b() -> list[ParamSpec]:
    """Qwen3-30B-A3B with each expert a parameter of its own."""
    expert = [(768, 2048), (768, 2048), (2048, 768)]
    return specs([*_decoder(48, 2048, 4096, 512, [(128, 2048), *expert * 128], 151_936)])


def one_trillion() -> list[ParamSpec]:
    """60 layers of 384 experts with three matrices each, as one parameter a layer and matrix."""
    stacks = [(384, 2048, 7168), (384, 2048, 7168), (384, 7168, 2048)]
    return specs([*_decoder(60, 7168, 8192, 1024, [(384, 7168), *stacks], 163_840)])


def _decoder(
    layers: int, width: int, queries: int, keys: int, mlp: Sequence[tuple[int, ...]], vocabulary: int
) -> Iterator[tuple[tuple[int, ...], Kind]]:
    attention = [(queries, width), (keys, width), (keys, width), (width, queries)]
    yield (vocabulary, width), "adamw"
    for _ in range(layers):
        yield (width,), "adamw"
        yield from zip(attention, itertools.repeat("muon"))
        yield (width,), "adamw"
        yield from zip(mlp, itertools.repeat("muon"))
    yield (width,), "adamw"
    yield (vocabulary, width), "adamw"
