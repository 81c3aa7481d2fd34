"""Times that can be compared: candidates take turns, so that whatever else a machine does hits all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

Input = TypeVar("Input")
Call = Callable[[], object]
# Runs a call and returns the seconds it took.
Clock = Callable[[Call], float]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline."""

    of_best: float
    """Shortest time of the baseline over the shortest of the candidate."""
    median: float
    """Median of the ratios within a round."""
    low: float
    """First quartile of them."""
    high: float
    """Third quartile of them."""


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Compare times that were taken round by round.

    Args:
        baseline: seconds of the baseline in every round.
        seconds: seconds of the candidate in the same rounds, two or more.

    Returns:
        The ratios; above 1 the candidate is faster.
    """
    rounds = [base / own for base, own in zip(baseline, seconds, strict=True)]
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Ratio(min(baseline) / min(seconds), median, low, high)


def interleave(
    calls: Mapping[str, Callable[[Input], object]],
    make_input: Callable[[int], Input],
    rounds: int,
    clock: Clock,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time every call once per round, in another order each round.

    Args:
        calls: what to time; each has run before, so that nothing is set up meanwhile.
        make_input: takes the number of the call, from 0, and returns its argument. Arguments should differ where
            libraries keep what they prepare for a number; making them is not timed.
        rounds: number of rounds.
        clock: how to time a call.
        after_round: called when a round has ended, e.g. to show progress.

    Returns:
        Seconds per round under every name.
    """
    order, rng = list(calls), random.Random(0)  # noqa: S311
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        # A fixed order would always leave the same caches to the same successor.
        rng.shuffle(order)
        for place, name in enumerate(order):
            given = make_input(done * len(order) + place)
            seconds[name].append(clock(partial(calls[name], given)))
        after_round()
    return seconds


def make_clock(device: torch.device, threads: int) -> tuple[str, Clock]:
    """Choose a clock.

    Args:
        device: where the calls compute.
        threads: number of threads they use on a CPU.

    Returns:
        What the clock measures, in words, and the clock.
    """
    if device.type == "cuda":
        return "time between CUDA events", _by_events
    if threads == 1:
        # Other processes on the machine do not count.
        return "CPU time of the thread", lambda call: _by(time.thread_time, call)
    return "wall time", lambda call: _by(time.perf_counter, call)


def _by(now: Callable[[], float], call: Call) -> float:
    start = now()
    call()
    return now() - start


def _by_events(call: Call) -> float:
    make: Any = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
