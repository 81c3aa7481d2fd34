"""Parameters and the matrices they consist of, as the planner sees them: names, shapes, kinds.

A parameter [A, B] is one matrix, [E, A, B] is E of them, and ``split`` cuts each into blocks of rows that are matrices
of their own: query, key and value of a fused projection, gate and up, single heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Literal

Kind = Literal["muon", "adamw"]


@dataclass(frozen=True)
class ParamSpec:
    """What the planner knows of one parameter: name, shape, which rule updates it, and the rows of its blocks."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    split: tuple[int, ...] = ()

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first row, rows) of each matrix within one [A, B] of a Muon parameter."""
        sizes = self.split or (self.shape[-2],)
        return list(zip(accumulate(sizes, initial=0), sizes, strict=False))


@dataclass(frozen=True)
class Matrix:
    """One matrix that Newton-Schulz runs on: a contiguous block of a parameter, and who computes it."""

    param: int
    start: int
    rows: int
    cols: int
    cost: float = 0.0
    """FLOPs of orthogonalizing it once."""
    holders: tuple[int, ...] = ()
    """Ranks with a piece of it, ascending."""
    slices: tuple[int, ...] = ()
    """For a team: how much of the long side each holder has; () where every holder computes the whole matrix."""
    work: tuple[float, ...] = ()
    """FLOPs that each holder spends on it."""
    rounds: int = 0
    """For a team: number of times that X X^T is summed over the holders."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """First element after the matrix, counted within the parameter."""
        return self.start + self.numel

    @property
    def short(self) -> int:
        """The smaller number of rows and columns."""
        return min(self.rows, self.cols)

    @property
    def long(self) -> int:
        """The larger number of rows and columns."""
        return max(self.rows, self.cols)

    @property
    def cut(self) -> bool:
        """Whether it crosses a shard edge and is completed by every rank that holds a piece."""
        return len(self.holders) > 1 and not self.slices

    @property
    def team(self) -> bool:
        """Whether its holders orthogonalize it together, each its slice of the long side."""
        return bool(self.slices)


def split_matrices(
    index: int, spec: ParamSpec, cost: Callable[[int, int], float] = lambda rows, cols: 0.0
) -> list[Matrix]:
    """List the matrices of a parameter.

    Args:
        index: position of the parameter in the plan.
        spec: the parameter.
        cost: FLOPs of orthogonalizing [rows, cols] once.

    Returns:
        Its matrices in the order of their elements; none for an elementwise or empty parameter.
    """
    if spec.kind != "muon" or spec.numel == 0:
        return []
    cols = spec.shape[-1]
    stacked = range(0, spec.numel, spec.shape[-2] * cols)
    blocks = [(first * cols, rows, cost(rows, cols)) for first, rows in spec.blocks]
    return [Matrix(index, start + first, rows, cols, flops) for start in stacked for first, rows, flops in blocks]


def even_parts(total: int, parts: int) -> list[int]:
    """Divide a number into parts that differ by at most one, larger ones first.

    Args:
        total: the number.
        parts: how many parts, at least 1.

    Returns:
        The parts.
    """
    small, more = divmod(total, parts)
    return [small + 1] * more + [small] * (parts - more)


def starts(lengths: Iterable[int]) -> list[int]:
    """Where consecutive ranges begin.

    Args:
        lengths: their lengths.

    Returns:
        The start of each, from 0.
    """
    return list(accumulate(lengths, initial=0))[:-1]
