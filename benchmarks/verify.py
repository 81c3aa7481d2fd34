"""A contender is checked before it counts: equal ranks, changed parameters, and the result of one process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.benchmarks.contenders import Entry, entrants
from distmuon.benchmarks.launch import gathered, say
from distmuon.benchmarks.loops import Contender, Hookless
from distmuon.benchmarks.models import Case


class WrongResultError(RuntimeError):
    """A contender does not do what it is to be measured for."""


def run(contender: Contender, tokens: Sequence[Tensor]) -> None:
    """Train one step on every micro-batch.

    Args:
        contender: who.
        tokens: this rank's micro-batches.
    """
    for batch in tokens:
        contender.forward_backward(batch)
        contender.step()


class Verified(NamedTuple):
    """A contender that does what it is to be measured for."""

    entry: Entry
    contender: Contender
    found: dict[str, Tensor]
    """Its parameters, by name."""
    error: float
    """Largest error of a parameter's whole update, relative to the reference's."""


def verified(case: Case, entries: Iterable[Entry], tokens: Sequence[Tensor]) -> Iterator[Verified]:
    """Build contenders one by one, train and check them; every rank must call it.

    Args:
        case: the model.
        entries: who.
        tokens: this rank's micro-batches, one a step.

    Yields:
        Each contender, after its last step.
    """
    judge = Judge(case, tokens)
    for entry in entries:
        contender = entry.build(case.build())
        run(contender, tokens)
        found = contender.parameters()
        yield Verified(entry, contender, found, judge.verify(entry, found))


def present(case: Case) -> list[Entry]:
    """List who takes part on a model, and print why others do not.

    Args:
        case: the model.

    Returns:
        The entries.
    """
    taking_part, absent = entrants(case.name)
    for other, reason in absent.items():
        say(f"  {case.name}: {other} is left out: {reason}")
    return taking_part


class Judge:
    """Compares contenders with one process that trains on the mean gradient of all ranks.

    Args:
        case: the model.
        tokens: this rank's micro-batches, one a step.
    """

    def __init__(self, case: Case, tokens: Sequence[Tensor]) -> None:
        self._case = case
        self._tokens = tokens
        self._start = Hookless(case.build()).parameters()
        self._expected: dict[object, dict[str, Tensor]] = {}

    def verify(self, entry: Entry, found: Mapping[str, Tensor]) -> float:
        """Check a contender's parameters after the last step; every rank must call it.

        Args:
            entry: who; entries with one reference share its result.
            found: its parameters, by name.

        Returns:
            What ``verify`` returns.
        """
        if entry.reference not in self._expected:
            self._expected[entry.reference] = reference(self._case, entry, self._tokens)
        return verify(entry, found, self._start, self._expected[entry.reference])


def reference(case: Case, entry: Entry, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """Train in one process on the mean gradient of all ranks; every rank must call it.

    Args:
        case: the model.
        entry: whose optimizers.
        tokens: this rank's micro-batches, one a step.

    Returns:
        Parameters after the last step, by name.
    """
    twin = Hookless(case.build())
    steppers = entry.reference(twin.model)
    for batch in tokens:
        twin.forward_backward(batch)
        for parameter in twin.model.parameters():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(grads, own)
            # In rank order on every rank, as DistMuon sums.
            parameter.grad = torch.stack(grads).sum(dim=0) / len(grads)
        for stepper in steppers:
            stepper.step()
        twin.step()
    return twin.parameters()


def verify(
    entry: Entry, found: Mapping[str, Tensor], start: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float:
    """Check a contender's parameters; every rank must call it.

    Args:
        entry: who.
        found: its parameters, by name.
        start: those it began with.
        expected: those of the reference.

    Returns:
        Largest error of a parameter's whole update, relative to the reference's.

    Raises:
        WrongResultError: the ranks differ, a parameter did not move, or the error is above the tolerance.
    """
    if len(set(gathered(digest(found)))) > 1:
        raise WrongResultError(f"{entry.name}: the ranks hold different parameters.")
    worst = 0.0
    for name, want in expected.items():
        if torch.equal(found[name], start[name]):
            raise WrongResultError(f'{entry.name}: "{name}" did not change.')
        error = float((found[name] - want).norm() / (want - start[name]).norm())
        # Written so that a NaN fails.
        if not error <= entry.tolerance:
            raise WrongResultError(
                f'{entry.name}: the update of "{name}" is off by {error:.1e}, the tolerance is {entry.tolerance:.0e}.'
            )
        worst = max(worst, error)
    return worst


def digest(parameters: Mapping[str, Tensor]) -> str:
    """Hash every bit of a model.

    Args:
        parameters: by name.

    Returns:
        SHA-256.
    """
    hashed = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        hashed.update(name.encode())
        hashed.update(parameter.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
