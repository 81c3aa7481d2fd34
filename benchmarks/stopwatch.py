"""Times the steps of all contenders in turn, on every rank."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.benchmarks import launch
from distmuon.benchmarks.contenders import RIVAL
from distmuon.benchmarks.launch import Row, gathered, say
from distmuon.benchmarks.loops import Contender, Hookless
from distmuon.benchmarks.models import CASES, Case
from distmuon.benchmarks.timing import interleave
from distmuon.benchmarks.verify import present, run, verified

STEPS = 2
WARM_UP = 2
# The model without an optimizer.
BARE = ""


class Timed:
    """A contender whose steps leave their wall time, and where DistMuon says it went.

    Args:
        contender: who.
    """

    def __init__(self, contender: Contender) -> None:
        self.wall: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._contender = contender

    def __call__(self, tokens: Tensor) -> None:
        """Train a step."""
        start = time.perf_counter()
        run(self._contender, [tokens])
        self.wall.append(time.perf_counter() - start)
        if self._contender.dist_muon is not None:
            clock = self._contender.dist_muon.clock
            waited = clock.waited
            self.phases.append({"newton_schulz": 0.0, **clock.clear(), "waited": waited})


def worker(models: Sequence[str], rounds: int, result: Path) -> None:
    """Time every contender on every model; rank 0 writes the rows.

    Args:
        models: names of cases.
        rounds: steps that count of each contender.
        result: where to.
    """
    launch.join()
    rows: list[Row] = []
    for name in models:
        case = CASES[name]
        generator = torch.Generator().manual_seed(dist.get_rank())
        timed = build(case, generator)
        cpu, walls = turns(case, timed, rounds, generator)
        rows += [
            {"world": dist.get_world_size(), "model": name, "name": contender, **row}
            for contender, row in summarize(cpu, walls).items()
        ]
        for row in rows:
            if row["model"] == name:
                row["phases_ms"] = phases(timed[row["name"]].phases[WARM_UP:])
        say(f"  {name}: {rounds} rounds of {len(timed)} in turn")
    launch.leave(result, rows)


def build(case: Case, generator: torch.Generator) -> dict[str, Timed]:
    """Build and verify all contenders of a model.

    Args:
        case: the model.
        generator: of this rank's tokens.

    Returns:
        By name, the model without an optimizer among them.
    """
    tokens = [case.tokens(generator) for _ in range(STEPS)]
    timed = {BARE: Timed(Hookless(case.build()))}
    for entry, contender, _, error in verified(case, present(case), tokens):
        say(f"  {case.name}: {entry.name}: verified (error {error:.0e})")
        timed[entry.name] = Timed(contender)
    return timed


def turns(
    case: Case, timed: dict[str, Timed], rounds: int, generator: torch.Generator
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Let all contenders take turns; every rank must call it.

    Args:
        case: the model.
        timed: contenders by name.
        rounds: turns that count.
        generator: of this rank's tokens.

    Returns:
        By contender and round: CPU seconds of a rank on average, and wall seconds of the slowest rank.
    """

    def make_input(_: int) -> Tensor:
        tokens = case.tokens(generator)
        # Nobody waits for a rank that is still at the contender before.
        dist.barrier()
        return tokens

    gc.collect()
    gc.freeze()
    seconds = interleave(timed, make_input, rounds + WARM_UP, _cpu_seconds)
    gc.unfreeze()
    cpu, walls = {}, {}
    for name, own in seconds.items():
        cpu[name] = [statistics.mean(ranks) for ranks in zip(*gathered(own[WARM_UP:]), strict=True)]
        walls[name] = [max(ranks) for ranks in zip(*gathered(timed[name].wall[WARM_UP:]), strict=True)]
    return cpu, walls


def summarize(cpu: dict[str, list[float]], walls: dict[str, list[float]]) -> dict[str, Row]:
    """Subtract the model alone, round by round, and compare with the rival.

    Args:
        cpu: CPU seconds by contender and round.
        walls: wall seconds likewise.

    Returns:
        By contender, quartiles in ms: the optimizer's CPU time of a rank, that of the whole step, the wall time of a
        step, and the ratio of the optimizer's CPU time to the rival's.
    """
    optimizer = {
        name: [whole - bare for whole, bare in zip(own, cpu[BARE], strict=True)] for name, own in cpu.items() if name
    }
    rows = {}
    for name, own in optimizer.items():
        rows[name] = {
            "optimizer_cpu_ms": quartiles([1e3 * value for value in own]),
            "step_cpu_ms": quartiles([1e3 * value for value in cpu[name]]),
            "model_cpu_ms": quartiles([1e3 * value for value in cpu[BARE]]),
            "wall_ms": quartiles([1e3 * value for value in walls[name]]),
            "over_rival": quartiles([value / base for value, base in zip(own, optimizer[RIVAL], strict=True)]),
        }
    return rows


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Summarize.

    Args:
        values: two or more.

    Returns:
        Median, first and third quartile.
    """
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def phases(taken: Sequence[dict[str, float]]) -> dict[str, float]:
    """Summarize DistMuon's clock; every rank must call it.

    Args:
        taken: seconds by phase, for each step of this rank.

    Returns:
        Median ms by phase, averaged over the ranks; nothing for others.
    """
    own = {phase: 1e3 * statistics.median(step[phase] for step in taken) for phase in (taken[0] if taken else {})}
    ranks = gathered(own)
    return {phase: statistics.mean(of_rank[phase] for of_rank in ranks) for phase in own}


def _cpu_seconds(call: Callable[[], object]) -> float:
    # All threads of the process: those that communicate as well.
    start = time.process_time()
    call()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--worker", type=Path, required=True)
    options = parser.parse_args(arguments)
    worker(options.models.split(","), options.rounds, options.worker)
    return 0


if __name__ == "__main__":
    sys.exit(main())
