"""Gradients to reduced shards: reduce-scatters launched from gradient hooks while backward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmuon.bucket import BoundParam, Bucket
from distmuon.comm import Group, Pending
from distmuon.errors import ParameterError, SynchronizationError

_OWNER = "_distmuon_owner"


@dataclass
class Lane:
    """A bucket, the group that reduces it, and how far its reduction is."""

    bucket: Bucket
    group: Group
    divisor: int
    ready: set[int] = field(default_factory=set)
    accumulated: Tensor | None = None
    pending: Pending | None = None
    mean: Tensor | None = None
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def launched(self) -> bool:
        """Whether the reduce-scatter was issued since the last reset."""
        return self.pending is not None or self.mean is not None


class Reducer:
    """Launches each lane's reduce-scatter as soon as its gradients are there, in one order on all ranks.

    A bucket whose gradients do not all arrive (an unused expert) is launched by ``finish``, so ranks with different
    unused parameters still issue the same sequence.
    """

    def __init__(
        self,
        reduce_dtype: torch.dtype,
        launch_in_backward: Callable[[], bool],
        accumulate_in_buckets: bool = False,
    ) -> None:
        self.lanes: list[Lane] = []
        self._reduce_dtype = reduce_dtype
        self._launch_in_backward = launch_in_backward
        self._accumulate = accumulate_in_buckets
        self._next = 0
        self._begun = False

    def add(self, lanes: Sequence[Lane]) -> None:
        """Take over lanes and hook their parameters; lanes are launched in the order given.

        Args:
            lanes: lanes, those whose gradients come first in backward first.
        """
        self.lanes.extend(lanes)
        watched: dict[int, tuple[BoundParam, list[tuple[Lane, int]]]] = {}
        for lane in lanes:
            for index in lane.bucket.plan.params:
                param = lane.bucket.params[index]
                watched.setdefault(id(param.tensor), (param, []))[1].append((lane, index))
        for param, places in watched.values():
            param.tensor.register_post_accumulate_grad_hook(self._hook(param, places))  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Launch what backward could not, wait for everything, and leave the mean gradient in each lane."""
        self._launch(all_lanes=True)
        for lane in self.lanes:
            if lane.pending is not None:
                total = lane.pending.wait().float()
                lane.mean, lane.pending = total.div_(lane.divisor) if lane.divisor > 1 else total, None

    def check_untouched(self) -> None:
        """Make sure that no gradient was written to since it was reduced: the update would not know.

        Raises:
            SynchronizationError: names a parameter whose gradient was.
        """
        for lane in self.lanes:
            for index, version in lane.versions.items():
                param = lane.bucket.params[index]
                if param.tensor.grad is not None and param.tensor.grad._version != version:
                    raise SynchronizationError(
                        f'the gradient of "{param.name}" was changed after it was reduced, which would be lost; '
                        "clip with optimizer.clip_grad_norm_(max_norm) or max_grad_norm, not with torch.nn.utils."
                    )

    def sum_of_squares(self) -> Tensor:
        """Sum of the squared mean gradients of this rank's shards, a float64 scalar."""
        squares = [lane.mean.double().square().sum() for lane in self.lanes if lane.mean is not None]
        return torch.stack([square.to(squares[0].device) for square in squares]).sum()

    def reset(self) -> None:
        """Forget every gradient that was reduced or accumulated, waiting for reductions under way."""
        if self._begun:
            # Another rank may have got further in a backward that is given up here; all must issue the same sequence.
            self._launch(all_lanes=True)
        for lane in self.lanes:
            if lane.pending is not None:
                lane.pending.wait()
            lane.pending = lane.mean = lane.accumulated = None
            lane.ready.clear()
            lane.versions.clear()
        self._next = 0
        self._begun = False

    def _hook(self, param: BoundParam, places: list[tuple[Lane, int]]) -> Callable[[Tensor], None]:
        # A model outlives its optimizers: only the hooks of the newest one reduce, and none keeps its optimizer alive.
        weak_self = weakref.ref(self)
        setattr(param.tensor, _OWNER, id(self))

        def on_gradient(tensor: Tensor) -> None:
            reducer = weak_self()
            if reducer is not None and getattr(tensor, _OWNER) == id(reducer):
                reducer.arrived(param, tensor, places)

        return on_gradient

    def arrived(self, param: BoundParam, tensor: Tensor, places: list[tuple[Lane, int]]) -> None:
        """Take note of a gradient and launch the lanes that it completes.

        Args:
            param: whose gradient it is.
            tensor: the parameter's tensor.
            places: lanes with elements of the parameter, and its index there.

        Raises:
            SynchronizationError: the parameter was already reduced in this step.
            ParameterError: the gradient is sparse.
        """
        if any(lane.launched for lane, _ in places):
            raise SynchronizationError(
                f'a gradient of "{param.name}" arrived after it was reduced; run every backward but the last '
                "before step() inside `with optimizer.no_sync():`, or give the gradients up with optimizer.zero_grad()."
            )
        if tensor.grad is not None and tensor.grad.layout != torch.strided:
            raise ParameterError(
                f'the gradient of "{param.name}" is sparse; use dense gradients (sparse=False for embeddings).'
            )
        if self._accumulate:
            self._add_to_buckets(tensor, places)
        if self._launch_in_backward():
            self._begun = True
            for lane, index in places:
                lane.ready.add(index)
            self._launch(all_lanes=False)

    def _add_to_buckets(self, tensor: Tensor, places: list[tuple[Lane, int]]) -> None:
        """Move a 16-bit gradient into the wider accumulation buffers and release it."""
        for lane, index in places:
            if lane.accumulated is None:
                numel = lane.bucket.world * lane.bucket.plan.shard_numel
                lane.accumulated = tensor.new_zeros(numel, dtype=torch.float32)
            lane.bucket.accumulate_grad(index, lane.accumulated)
        tensor.grad = None

    def _launch(self, all_lanes: bool) -> None:
        while self._next < len(self.lanes):
            lane = self.lanes[self._next]
            if not all_lanes and len(lane.ready) < len(lane.bucket.plan.params):
                return
            full = lane.accumulated
            if full is None:
                full = lane.bucket.pack_grads(self._reduce_dtype)
            lane.pending = lane.group.reduce_scatter(full.to(self._reduce_dtype))
            lane.accumulated = None
            lane.versions = lane.bucket.grad_versions()
            self._next += 1
