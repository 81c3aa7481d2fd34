"""Placement as data: which elements live on which rank, and who orthogonalizes which matrix.

Pure Python on shapes; no tensors, no process groups. ``make_plan`` is the one entry point, a ``Plan`` the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

from distmuon.errors import ConfigError
from distmuon.placement import Piece, Run, place_balanced, place_flat

Kind = Literal["muon", "adamw"]
Policy = Literal["balanced", "flat"]


@dataclass(frozen=True)
class ParamSpec:
    """What the planner knows of one parameter: name, shape and which rule updates it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def matrices(self) -> int:
        """Number of matrices stacked in a Muon parameter: E for [E, A, B], 1 for [A, B]."""
        return prod(self.shape[:-2])


@dataclass(frozen=True)
class Matrix:
    """One matrix that Newton-Schulz runs on: a contiguous block of a parameter and the ranks holding pieces of it."""

    param: int
    start: int
    rows: int
    cols: int
    holders: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def cost(self) -> int:
        """FLOPs of one quintic Newton-Schulz iteration: 4 n^2 m + 2 n^3 for n <= m."""
        short, long = sorted((self.rows, self.cols))
        return 4 * short * short * long + 2 * short**3

    @property
    def cut(self) -> bool:
        """Whether the matrix crosses a shard edge."""
        return len(self.holders) > 1


class Part(NamedTuple):
    """Neighbouring elements of a matrix: where they start in the shard and in the matrix, and how many they are."""

    offset: int
    within: int
    length: int


@dataclass(frozen=True)
class BucketPlan:
    """One reduce-scatter and one all-gather: per rank the pieces of its shard, in shard order."""

    shard_numel: int
    pieces: tuple[tuple[Piece, ...], ...]
    matrices: tuple[Matrix, ...]

    @cached_property
    def params(self) -> tuple[int, ...]:
        """Indices of the parameters with elements in this bucket, ascending."""
        return tuple(sorted({piece.param for rank in self.pieces for piece in rank}))

    def parts(self, rank: int, matrix: Matrix) -> list[Part]:
        """Where the elements of a matrix lie in a rank's shard.

        Args:
            rank: the rank.
            matrix: a matrix of this bucket.

        Returns:
            One part per piece of the shard that touches the matrix, in shard order.
        """
        found = []
        for piece in self._by_param[rank].get(matrix.param, ()):
            start, length = overlap(piece, matrix)
            if length:
                found.append(Part(piece.offset + start - piece.start, start - matrix.start, length))
        return found

    @cached_property
    def _by_param(self) -> list[dict[int, list[Piece]]]:
        """For each rank its pieces by parameter."""
        by_rank: list[dict[int, list[Piece]]] = []
        for pieces in self.pieces:
            by_param: dict[int, list[Piece]] = {}
            for piece in pieces:
                by_param.setdefault(piece.param, []).append(piece)
            by_rank.append(by_param)
        return by_rank


