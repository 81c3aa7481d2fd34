"""Which rank writes which rows of a parameter, and which elements move between ranks for that; no communication here.

A rank's shard holds flat runs of elements and slices of columns. A file holds rectangles, one of each parameter: all of
it, or consecutive rows; a row is an entry of the leading dimension, whatever the number of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distmuon.placement import Piece


class Rows(NamedTuple):
    """Consecutive rows of a parameter."""

    first: int
    stop: int


class Box(NamedTuple):
    """A rectangle of a parameter that covers a piece, and where the piece lies in it if it is not all of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    length: int


def share_rows(shape: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> list[Rows]:
    """Give every row to one of the ranks that hold elements of the parameter.

    Args:
        shape: of the parameter.
        pieces: the parameter's pieces by rank.

    Returns:
        Rows by rank; a row stays with the rank that has its first element if each rank has one run of them, otherwise
        the rows are shared out evenly in the order of the ranks' first elements.
    """
    count, width = row_count(shape), row_width(shape)
    nothing = Rows(0, 0)
    shares = [nothing] * len(pieces)
    holders = sorted((min(piece.start for piece in held), rank) for rank, held in enumerate(pieces) if held)
    runs = [_as_run(pieces[rank]) for _, rank in holders]
    ordered = all(run is not None for run in runs)
    for number, (_, rank) in enumerate(holders):
        run = runs[number]
        if len(holders) > 1 and ordered and run is not None:
            shares[rank] = Rows(-(-run[0] // width), -(-run[1] // width))
        else:
            shares[rank] = Rows(number * count // len(holders), (number + 1) * count // len(holders))
    return shares


def clip(piece: Piece, rows: Rows, width: int) -> Iterator[Piece]:
    """The part of a piece that lies in some rows.

    Args:
        piece: of a parameter.
        rows: of the same parameter.
        width: elements of a row.

    Yields:
        The part, if there is one; its ``offset`` counts as that of the piece does.
    """
    low, high = rows.first * width, rows.stop * width
    if not piece.width:
        start, end = max(piece.start, low), min(piece.end, high)
        if start < end:
            yield piece._replace(start=start, length=end - start, offset=piece.offset + start - piece.start)
        return
    # A slice of columns never leaves its matrix, whose rows are whole entries of the last dimension.
    lines = piece.length // piece.width
    first = max(0, -(-(low - piece.start) // piece.stride))
    last = min(lines, -(-(high - piece.start) // piece.stride))
    if first < last:
        yield piece._replace(
            start=piece.start + first * piece.stride,
            length=(last - first) * piece.width,
            offset=piece.offset + first * piece.width,
        )


def cover(shape: Sequence[int], piece: Piece) -> Box:
    """The least rectangle of whole rows, or the slice of columns, that has all elements of a piece.

    Args:
        shape: of the parameter.
        piece: of the parameter.

    Returns:
        The rectangle; ``start`` and ``length`` say which of its elements the piece consists of.
    """
    if not shape:
        return Box((), (), 0, 1)
    if piece.width:
        *leading, rows, columns = shape
        matrix, within = divmod(piece.start, rows * columns)
        row, column = divmod(within, columns)
        lines = piece.length // piece.width
        place = (matrix,) if leading else ()
        assert len(leading) <= 1, "slices of columns are cut from [A, B] and [E, A, B] only"
        return Box((*place, row, column), (*(1 for _ in leading), lines, piece.width), 0, piece.length)
    width = row_width(shape)
    first, stop = piece.start // width, -(-piece.end // width)
    rest = tuple(shape[1:])
    return Box((first, *(0 for _ in rest)), (stop - first, *rest), piece.start - first * width, piece.length)


def row_count(shape: Sequence[int]) -> int:
    """Number of rows; a scalar is one."""
    return shape[0] if shape else 1


def row_width(shape: Sequence[int]) -> int:
    """Elements of a row, at least 1 so that it can be divided by."""
    return max(1, math.prod(shape[1:]))


def _as_run(pieces: Sequence[Piece]) -> tuple[int, int] | None:
    """First element and end of pieces that together are one run of elements, otherwise None."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    if any(piece.width for piece in ordered):
        return None
    if any(before.end != after.start for before, after in zip(ordered, ordered[1:], strict=False)):
        return None
    return ordered[0].start, ordered[-1].end
