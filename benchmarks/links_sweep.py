"""Measures all contenders at all link speeds, with one set of processes and turn by turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distmuon.benchmarks.links_ranks import Ranks
from distmuon.benchmarks.namespaces import Network

# Times that every speed is visited, so that a busy minute does not hit one of them alone.
VISITS = 3
_PROBE_SECONDS = 0.3
_PROBES = 4
# A plain socket without a limit passes this much in a fraction of a second.
_FASTEST_BITS = 8e9

# Bits per second, or None without a limit.
Rate = float | None


class Sample(NamedTuple):
    """One step of one contender."""

    seconds: float
    """From when the first rank began until the last one ended."""
    sent: float
    """Bytes that left an interface, mean over the ranks."""
    newton_schulz: float
    """Seconds, of the rank that took longest; 0 where the contender does not tell."""
    update: float


class Sweep:
    """What was measured so far.

    Args:
        network: the links.
        ranks: the processes, with their contenders built.
        contenders: names.
    """

    def __init__(self, network: Network, ranks: Ranks, contenders: Sequence[str]) -> None:
        self._network = network
        self._ranks = ranks
        self._contenders = contenders
        self._rng = random.Random(0)  # noqa: S311
        self._probes: dict[Rate, list[float]] = {}
        self.samples: dict[tuple[str, Rate], list[Sample]] = {}

    def collectives(self) -> dict[str, float]:
        """Seconds that gloo takes without a limit for each collective."""
        self._network.set_rate(None)
        answers: list[dict[str, float]] = self._ranks.all(do="collectives")
        return {kind: max(answer[kind] for answer in answers) for kind in answers[0]}

    def goodput(self, rate: Rate) -> float:
        """Bits per second that plain sockets got of every link, all ranks at once.

        Args:
            rate: a speed that was visited.
        """
        return statistics.median(self._probes[rate])

    def run(self, rates: Sequence[Rate], rounds: int, progress: Callable[[str], None]) -> None:
        """Visit all speeds several times, up and down in turn.

        Args:
            rates: the speeds.
            rounds: timed steps of every contender at every speed.
            progress: told what begins.
        """
        visits = min(VISITS, rounds)
        for visit in range(visits):
            count = rounds // visits + (visit < rounds % visits)
            for rate in rates if visit % 2 == 0 else list(rates)[::-1]:
                progress(f"visit {visit + 1} of {visits}, {label(rate)}: {count} rounds of {len(self._contenders)}")
                self._visit(rate, count)

    def _visit(self, rate: Rate, rounds: int) -> None:
        self._network.set_rate(rate)
        self._probes.setdefault(rate, []).append(self._probe(rate))
        for name in self._contenders:
            # The windows of its connections adapt to the new speed.
            self._ranks.all(do="step", name=name)
        order = list(self._contenders)
        for _ in range(rounds):
            self._rng.shuffle(order)
            for name in order:
                self.samples.setdefault((name, rate), []).append(self._sample(name))

    def _probe(self, rate: Rate) -> float:
        count = round((rate or _FASTEST_BITS) * _PROBE_SECONDS / 8)
        seconds: list[float] = []
        for _ in range(_PROBES):
            seconds.append(statistics.fmean(self._ranks.all(do="transfer", count=count)))
        # The first one finds the speed.
        return 8 * count / statistics.median(seconds[1:])

    def _sample(self, name: str) -> Sample:
        before = self._ranks.all(do="sent")
        steps = self._ranks.all(do="step", name=name)
        after = self._ranks.all(do="sent")
        return Sample(
            seconds=max(step["end"] for step in steps) - min(step["start"] for step in steps),
            sent=statistics.fmean(new - old for old, new in zip(before, after, strict=True)),
            newton_schulz=max(step["newton_schulz"] for step in steps),
            update=max(step["update"] for step in steps),
        )


def label(rate: Rate) -> str:
    """Say a speed as the command line takes it.

    Args:
        rate: bits per second.
    """
    if rate is None:
        return "unlimited"
    return f"{rate / 1e9:g}G" if rate >= 1e9 else f"{rate / 1e6:g}M"