@dataclass(frozen=True)
class Plan:
    """Placement of a list of parameters over the ranks of one group."""

    policy: Policy
    world: int
    params: tuple[ParamSpec, ...]
    buckets: tuple[BucketPlan, ...] = field(repr=False)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix of every bucket."""
        return tuple(matrix for bucket in self.buckets for matrix in bucket.matrices)

    @property
    def numel(self) -> int:
        """Number of elements planned, without padding."""
        return sum(spec.numel for spec in self.params)

    @property
    def padding(self) -> int:
        """Elements added so that all shards of a bucket have one length."""
        return self.world * sum(bucket.shard_numel for bucket in self.buckets) - self.numel

    def shard_bytes(self, itemsize: int) -> int:
        """Ring-model bytes that one rank sends to reduce-scatter, or to all-gather, every bucket once.

        Args:
            itemsize: bytes per element on the wire.

        Returns:
            (d - 1) / d of the padded size, in bytes.
        """
        return (self.world - 1) * sum(bucket.shard_numel for bucket in self.buckets) * itemsize

    def completion_bytes(self, rank: int, itemsize: int) -> int:
        """Bytes that a rank sends to complete the matrices which cross a shard edge.

        Args:
            rank: the sending rank.
            itemsize: bytes per element on the wire.

        Returns:
            Bytes sent per step; 0 if no matrix is cut.
        """
        return itemsize * sum(
            (len(matrix.holders) - 1) * part.length
            for bucket in self.buckets
            for matrix in bucket.matrices
            if matrix.cut
            for part in bucket.parts(rank, matrix)
        )

    def newton_schulz_cost(self, rank: int) -> int:
        """FLOPs of one Newton-Schulz iteration over every matrix the rank holds a piece of.

        Args:
            rank: the rank.

        Returns:
            FLOPs of one iteration.
        """
        return sum(matrix.cost for matrix in self.matrices if rank in matrix.holders)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over parameters and placement; equal on all ranks or nothing works."""
        content: dict[str, Any] = {
            "policy": self.policy,
            "world": self.world,
            "params": [asdict(spec) for spec in self.params],
        }
        content["buckets"] = [[bucket.shard_numel, bucket.pieces] for bucket in self.buckets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def overlap(piece: Piece, matrix: Matrix) -> tuple[int, int]:
    """Part of a matrix that a piece holds.

    Args:
        piece: a run of one parameter's elements.
        matrix: a matrix of a parameter.

    Returns:
        (start within the parameter, number of elements); the number is 0 if they do not touch.
    """
    if piece.param != matrix.param:
        return 0, 0
    start = max(piece.start, matrix.start)
    return start, max(0, min(piece.end, matrix.start + matrix.numel) - start)


def make_plan(params: Sequence[ParamSpec], world: int, policy: Policy, bucket_numel: int) -> Plan:
    """Place parameters on ranks.

    Args:
        params: parameters in the order of the forward pass; buckets are formed from its end.
        world: number of ranks d, at least 1.
        policy: "flat" cuts the concatenated parameters into d equal shards; "balanced" keeps matrices whole, spreads
            their Newton-Schulz cost, and fills every shard to the same length with elementwise parameters.
        bucket_numel: elements after which a bucket is closed.

    Returns:
        The plan. Padding is less than d elements per bucket. ``balanced`` cuts a matrix only where its greedy placement
        finds no equal shards of whole ones, even with everything in one bucket.

    Raises:
        ConfigError: unknown policy, or no ranks.
    """
    if world < 1:
        raise ConfigError(f"world = {world} is not legal: a plan needs at least 1 rank.")
    if policy not in ("balanced", "flat"):
        raise ConfigError(f'policy = {policy!r} is not legal: use "balanced" or "flat".')
    runs = [_runs(index, spec) for index, spec in enumerate(params)]
    place = place_balanced if policy == "balanced" else place_flat
    buckets = tuple(
        _bucket(pieces, shard_numel, params) for pieces, shard_numel in place(runs[::-1], world, bucket_numel)
    )
    return Plan(policy=policy, world=world, params=tuple(params), buckets=buckets)


def split_matrices(index: int, spec: ParamSpec) -> list[Matrix]:
    """List the matrices of a parameter.

    Args:
        index: position of the parameter in the plan.
        spec: the parameter.

    Returns:
        E matrices for a Muon parameter [E, A, B], one for [A, B], none for an elementwise parameter.
    """
    if spec.kind != "muon" or spec.numel == 0:
        return []
    rows, cols = spec.shape[-2:]
    return [Matrix(index, number * rows * cols, rows, cols) for number in range(spec.matrices)]


def _runs(index: int, spec: ParamSpec) -> list[Run]:
    matrices = split_matrices(index, spec)
    if matrices:
        return [Run(index, matrix.start, matrix.numel, matrix.cost) for matrix in matrices]
    return [Run(index, 0, spec.numel, 0)] if spec.numel else []


def _bucket(pieces: list[list[Piece]], shard_numel: int, params: Sequence[ParamSpec]) -> BucketPlan:
    holders: dict[Matrix, list[int]] = {}
    by_param: dict[int, list[Matrix]] = {}
    for rank, shard in enumerate(pieces):
        for piece in shard:
            if piece.param not in by_param:
                by_param[piece.param] = split_matrices(piece.param, params[piece.param])
            for matrix in by_param[piece.param]:
                if overlap(piece, matrix)[1]:
                    ranks = holders.setdefault(matrix, [])
                    if not ranks or ranks[-1] != rank:
                        ranks.append(rank)
    found = sorted(holders.items(), key=lambda item: (item[0].param, item[0].start))
    matrices = tuple(replace(matrix, holders=tuple(ranks)) for matrix, ranks in found)
    return BucketPlan(shard_numel, tuple(tuple(shard) for shard in pieces), matrices)
