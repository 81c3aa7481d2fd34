"""What a step needs to know before it changes anything: phases 1 and 2, and the checks that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon import guard
from distmuon.clipping import Verdict, clip_coefficient
from distmuon.comm import Group
from distmuon.config import GroupSettings
from distmuon.errors import ConfigError, SynchronizationError
from distmuon.reducer import Reducer


def count_of_groups(groups: Sequence[object]) -> tuple[str, str]:
    """What ranks must agree on before anything else: one may have added a param group alone.

    Args:
        groups: param groups or their settings.

    Returns:
        A (what, value) pair.
    """
    return "a number of param groups of", str(len(groups))


class StepSettings(NamedTuple):
    """Settings that a step runs with, read once and compared between the ranks."""

    groups: Sequence[GroupSettings]
    loss_scale: float
    limit: float | None
    overlap_forward: bool = False

    def entries(self) -> list[tuple[str, str]]:
        """(what, value) pairs that must be equal on all ranks."""
        pairs = [
            (f'setting "{key}" of param group {number}', repr(value))
            for number, group in enumerate(self.groups)
            for key, value in group.model_dump().items()
        ]
        scale = ("a loss scale (distmuon.GradScaler keeps it equal) of", repr(self.loss_scale))
        overlapped = ("overlap_forward", repr(self.overlap_forward))
        return [count_of_groups(self.groups), *pairs, scale, ("max_norm", repr(self.limit)), overlapped]


class Readiness(NamedTuple):
    """The reduced gradients' verdict and what follows from it."""

    verdict: Verdict
    settings: StepSettings

    @property
    def coefficient(self) -> float:
        """Factor from reduced to unscaled and clipped gradients."""
        return clip_coefficient(self.verdict.norm, self.settings.limit) / self.settings.loss_scale


def get_ready(main: Group, reducer: Reducer, check: Callable[[], StepSettings]) -> Readiness:
    """Let all ranks decide together whether and how to step.

    Args:
        main: all ranks.
        reducer: holds the gradients, all of them reduced.
        check: reads and checks this rank's settings; an error reaches every rank before it is raised.

    Returns:
        The decision, equal on all ranks.

    Raises:
        ValueError: what ``check`` raised, if it raised the same on every rank.
        RankMismatchError: the ranks differ in settings or errors; raised on every rank.
    """
    settings, error = StepSettings([], 1.0, None), None
    try:
        settings = check()
    except ValueError as problem:
        error = problem
    squares = reducer.sum_of_squares(main.device) / settings.loss_scale**2
    verdict = guard.vote(main, squares, [guard.failure(error)] if error else settings.entries())
    if error:
        raise error
    return Readiness(verdict, settings)


def compare_in_vote(main: Group, entries: guard.Entries) -> None:
    """Compare entries where ranks that have nothing to compare are in the vote of ``get_ready``.

    Args:
        main: all ranks.
        entries: (what, value) pairs.

    Raises:
        RankMismatchError: they differ; raised on every rank.
    """
    guard.vote(main, torch.zeros((), dtype=torch.float64, device=main.device), entries)


def check_clip(clip: tuple[float, float | None] | None, loss_scale: float, default: float | None) -> float | None:
    """Decide the largest gradient norm of a step.

    Args:
        clip: norm and loss scale that ``clip_grad_norm_`` was called with, None if it was not; a loss scale of None
            is that of the step.
        loss_scale: the step's.
        default: the optimizer's ``max_grad_norm``.

    Returns:
        The norm; None does not clip.

    Raises:
        ConfigError: the norm is not above 0.
        SynchronizationError: the two loss scales differ.
    """
    if clip is None:
        return default
    norm, used = clip
    if not norm > 0:
        raise ConfigError(f"max_norm = {norm} is not legal: it must be above 0.")
    if used is not None and used != loss_scale:
        raise SynchronizationError(
            f"clip_grad_norm_ was given loss_scale = {used} and the step has {loss_scale}; "
            "call clip_grad_norm_(max_norm, loss_scale=scaler.get_scale())."
        )
    return norm


def find_loss_scale(grad_scale: Tensor | None, found_inf: Tensor | None) -> float:
    """What the loss was multiplied by, from the attributes that torch.amp.GradScaler sets for the length of a step.

    Args:
        grad_scale: the scale; None if GradScaler believes that the gradients are unscaled.
        found_inf: None without a GradScaler.

    Returns:
        The scale; 1 without a GradScaler.

    Raises:
        SynchronizationError: ``GradScaler.unscale_`` was called on gradients that were already reduced.
    """
    if found_inf is None:
        return 1.0
    if grad_scale is None:
        raise SynchronizationError(
            "GradScaler.unscale_ came after the gradients were reduced, so it could not reach them; drop the call "
            "and clip with optimizer.clip_grad_norm_(max_norm, loss_scale=scaler.get_scale())."
        )
    return float(grad_scale)
