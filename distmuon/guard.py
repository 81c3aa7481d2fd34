"""Checks that all ranks make together: the same plan, the same settings, finite gradients."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.comm import Group
from distmuon.errors import RankMismatchError, SynchronizationError

# 2^20 settings fingerprints squared and summed over 4,096 ranks stay exact in float64.
_FINGERPRINTS = 2**20

Entries = Sequence[tuple[str, str]]


class Verdict(NamedTuple):
    """What the ranks know of the reduced gradients after the vote."""

    norm: float
    finite: bool


def check_agreement(group: Group, entries: Entries, device: torch.device) -> None:
    """Compare a description of this rank with every other rank's.

    Args:
        group: the ranks that must agree.
        entries: (what, value) pairs; the first pair that differs is named.
        device: where the tensors of the comparison live.

    Raises:
        RankMismatchError: on every rank, naming the first difference.
    """
    text = json.dumps(list(entries))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(group.all_gather_text(digest, device))) == 1:
        return
    described = [json.loads(other) for other in group.all_gather_text(text, device)]
    for rank, other in enumerate(described):
        if other != described[0]:
            raise RankMismatchError(_first_difference(described[0], rank, other))


def vote(group: Group, sum_of_squares: Tensor, entries: Entries) -> Verdict:
    """Agree on the global gradient norm, on whether it is finite, and that settings are equal: one small all-reduce.

    Args:
        group: all ranks.
        sum_of_squares: float64 scalar over this rank's shards; every element counted on exactly one rank.
        entries: the settings this rank is about to step with.

    Returns:
        Norm of the reduced gradients, rounded to float32 so that the order of the sum cannot show, and whether all
        of them are finite.

    Raises:
        RankMismatchError: on every rank, naming the first setting that differs.
    """
    text = json.dumps(list(entries))
    fingerprint = int(hashlib.sha256(text.encode()).hexdigest(), 16) % _FINGERPRINTS
    values = torch.tensor([0.0, fingerprint, fingerprint**2], dtype=torch.float64)
    values = values.to(sum_of_squares.device)
    values[0] = sum_of_squares
    total, linear, quadratic = group.all_reduce_sum(values).tolist()
    # Cauchy-Schwarz: equality holds only if every rank sent the same fingerprint. Integers, so that it is exact.
    if group.size * int(quadratic) != int(linear) ** 2:
        check_agreement(group, entries, sum_of_squares.device)
    if not math.isfinite(total):
        return Verdict(math.inf, False)
    norm = math.sqrt(total)
    rounded = torch.tensor(norm, dtype=torch.float32).item()
    return Verdict(rounded if math.isfinite(rounded) else norm, True)


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Factor that clips gradients of a norm.

    Args:
        norm: global norm of the gradients.
        limit: largest norm; None does not clip.

    Returns:
        min(1, limit / (norm + 1e-6)), with the 1e-6 of torch.nn.utils.clip_grad_norm_.
    """
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def loss_scale(grad_scale: Tensor | None, found_inf: Tensor | None) -> float:
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


def check_loss_scale(used: float, loss_scale: float) -> None:
    """Make sure that clipping and stepping mean the same loss scale.

    Args:
        used: what ``clip_grad_norm_`` was given.
        loss_scale: what ``step`` found.

    Raises:
        SynchronizationError: they differ.
    """
    if used != loss_scale:
        raise SynchronizationError(
            f"clip_grad_norm_ was given loss_scale = {used} and GradScaler has {loss_scale}; "
            "call clip_grad_norm_(max_norm, loss_scale=scaler.get_scale())."
        )


def _first_difference(ours: list[list[str]], rank: int, theirs: list[list[str]]) -> str:
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return (
                f"the ranks disagree: rank 0 has {mine[0]} {mine[1]} where rank {rank} has {other[0]} {other[1]}; "
                "build the model and the optimizer with the same parameters and settings on every rank."
            )
    return (
        f"the ranks disagree: rank 0 lists {len(ours)} parameters and settings and rank {rank} lists {len(theirs)}; "
        "build the model and the optimizer with the same parameters and settings on every rank."
    )
