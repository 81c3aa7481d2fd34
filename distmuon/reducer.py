"""Gradients to reduced shards: reduce-scatters launched from gradient hooks while backward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmuon.blocks import sum_of_squares
from distmuon.bucket import BoundParam, Bucket
from distmuon.comm import Group
from distmuon.errors import ParameterError, SynchronizationError
from distmuon.pending import Pending

_OWNER = "_distmuon_owner"


@dataclass
class BucketReduction:
    """A bucket, the group that reduces it, and how far its reduction is."""

    bucket: Bucket
    group: Group
    divisor: int
    ready: set[int] = field(default_factory=set)
    accumulated: Tensor | None = None
    pending: Pending | None = None
    full: Tensor | None = None
    mean: Tensor | None = None
    marks: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    @property
    def launched(self) -> bool:
        """Whether the reduce-scatter was issued since the last reset."""
        return self.pending is not None or self.mean is not None

    def settle(self) -> None:
        """Wait for the reduce-scatter and keep only the mean gradient of the shard, in float32."""
        if self.pending is not None:
            total = self.pending.wait().float()
            self.mean, self.pending = total.div_(self.divisor) if self.divisor > 1 else total, None
            if self.full is not None and self.full is not total:
                self.bucket.give_back(self.full)
            self.full = None

    def take_mean(self) -> Tensor:
        """Hand over the mean gradient of the shard, and let go of it."""
        mean, self.mean = self.mean, None
        assert mean is not None
        return mean


class Reducer:
    """Launches each reduction's reduce-scatter as soon as its gradients are there, in one order on all ranks.

    A bucket whose gradients do not all arrive (an unused expert) is launched by ``finish``, so ranks with different
    unused parameters still issue the same sequence.
    """

    def __init__(
        self,
        reduce_dtype: torch.dtype,
        launch_in_backward: Callable[[], bool],
        is_stale: Callable[[Tensor], bool],
        accumulate_in_buckets: bool = False,
    ) -> None:
        self.reductions: list[BucketReduction] = []
        self._reduce_dtype = reduce_dtype
        self._launch_in_backward = launch_in_backward
        self._is_stale = is_stale
        self._accumulate = accumulate_in_buckets
        self._next = 0
        self._begun = False

    def add(self, reductions: Sequence[BucketReduction]) -> None:
        """Take over buckets and hook their parameters.

        Args:
            reductions: in the order in which they are to be launched: those whose gradients come first, first.
        """
        self.reductions.extend(reductions)
        watched: dict[int, tuple[BoundParam, list[tuple[BucketReduction, int]]]] = {}
        for reduction in reductions:
            for index in reduction.bucket.plan.params:
                param = reduction.bucket.params[index]
                watched.setdefault(id(param.tensor), (param, []))[1].append((reduction, index))
        for param, places in watched.values():
            param.tensor.register_post_accumulate_grad_hook(self._hook(param, places))  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Launch what backward could not, wait for everything, and leave the mean gradient in each reduction.

        Raises:
            SynchronizationError: the gradients were already used.
        """
        self._launch(all_buckets=True)
        for reduction in self.reductions:
            reduction.settle()
            if reduction.mean is None:
                raise SynchronizationError(
                    "a step that failed has used up the gradients; call optimizer.zero_grad() and run backward again."
                )

    def check_untouched(self) -> None:
        """Make sure that no gradient was written to since it was reduced: the update would not know.

        Raises:
            SynchronizationError: names a parameter whose gradient was.
        """
        for reduction in self.reductions:
            for index, mark in reduction.bucket.grad_marks().items():
                # A gradient that was dropped since then is what zero_grad of a module leaves.
                if reduction.launched and mark not in (reduction.marks[index], None):
                    name = reduction.bucket.params[index].name
                    raise SynchronizationError(
                        f'the gradient of "{name}" was changed after it was reduced, which would be lost; '
                        "clip with optimizer.clip_grad_norm_(max_norm), not with torch.nn.utils."
                    )

    def sum_of_squares(self, device: torch.device) -> Tensor:
        """Sum of the squared mean gradients of this rank's shards.

        Args:
            device: where the sum is wanted.

        Returns:
            float64 scalar.
        """
        total = torch.zeros((), dtype=torch.float64, device=device)
        for reduction in self.reductions:
            if reduction.mean is not None:
                total += sum_of_squares(reduction.mean).to(device)
        return total

    def non_finite(self) -> list[str]:
        """Names of parameters that have elements in this rank's shards whose mean gradients are not finite."""
        names: dict[str, None] = {}
        for reduction in self.reductions:
            bucket, mean = reduction.bucket, reduction.mean
            if mean is not None and not bool(sum_of_squares(mean).isfinite()):
                for piece in bucket.plan.pieces[bucket.rank]:
                    if not bool(mean[piece.offset : piece.offset + piece.length].isfinite().all()):
                        names[bucket.params[piece.param].name] = None
        return list(names)

    def reset(self) -> None:
        """Forget every gradient that was reduced or accumulated, waiting for reductions under way."""
        if self._begun:
            # Another rank may have got further in a backward that is given up here; all must issue the same sequence.
            self._launch(all_buckets=True)
        for reduction in self.reductions:
            if reduction.pending is not None:
                reduction.pending.wait()
            reduction.pending = reduction.full = reduction.mean = reduction.accumulated = None
            reduction.ready.clear()
            reduction.marks.clear()
        self._next = 0
        self._begun = False

    def _hook(self, param: BoundParam, places: list[tuple[BucketReduction, int]]) -> Callable[[Tensor], None]:
        # A model outlives its optimizers: only the hooks of the newest one reduce, and none keeps its optimizer alive.
        weak_self = weakref.ref(self)
        setattr(param.tensor, _OWNER, id(self))

        def on_gradient(tensor: Tensor) -> None:
            reducer = weak_self()
            if reducer is not None and getattr(tensor, _OWNER) == id(reducer):
                reducer.arrived(param, tensor, places)

        return on_gradient

    def arrived(self, param: BoundParam, tensor: Tensor, places: list[tuple[BucketReduction, int]]) -> None:
        """Take note of a gradient and launch the reductions that it completes.

        Args:
            param: whose gradient it is.
            tensor: the parameter's tensor.
            places: reductions with elements of the parameter, and its index there.

        Raises:
            SynchronizationError: the parameter was already reduced in this step, or its last update had not arrived
                when the model read it.
            ParameterError: the gradient is sparse.
        """
        if any(reduction.launched for reduction, _ in places):
            raise SynchronizationError(
                f'a gradient of "{param.name}" arrived after it was reduced; run every backward but the last '
                "before step() inside `with optimizer.no_sync():`, or give the gradients up with optimizer.zero_grad()."
            )
        if self._is_stale(tensor):
            raise SynchronizationError(
                f'"{param.name}" was used before its all-gather was waited for, since no module that owns it was '
                "called; call optimizer.finish_gathers() before such a use, or leave optimizer.overlap_forward out."
            )
        if tensor.grad is not None and tensor.grad.layout != torch.strided:
            raise ParameterError(
                f'the gradient of "{param.name}" is sparse; use dense gradients (sparse=False for embeddings).'
            )
        if self._accumulate:
            self._add_to_buckets(tensor, places)
        if self._launch_in_backward():
            self._begun = True
            for reduction, index in places:
                reduction.ready.add(index)
            self._launch(all_buckets=False)

    def _add_to_buckets(self, tensor: Tensor, places: list[tuple[BucketReduction, int]]) -> None:
        """Move a 16-bit gradient into the wider accumulation buffers and release it."""
        for reduction, index in places:
            if reduction.accumulated is None:
                reduction.accumulated = tensor.new_zeros(reduction.bucket.plan.numel, dtype=torch.float32)
            reduction.bucket.accumulate_grad(index, reduction.accumulated)
        tensor.grad = None

    def _launch(self, all_buckets: bool) -> None:
        while self._next < len(self.reductions):
            reduction = self.reductions[self._next]
            if not all_buckets and len(reduction.ready) < len(reduction.bucket.plan.params):
                return
            self._settle_done()
            full = reduction.accumulated
            if full is None:
                full = reduction.bucket.pack_grads(self._reduce_dtype)
            else:
                # Gradients that came by assignment, past the hooks.
                for index in reduction.bucket.plan.params:
                    reduction.bucket.accumulate_grad(index, full)
            full = reduction.full = full.to(self._reduce_dtype)
            reduction.pending = reduction.group.reduce_scatter(full, reduction.bucket.plan.lengths, self._next)
            reduction.accumulated = None
            reduction.marks = reduction.bucket.grad_marks()
            self._next += 1

    def _settle_done(self) -> None:
        """Free the full buffers of reductions that are through, while backward goes on."""
        for earlier in self.reductions[: self._next]:
            if earlier.pending is not None and earlier.pending.done():
                earlier.settle()
