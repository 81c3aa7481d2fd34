"""Checks that all ranks make together: the same plan, the same settings, finite gradients."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distmuon.clipping import Verdict, judge
from distmuon.comm import Group
from distmuon.errors import RankMismatchError

# 2^20 settings fingerprints squared and summed over 4,096 ranks stay exact in float64.
_FINGERPRINTS = 2**20

_FAILED = "failed its own checks"

Entries = Sequence[tuple[str, str]]


def check_agreement(group: Group, entries: Entries) -> None:
    """Compare a description of this rank with every other rank's.

    Args:
        group: the ranks that must agree.
        entries: (what, value) pairs; the first pair that differs is named.

    Raises:
        RankMismatchError: on every rank, naming the first difference.
    """
    text = json.dumps(list(entries))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(group.all_gather_text(digest))) == 1:
        return
    described = [json.loads(other) for other in group.all_gather_text(text)]
    if all(other and other[0][0] == _FAILED for other in described):
        # Each has an error of its own to raise.
        return
    for rank, other in enumerate(described):
        if other != described[0]:
            raise RankMismatchError(_first_difference(described[0], rank, other))


@contextlib.contextmanager
def shared_failure(group: Group) -> Iterator[None]:
    """Let an error of this rank's own checks reach the ranks that wait for it in their next ``check_agreement``.

    Args:
        group: the ranks that go through the same block and then agree.

    Raises:
        RankMismatchError: only some ranks failed, or with different errors; raised on every rank.
    """
    try:
        yield
    except ValueError as error:
        check_agreement(group, [failure(error)])
        raise


def failure(error: ValueError) -> tuple[str, str]:
    """Describe an error of one rank as an entry that other ranks do not have.

    Args:
        error: what was raised there.

    Returns:
        A (what, value) pair.
    """
    return _FAILED, f"{type(error).__name__}: {error}"


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
        check_agreement(group, entries)
    return judge(total)


def gather_names(group: Group, names: Sequence[str]) -> list[str]:
    """Collect names from all ranks.

    Args:
        group: all ranks.
        names: this rank's.

    Returns:
        Every name once, in the order of the ranks.
    """
    texts = group.all_gather_text(json.dumps(list(names)))
    return list(dict.fromkeys(name for text in texts for name in json.loads(text)))


def _first_difference(ours: list[list[str]], rank: int, theirs: list[list[str]]) -> str:
    for failed, entries in ((0, ours), (rank, theirs)):
        if entries and entries[0][0] == _FAILED:
            return f"rank {failed} failed its own checks, which stops all ranks: {entries[0][1]}"
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
