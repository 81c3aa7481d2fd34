"""Elements that travel between ranks before a save, so that every rank has whole rows to write.

With whole matrices on their owners these are the rows that a shard edge cuts, and little else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.bucket import Bucket, elements, within
from distmuon.checkpoint.holdings import Holding, offset_in
from distmuon.checkpoint.rows import Rows, clip
from distmuon.checkpoint.store import Part
from distmuon.checkpoint.together import together
from distmuon.comm import Group

# The state tensors of each bucket, copied at the moment of the save.
Copies = Mapping[int, Mapping[str, Tensor]]


class Rectangle(NamedTuple):
    """Rows of one state tensor that this rank writes, filled in as they arrive."""

    holding: Holding
    section: str
    values: Tensor


def copy_state(buckets: Sequence[Bucket]) -> dict[int, dict[str, Tensor]]:
    """Copy the state of buckets to the host.

    Args:
        buckets: this rank's.

    Returns:
        Copies of the state tensors by bucket ``id``.
    """
    return {
        id(bucket): {section: values.to("cpu", copy=True) for section, values in bucket.state().items()}
        for bucket in buckets
    }


def gather_rows(holdings: Sequence[Holding], copies: Copies, group: Group) -> dict[str, Part]:
    """Let every rank have the rows that it writes; every rank calls it.

    Args:
        holdings: this rank's parameters.
        copies: what ``copy_state`` returned.
        group: all ranks, for tensors of the host.

    Returns:
        The parts of this rank by the names they are stored under.
    """
    own, outgoing, counts = together(group, "make room for its rows", lambda: _prepare(holdings, copies, group))
    sent = [part.numel() for part in outgoing]
    arrived = outgoing
    if group.size > 1:
        arrived = list(torch.split(group.all_to_all(torch.cat(outgoing), sent, counts).wait(), counts))
    for rank, values in zip(group.ranks, arrived, strict=True):
        end = 0
        for place in _incoming(own, rank):
            place.copy_(values[end : end + place.numel()].view(place.shape))
            end += place.numel()
    return {f"{section}/{holding.name}": _part(holding, values) for holding, section, values in own}


def _prepare(
    holdings: Sequence[Holding], copies: Copies, group: Group
) -> tuple[list[Rectangle], list[Tensor], list[int]]:
    """Room for the rows that this rank writes, what it sends to each rank, and how much it gets from each."""
    own = [
        Rectangle(holding, section, torch.empty(_size(holding, holding.rows[holding.rank]), dtype=torch.float32))
        for holding in holdings
        for section in holding.sections
        if holding.rows[holding.rank].stop > holding.rows[holding.rank].first and holding.param.tensor.numel()
    ]
    parts = [_outgoing(holdings, copies, rank) for rank in group.ranks]
    outgoing = [torch.cat(of_rank) if of_rank else torch.empty(0) for of_rank in parts]
    return own, outgoing, [sum(place.numel() for place in _incoming(own, rank)) for rank in group.ranks]


def _outgoing(holdings: Sequence[Holding], copies: Copies, rank: int) -> list[Tensor]:
    """Elements of this rank that another one writes, in the order in which it expects them."""
    found: list[Tensor] = []
    for holding in holdings:
        if rank not in holding.ranks:
            continue
        rows = holding.rows[holding.ranks.index(rank)]
        for section in holding.sections:
            for bucket, piece in holding.pieces[holding.rank]:
                start = offset_in(section, bucket, piece)
                shard = copies[id(bucket)][section]
                for part in clip(piece, rows, holding.width):
                    found.append(within(shard, start + part.offset - piece.offset, part).reshape(-1))
    return found


def _incoming(own: Sequence[Rectangle], rank: int) -> Iterator[Tensor]:
    """Where elements of another rank go, in the order in which it sends them."""
    for holding, _, values in own:
        if rank not in holding.ranks:
            continue
        rows = holding.rows[holding.rank]
        for _, piece in holding.pieces[holding.ranks.index(rank)]:
            for part in clip(piece, rows, holding.width):
                yield elements(values.view(-1), part._replace(start=part.start - rows.first * holding.width))


def _size(holding: Holding, rows: Rows) -> tuple[int, ...]:
    return (rows.stop - rows.first, *holding.shape[1:]) if holding.shape else ()


def _part(holding: Holding, values: Tensor) -> Part:
    return Part(holding.shape, row_offsets(holding.shape, holding.rows[holding.rank].first), values)


def row_offsets(shape: Sequence[int], first: int) -> tuple[int, ...]:
    """Offsets of rows in each dimension.

    Args:
        shape: of the parameter.
        first: the first row.

    Returns:
        One offset a dimension.
    """
    return (first, *(0 for _ in shape[1:])) if shape else ()
