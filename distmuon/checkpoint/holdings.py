"""Who holds which elements of which parameter: the optimizer's buckets seen parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from distmuon.bricks import Kind
from distmuon.bucket import BoundParam, Bucket
from distmuon.checkpoint.rows import Rows, row_width, share_rows
from distmuon.placement import Piece
from distmuon.reducer import BucketReduction


class HeldBy(NamedTuple):
    """A piece and the bucket that it lies in."""

    bucket: Bucket
    piece: Piece


@dataclass
class Holding:
    """A parameter, its pieces by rank of its group, and the rows that each of those ranks writes."""

    name: str
    param: BoundParam
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    rank: int
    """This rank within the group."""
    pieces: list[list[HeldBy]]
    rows: list[Rows] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.param.tensor.shape)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return row_width(self.shape)

    @property
    def sections(self) -> list[str]:
        """Kinds of optimizer state that the parameter has; each has a value for every element."""
        return sections(self.param.kind, self.param.tensor.dtype)


def sections(kind: Kind, dtype: torch.dtype) -> list[str]:
    """Kinds of optimizer state of a parameter.

    Args:
        kind: its update rule.
        dtype: its own; 16-bit parameters have master weights.

    Returns:
        Names under which it is stored.
    """
    found = ["first_moment"]
    if kind == "adamw":
        found.append("second_moment")
    return found if dtype == torch.float32 else [*found, "master"]


def list_holdings(reductions: Sequence[BucketReduction], names: Mapping[int, str]) -> list[Holding]:
    """Turn buckets into holdings.

    Args:
        reductions: the optimizer's.
        names: of the parameters, by ``id``.

    Returns:
        One holding a parameter, in an order that ranks which share parameters agree on.
    """
    found: dict[int, Holding] = {}
    for reduction in reductions:
        bucket, group = reduction.bucket, reduction.group
        for index in bucket.plan.params:
            param = bucket.params[index]
            if id(param.tensor) not in found:
                nobody: list[list[HeldBy]] = [[] for _ in group.ranks]
                name = names[id(param.tensor)]
                found[id(param.tensor)] = Holding(name, param, group.ranks, group.rank, nobody)
        for rank, pieces in enumerate(bucket.plan.pieces):
            for piece in pieces:
                found[id(bucket.params[piece.param].tensor)].pieces[rank].append(HeldBy(bucket, piece))
    for holding in found.values():
        holding.rows = share_rows(holding.shape, [[held.piece for held in of_rank] for of_rank in holding.pieces])
    return list(found.values())


def offset_in(section: str, bucket: Bucket, piece: Piece) -> int:
    """Where a piece of this rank starts in a tensor of state.

    Args:
        section: kind of state.
        bucket: the bucket of the piece.
        piece: of this rank.

    Returns:
        Elements before it; second moments are packed, since matrices have none.
    """
    if section != "second_moment":
        return piece.offset
    span = next(span for span in bucket.spans if span.offset <= piece.offset < span.offset + max(1, span.length))
    return span.second_moment_offset + piece.offset - span.offset
