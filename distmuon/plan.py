"""A plan: which elements live on which rank, who orthogonalizes which matrix, and the bytes and FLOPs that follow.

Data only; ``distmuon.planner.make_plan`` makes it, the optimizer's step carries it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from distmuon.bricks import Matrix, ParamSpec, even_parts
from distmuon.placement import Piece

Policy = Literal["balanced", "flat", "team"]
Transport = Literal["scatter", "owner"]

STATE_ITEMSIZE = 4


class Part(NamedTuple):
    """Neighbouring elements of a matrix: where they start in the shard and in the matrix, and how many they are."""

    offset: int
    within: int
    length: int


@dataclass(frozen=True)
class BucketPlan:
    """What is reduced, and later gathered, at once: per rank the pieces of its shard, in shard order."""

    lengths: tuple[int, ...]
    """Elements of every rank's shard, padding included."""
    pieces: tuple[tuple[Piece, ...], ...]
    matrices: tuple[Matrix, ...]

    @cached_property
    def numel(self) -> int:
        """Elements of all shards, padding included."""
        return sum(self.lengths)

    @cached_property
    def even(self) -> bool:
        """Whether all shards are equally long."""
        return len(set(self.lengths)) == 1

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Where each shard starts in a buffer of all of them, and where the last one ends."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def cut(self) -> tuple[Matrix, ...]:
        """Matrices that cross a shard edge and are completed by their holders."""
        return tuple(matrix for matrix in self.matrices if matrix.cut)

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
            One part per piece of the shard that touches the matrix, in shard order; a team's slice counts from 0.
        """
        found = []
        for piece in self._by_param[rank].get(matrix.param, ()):
            if matrix.team:
                if matrix.start <= piece.start < matrix.end:
                    found.append(Part(piece.offset, 0, piece.length))
                continue
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
    transport: Transport
    """"scatter": equal shards, one reduce-scatter and one all-gather a bucket. "owner": shards of any length, reduced
    to and broadcast from their owners, which moves as much."""
    world: int
    bucket_numel: int
    params: tuple[ParamSpec, ...]
    buckets: tuple[BucketPlan, ...] = field(repr=False)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix of every bucket; one that lies in several buckets counts in each."""
        return tuple(matrix for bucket in self.buckets for matrix in bucket.matrices)

    @cached_property
    def numel(self) -> int:
        """Number of elements planned, without padding."""
        return sum(spec.numel for spec in self.params)

    @property
    def padding(self) -> int:
        """Elements added so that all shards of a bucket have one length."""
        return sum(bucket.numel for bucket in self.buckets) - self.numel

    def shard_numel(self, rank: int) -> int:
        """Elements that a rank holds, padding included.

        Args:
            rank: the rank.
        """
        return sum(bucket.lengths[rank] for bucket in self.buckets)

    def shard_bytes(self, itemsize: int) -> int:
        """Ring-model bytes that one rank sends to reduce, or to gather, every bucket once.

        Args:
            itemsize: bytes per element on the wire.

        Returns:
            (d - 1) / d of the padded size, in bytes.
        """
        return sum(ring_bytes(bucket.numel * itemsize, self.world) for bucket in self.buckets)

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
            for bucket, matrix in self._computed_by(rank)
            if matrix.cut
            for part in bucket.parts(rank, matrix)
        )

    def team_bytes(self, rank: int, itemsize: int) -> int:
        """Bytes that a rank sends to sum X X^T of its slices with its teams.

        Args:
            rank: the sending rank.
            itemsize: bytes per element of the Newton-Schulz dtype.

        Returns:
            Bytes sent per step, the agreement on a scale included; 0 without teams.
        """
        sent = 0
        for _, matrix in self._computed_by(rank):
            if matrix.team:
                own = even_parts(matrix.short**2, len(matrix.holders))[matrix.holders.index(rank)]
                sent += matrix.rounds * itemsize * (matrix.short**2 - own + own * (len(matrix.holders) - 1))
        for bucket in self.buckets:
            teams = sum(matrix.team for matrix in bucket.matrices)
            sent += ring_bytes(2 * STATE_ITEMSIZE * teams, self.world)
        return sent

    def newton_schulz_flops(self, rank: int) -> float:
        """FLOPs that a rank spends on Newton-Schulz in a step.

        Args:
            rank: the rank.

        Returns:
            FLOPs, two per multiply-add.
        """
        return sum(matrix.work[matrix.holders.index(rank)] for _, matrix in self._computed_by(rank))

    @cached_property
    def busiest_over_mean(self) -> float:
        """Newton-Schulz FLOPs of the busiest rank over the mean; 1 without matrices."""
        flops = [self.newton_schulz_flops(rank) for rank in range(self.world)]
        return max(flops) * self.world / sum(flops) if any(flops) else 1.0

    @cached_property
    def flops_once(self) -> float:
        """FLOPs of orthogonalizing every matrix of the model once, on one rank."""
        costs = {(matrix.param, matrix.start): matrix.cost for matrix in self.matrices}
        return sum(costs.values())

    def state_bytes(self, rank: int, itemsize: int) -> int:
        """Bytes of optimizer state on a rank.

        Args:
            rank: the rank.
            itemsize: bytes per element of the parameters; below 4 they have float32 master weights.

        Returns:
            Bytes of first moments, of second moments of elementwise parameters, and of master weights.
        """
        held = self.shard_numel(rank) * (2 if itemsize < STATE_ITEMSIZE else 1)
        pieces = (piece for bucket in self.buckets for piece in bucket.pieces[rank])
        return STATE_ITEMSIZE * (held + sum(p.length for p in pieces if self.params[p.param].kind == "adamw"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over parameters and placement; equal on all ranks or nothing works."""
        content: dict[str, Any] = {
            "policy": self.policy,
            "transport": self.transport,
            "world": self.world,
            "params": [asdict(spec) for spec in self.params],
        }
        content["buckets"] = [[bucket.lengths, bucket.pieces] for bucket in self.buckets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _computed_by(self, rank: int) -> Iterator[tuple[BucketPlan, Matrix]]:
        """The matrices that a rank has a piece of, with their buckets."""
        yield from self._by_rank.get(rank, ())

    @cached_property
    def _by_rank(self) -> dict[int, list[tuple[BucketPlan, Matrix]]]:
        by_rank: dict[int, list[tuple[BucketPlan, Matrix]]] = {}
        for bucket in self.buckets:
            for matrix in bucket.matrices:
                for rank in matrix.holders:
                    by_rank.setdefault(rank, []).append((bucket, matrix))
        return by_rank


def ring_bytes(payload: int, world: int) -> int:
    """Bytes that each rank of a ring sends to reduce-scatter or all-gather a payload.

    Args:
        payload: bytes of the full buffer.
        world: number of ranks.

    Returns:
        (d - 1) / d of the payload, rounded down.
    """
    return payload * (world - 1) // world


def overlap(piece: Piece, matrix: Matrix) -> tuple[int, int]:
    """Part of a matrix that a consecutive piece holds.

    Args:
        piece: elements of one parameter.
        matrix: a matrix of a parameter.

    Returns:
        (start within the parameter, number of elements); the number is 0 if they do not touch.
    """
    if piece.param != matrix.param:
        return 0, 0
    start = max(piece.start, matrix.start)
    return start, max(0, min(piece.end, matrix.end) - start)
