"""One bucket of the plan on one rank: its shard of the state and the moves between parameters and flat buffers.

No communication here. A *full* buffer has d equal shards, rank by rank; a *shard* is this rank's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.placement import Piece
from distmuon.plan import BucketPlan, Kind, Matrix


@dataclass(frozen=True)
class BoundParam:
    """A parameter with its name and the param group that holds its settings."""

    name: str
    tensor: Tensor
    kind: Kind
    group: int
    form: str


def form(tensor: Tensor) -> str:
    """What a parameter must keep while it is optimized: dtype, shape and device, e.g. "float32 (2, 3) on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


@dataclass
class Span:
    """Neighbouring elements of a shard that share one param group, hence one update rule."""

    group: int
    kind: Kind
    offset: int
    length: int
    second_moment_offset: int = 0

    @property
    def part(self) -> slice:
        """The elements within the shard."""
        return slice(self.offset, self.offset + self.length)

    @property
    def second_moment_part(self) -> slice:
        """The elements within the packed second moments."""
        return slice(self.second_moment_offset, self.second_moment_offset + self.length)


@dataclass(frozen=True)
class HeldPiece:
    """The part of one matrix that lies in this rank's shard."""

    matrix: Matrix
    group: int
    offset: int
    within: int
    length: int

    @property
    def part(self) -> slice:
        """The elements within the shard."""
        return slice(self.offset, self.offset + self.length)


class Bucket:
    """This rank's shard of a bucket."""

    def __init__(self, plan: BucketPlan, rank: int, params: Sequence[BoundParam]) -> None:
        self.plan = plan
        self.rank = rank
        self.params = params
        first = params[plan.params[0]].tensor
        self.dtype, self.device = first.dtype, first.device
        self.spans = self._spans()
        self.held = self._held()
        self._places = self._full_places()
        second = sum(span.length for span in self.spans if span.kind == "adamw")
        self.updates = 0
        self.first_moment = self._zeros(plan.shard_numel)
        self.second_moment = self._zeros(second)
        self.master = None if self.dtype == torch.float32 else self.pack_shard().float()

    @property
    def world(self) -> int:
        """Number of shards."""
        return len(self.plan.pieces)

    @property
    def own(self) -> slice:
        """This rank's shard within a full buffer."""
        return slice(self.rank * self.plan.shard_numel, (self.rank + 1) * self.plan.shard_numel)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of optimizer state, float32, this rank's shard."""
        state = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        return state if self.master is None else {**state, "master": self.master}

    def pack_grads(self, dtype: torch.dtype) -> Tensor:
        """Copy the gradients into a new full buffer; a missing gradient counts as zero.

        Args:
            dtype: dtype of the reduction.

        Returns:
            [d * shard] tensor.
        """
        full = torch.zeros(self.world * self.plan.shard_numel, dtype=dtype, device=self.device)
        for index in self.plan.params:
            self.accumulate_grad(index, full)
        return full

    def accumulate_grad(self, index: int, full: Tensor) -> None:
        """Add one parameter's gradient, if it has one, to a full buffer.

        Args:
            index: the parameter.
            full: [d * shard], added to in place.
        """
        grad = self.params[index].tensor.grad
        if grad is None:
            return
        flat = grad.detach().reshape(-1)
        for piece, part in self._places[index]:
            full[part].add_(flat[piece.start : piece.end])

    def grad_marks(self) -> dict[int, tuple[int, int] | None]:
        """For each parameter what changes when its gradient is written to or replaced; None without a gradient."""
        grads = {index: self.params[index].tensor.grad for index in self.plan.params}
        return {index: None if grad is None else (id(grad), grad._version) for index, grad in grads.items()}

    def pack_shard(self) -> Tensor:
        """Copy this rank's elements of the parameters into a new shard of the parameters' dtype."""
        shard = torch.zeros(self.plan.shard_numel, dtype=self.dtype, device=self.device)
        for piece in self.plan.pieces[self.rank]:
            flat = self.params[piece.param].tensor.detach().view(-1)
            shard[piece.offset : piece.offset + piece.length].copy_(flat[piece.start : piece.end])
        return shard

    def weights(self) -> Tensor:
        """Float32 weights of the shard, to be updated in place.

        Returns:
            For float32 parameters a copy of them, otherwise the master weights. Parameters are the truth: where one
            was written from outside since the last step, its master weight follows.
        """
        shard = self.pack_shard()
        if self.master is None:
            return shard
        written = shard != self.master.to(self.dtype)
        self.master.copy_(torch.where(written, shard.float(), self.master))
        return self.master

    def unpack(self, full: Tensor) -> None:
        """Write a full buffer of updated weights into the parameters.

        Args:
            full: [d * shard] in the parameters' dtype.
        """
        for index, places in self._places.items():
            flat = self.params[index].tensor.detach().view(-1)
            for piece, part in places:
                flat[piece.start : piece.end].copy_(full[part])

    def _full_places(self) -> dict[int, list[tuple[Piece, slice]]]:
        """For each parameter its pieces on all ranks and where they lie in a full buffer."""
        shard = self.plan.shard_numel
        places: dict[int, list[tuple[Piece, slice]]] = {}
        for rank, pieces in enumerate(self.plan.pieces):
            for piece in pieces:
                offset = rank * shard + piece.offset
                places.setdefault(piece.param, []).append((piece, slice(offset, offset + piece.length)))
        return places

    def _spans(self) -> list[Span]:
        spans: list[Span] = []
        second = 0
        for piece in self.plan.pieces[self.rank]:
            param = self.params[piece.param]
            if spans and spans[-1].group == param.group:
                spans[-1].length += piece.length
            else:
                spans.append(Span(param.group, param.kind, piece.offset, piece.length, second))
            second += piece.length if param.kind == "adamw" else 0
        return spans

    def _held(self) -> list[HeldPiece]:
        return [
            HeldPiece(matrix, self.params[matrix.param].group, *part)
            for matrix in self.plan.matrices
            if self.rank in matrix.holders
            for part in self.plan.parts(self.rank, matrix)
        ]

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=torch.float32, device=self.device)
