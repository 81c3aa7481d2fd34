"""One bucket of the plan on one rank: its shard of the state and the moves between parameters and flat buffers.

No communication here. A *full* buffer has the shards of all ranks, rank by rank; a *shard* is this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.bricks import Kind, Matrix
from distmuon.placement import Piece
from distmuon.plan import BucketPlan

# Larger buffers are few, and cost too much when they lie idle.
_KEPT_BYTES = 2**26


@dataclass(frozen=True)
class BoundParam:
    """A parameter with its name and the param group that holds its settings."""

    name: str
    tensor: Tensor
    kind: Kind
    group: int
    form: str
    split: tuple[int, ...] = ()


def form(tensor: Tensor) -> str:
    """What a parameter must keep while it is optimized: dtype, shape and device, e.g. "float32 (2, 3) on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def elements(flat: Tensor, piece: Piece) -> Tensor:
    """The elements of a parameter that a piece consists of.

    Args:
        flat: all elements of the parameter, 1-D.
        piece: the piece.

    Returns:
        View of ``flat``: [length], or [rows, width] for a slice of columns.
    """
    if not piece.width:
        return flat[piece.start : piece.end]
    shape, strides = (piece.length // piece.width, piece.width), (piece.stride, 1)
    return flat.as_strided(shape, strides, flat.storage_offset() + piece.start)


def within(buffer: Tensor, offset: int, piece: Piece) -> Tensor:
    """The elements of a buffer that a piece occupies, in the shape of ``elements``.

    Args:
        buffer: a shard or a full buffer.
        offset: where the piece starts there.
        piece: the piece.

    Returns:
        View of ``buffer``.
    """
    part = buffer[offset : offset + piece.length]
    return part.view(-1, piece.width) if piece.width else part


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
        self.tensor_ids = {id(params[index].tensor) for index in plan.params}
        self.spans = self._spans()
        self.held = self._held()
        self._places = self._full_places()
        placed = sum(piece.length for places in self._places.values() for piece, _ in places)
        self._padded = placed < plan.numel
        second = sum(span.length for span in self.spans if span.kind == "adamw")
        # Steps so far by param group: groups added later have had fewer.
        self.updates = {params[index].group: 0 for index in plan.params}
        self._kept: dict[torch.dtype, Tensor] = {}
        self.first_moment = self._zeros(plan.lengths[rank])
        self.second_moment = self._zeros(second)
        self.master = None if self.dtype == torch.float32 else self.pack_shard().float()

    @property
    def world(self) -> int:
        """Number of shards."""
        return len(self.plan.lengths)

    @property
    def own(self) -> slice:
        """This rank's shard within a full buffer."""
        return slice(self.plan.edges[self.rank], self.plan.edges[self.rank + 1])

    def state(self) -> dict[str, Tensor]:
        """Every tensor of optimizer state, float32, this rank's shard."""
        state = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        return state if self.master is None else {**state, "master": self.master}

    def pack_grads(self, dtype: torch.dtype) -> Tensor:
        """Copy the gradients into a new full buffer; a missing gradient counts as zero.

        Args:
            dtype: dtype of the reduction.

        Returns:
            [full] tensor.
        """
        full = self.take_buffer(dtype)
        if self._padded or any(self.params[index].tensor.grad is None for index in self.plan.params):
            full.zero_()
        for index in self.plan.params:
            for given, place in self._grads(index, full):
                place.copy_(given)
        return full

    def take_buffer(self, dtype: torch.dtype) -> Tensor:
        """Get a full buffer with any content.

        Args:
            dtype: of its elements.

        Returns:
            [full] tensor; on a CPU what was given back before, if there is one.
        """
        kept = self._kept.pop(dtype, None)
        return torch.empty(self.plan.numel, dtype=dtype, device=self.device) if kept is None else kept

    def give_back(self, full: Tensor) -> None:
        """Keep a buffer for the next use: mapping memory anew costs a CPU more than what is done with it.

        Args:
            full: [full] tensor that nobody reads or writes any more.
        """
        if full.device.type == "cpu" and full.nbytes <= _KEPT_BYTES and full.numel() == self.plan.numel:
            self._kept[full.dtype] = full

    def accumulate_grad(self, index: int, full: Tensor) -> None:
        """Add one parameter's gradient, if it has one, to a full buffer.

        Args:
            index: the parameter.
            full: [full], added to in place.
        """
        for given, place in self._grads(index, full):
            place.add_(given)

    def _grads(self, index: int, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of a parameter's gradient, and its place in a full buffer."""
        grad = self.params[index].tensor.grad
        if grad is None:
            return
        flat = grad.detach().reshape(-1)
        for piece, offset in self._places[index]:
            yield elements(flat, piece), within(full, offset, piece)

    def grad_marks(self) -> dict[int, tuple[int, int] | None]:
        """For each parameter what changes when its gradient is written to or replaced; None without a gradient."""
        grads = {index: self.params[index].tensor.grad for index in self.plan.params}
        return {index: None if grad is None else (id(grad), grad._version) for index, grad in grads.items()}

    def pack_shard(self, shard: Tensor | None = None) -> Tensor:
        """Copy this rank's elements of the parameters.

        Args:
            shard: [shard] in the parameters' dtype, overwritten; None makes a new one.

        Returns:
            The shard.
        """
        if shard is None:
            shard = torch.empty(self.plan.lengths[self.rank], dtype=self.dtype, device=self.device)
        end = 0
        for piece in self.plan.pieces[self.rank]:
            flat = self.params[piece.param].tensor.detach().view(-1)
            within(shard, piece.offset, piece).copy_(elements(flat, piece))
            end = piece.offset + piece.length
        shard[end:].zero_()
        return shard

    def load_weights(self, full: Tensor) -> Tensor:
        """Float32 weights of the shard, to be updated in place.

        Args:
            full: [full] in the parameters' dtype; its own shard is overwritten.

        Returns:
            For float32 parameters that shard, with copies of them, otherwise the master weights. Parameters are the
            truth: where one was written from outside since the last step, its master weight follows.
        """
        shard = self.pack_shard(full[self.own])
        if self.master is None:
            return shard
        written = shard != self.master.to(self.dtype)
        self.master.copy_(torch.where(written, shard.float(), self.master))
        return self.master

    def unpack(self, full: Tensor) -> None:
        """Write a full buffer of updated weights into the parameters.

        Args:
            full: [full] in the parameters' dtype.
        """
        for index, places in self._places.items():
            flat = self.params[index].tensor.detach().view(-1)
            for piece, offset in places:
                elements(flat, piece).copy_(within(full, offset, piece))

    def _full_places(self) -> dict[int, list[tuple[Piece, int]]]:
        """For each parameter its pieces on all ranks and where they start in a full buffer."""
        places: dict[int, list[tuple[Piece, int]]] = {}
        for edge, pieces in zip(self.plan.edges, self.plan.pieces, strict=False):
            for piece in pieces:
                places.setdefault(piece.param, []).append((piece, edge + piece.offset))
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
