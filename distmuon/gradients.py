"""From parameters to the decision whether to step: they are placed, and their gradients reduced, clipped and judged."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from distmuon import domains, guard, pipeline
from distmuon.binding import bind, check_unchanged
from distmuon.bucket import BoundParam, Bucket
from distmuon.checked_optimizer import CheckedOptimizer
from distmuon.clock import PhaseClock
from distmuon.comm import Group, Traffic
from distmuon.config import ShardSettings
from distmuon.errors import ParameterError, SynchronizationError
from distmuon.forward_overlap import ForwardOverlap
from distmuon.groups import check_group
from distmuon.plan import Plan
from distmuon.readiness import (
    Readiness,
    StepSettings,
    check_clip,
    compare_in_vote,
    count_of_groups,
    find_loss_scale,
    get_ready,
)
from distmuon.reducer import BucketReduction, Reducer


class ReducingOptimizer(CheckedOptimizer):
    """Base of ``DistMuon``: what lies where, and phases 1 and 2 of a step, reduce and guard."""

    settings: ShardSettings
    _synchronize = True
    _clip: tuple[float, float | None] | None = None
    # torch.amp.GradScaler then leaves p.grad alone and, for the length of a step, sets grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def _connect(self, main: dist.ProcessGroup | None, experts: Mapping[str, dist.ProcessGroup | None]) -> None:
        """Begin without parameters."""
        self.clock = PhaseClock()
        self.traffic = Traffic(clock=self.clock)
        self.skipped_steps = 0
        self.grad_norm = 0.0
        self._overlap = ForwardOverlap(self.clock)
        self._plans: list[Plan] = []
        self._waves: list[list[int]] = []
        self._placed = 0
        self._bound: list[BoundParam] = []
        self._frozen: list[BoundParam] = []
        self._main = Group(main, self.traffic)
        self._experts = {name: Group(pg, self.traffic, self._main) for name, pg in experts.items()}

    def _watch_gradients(self) -> None:
        dtype, accumulate = getattr(torch, self.settings.reduce_dtype), self.settings.grad_accum_dtype is not None
        self._reducer = Reducer(dtype, self.reduces_in_backward, self._overlap.is_unseen, accumulate)

    def reduces_in_backward(self) -> bool:
        """Whether a backward pass started now is the one whose gradients are reduced."""
        return self._synchronize

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them; for all micro-batches of a step but the last."""
        before, self._synchronize = self._synchronize, False
        try:
            yield
        finally:
            self._synchronize = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and whatever was reduced of them.

        Args:
            set_to_none: drop p.grad instead of zeroing it.
        """
        super().zero_grad(set_to_none)
        self.forget_gradients()

    def reduce_gradients(self) -> None:
        """Finish what backward started: wait for reductions and launch those that lacked a gradient."""
        with self.clock("reduce"):
            self._reducer.finish()

    def clip_grad_norm_(self, max_norm: float, loss_scale: float = 1.0) -> float:
        """Clip the raw gradients of the coming step, before momentum; p.grad is left as it is.

        Args:
            max_norm: largest global norm, above 0; infinity only measures.
            loss_scale: what the loss was multiplied by; 1 without a GradScaler.

        Returns:
            The global norm of the mean gradients before clipping, not finite if any gradient is not.

        Raises:
            ConfigError: max_norm is not above 0.
            RankMismatchError: the settings of the ranks disagree.
        """
        self._clip = max_norm, loss_scale
        return self._get_ready(loss_scale).verdict.norm

    def finite_gradients(self, loss_scale: float) -> bool:
        """Whether the mean gradients are finite on all ranks, for ``distmuon.GradScaler``; every rank must ask.

        Args:
            loss_scale: what the loss was multiplied by.
        """
        return self._get_ready(loss_scale).verdict.finite

    def _get_ready(self, loss_scale: float | None = None) -> Readiness:
        """Phases 1 and 2: reduced gradients, their global norm, one decision for all ranks."""

        def check() -> StepSettings:
            if len(self.param_groups) < self._placed:
                raise ParameterError(
                    f"{self._placed - len(self.param_groups)} param groups were removed; set their lr to 0 instead."
                )
            check_unchanged(self._bound, self._frozen)
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None:
                self._reducer.check_untouched()
            scale = find_loss_scale(getattr(self, "grad_scale", None), found_inf) if loss_scale is None else loss_scale
            limit = check_clip(self._clip, scale, self.settings.max_grad_norm)
            groups = [check_group(group) for group in self.param_groups]
            return StepSettings(groups, scale, limit, self._overlap.active)

        self.reduce_gradients()
        with self.clock("guard"):
            added = self._place_added(compare_in_vote)
        if added:
            self.reduce_gradients()
        with self.clock("guard"):
            return get_ready(self._main, self._reducer, check)

    def forget_gradients(self) -> None:
        """Drop whatever was reduced of the gradients, and leave p.grad; every rank must call it."""
        self._reducer.reset()
        self._clip = None

    def _meet(self) -> None:
        """Place added groups where all ranks are, whether they added any or not."""
        if not self._place_added(guard.check_agreement):
            guard.check_agreement(self._main, [count_of_groups(self.param_groups)])

    def _need_placed(self) -> None:
        """Refuse to show what only all ranks together can make; one rank alone makes it."""
        if self._main.size == 1:
            self._meet()
        if self._placed < len(self.param_groups):
            raise SynchronizationError(
                "param groups were added and are not placed yet; call optimizer.check_agreement() on every rank first."
            )

    def _place(self, trained: list[BoundParam], frozen: list[BoundParam]) -> None:
        """Agree with the other ranks on parameters, plan them, and start to watch for their gradients."""
        self._overlap.wait()
        plans, reductions = domains.build(trained, self.param_groups, self._main, self._experts, self.settings)
        self._bound, self._frozen = self._bound + trained, self._frozen + frozen
        self._plans += plans
        self._placed = len(self.param_groups)
        self._reducer.add(reductions)
        self._waves = pipeline.agree_on_waves(self._main, self._reducer.reductions)

    def _place_added(self, agree: Callable[[Group, guard.Entries], Any]) -> bool:
        """Place param groups that were added, once it is known that every rank has added some.

        Args:
            agree: compares entries by the collective that a rank without added groups issues at this point.

        Returns:
            Whether there were any.
        """
        if self._placed >= len(self.param_groups):
            return False
        try:
            agree(self._main, [count_of_groups(self.param_groups)])
            with guard.shared_failure(self._main):
                added = bind(self.param_groups[self._placed :], self._placed, self._bound)
            self._place(*added)
        except ValueError:
            del self.param_groups[self._placed :]
            raise
        return True


def copied(reduction: BucketReduction, group: Group, memo: dict[int, Any]) -> BucketReduction:
    """Copy a bucket with its state for an optimizer of copied parameters.

    Args:
        reduction: of the optimizer that is copied; how far it is does not matter.
        group: what takes the place of its group.
        memo: of ``copy.deepcopy``.

    Returns:
        The copy, without gradients.
    """
    bucket = Bucket(reduction.bucket.plan, reduction.bucket.rank, copy.deepcopy(reduction.bucket.params, memo))
    for key, value in reduction.bucket.state().items():
        bucket.state()[key].copy_(value)
    bucket.updates = dict(reduction.bucket.updates)
    return BucketReduction(bucket, group, reduction.divisor)
