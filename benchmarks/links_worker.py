"""One rank of the link benchmark: does what the parent writes to its standard input, a JSON object a line."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distmuon.benchmarks import launch
from distmuon.benchmarks.links_model import PAYLOAD, predict_all, wire_bytes
from distmuon.benchmarks.links_probe import Ring
from distmuon.benchmarks.links_sends import entries, sends
from distmuon.benchmarks.loops import Contender
from distmuon.benchmarks.models import CASES
from distmuon.benchmarks.namespaces import INTERFACE
from distmuon.benchmarks.tracer import Tracer
from distmuon.benchmarks.verify import run, verified
from distmuon.predict import Link

_SENT = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
_VERIFIED_STEPS = 2
_REPEATS = 9


class Rank:
    """The contenders on this rank; every method but the last two must be called on all ranks at once.

    Args:
        model: name of a case.
        addresses: of all ranks.
    """

    def __init__(self, model: str, addresses: list[str]) -> None:
        launch.join()
        self._case = CASES[model]
        self._tokens = torch.Generator().manual_seed(dist.get_rank())
        self._ring = Ring(dist.get_rank(), addresses)
        self._contenders: dict[str, Contender] = {}

    def make(self) -> list[dict[str, Any]]:
        """Build all contenders; fail unless their ranks are equal and agree with one process.

        Returns:
            What a step of each sends by the ring model.
        """
        tokens = [self._case.tokens(self._tokens) for _ in range(_VERIFIED_STEPS)]
        made = []
        for entry, contender, _, error in verified(self._case, entries(), tokens):
            self._contenders[entry.name] = contender
            with Tracer() as tracer:
                run(contender, tokens[:1])
            made.append({"name": entry.name, "error": error, "traced_bytes": tracer.tally.total_wire()})
        return made

    def step(self, name: str) -> dict[str, Any]:
        """Time one step: forward, backward and update."""
        contender, tokens = self._contenders[name], self._case.tokens(self._tokens)
        clock = getattr(contender.dist_muon, "clock", None)
        if clock is not None:
            clock.clear()
        start = time.perf_counter()
        contender.forward_backward(tokens)
        contender.step()
        end = time.perf_counter()
        phases = {} if clock is None else clock.clear()
        return {
            "start": start,
            "end": end,
            "newton_schulz": phases.get("newton_schulz", 0.0),
            "update": phases.get("momentum", 0.0) + phases.get("apply", 0.0),
        }

    def transfer(self, count: int) -> float:
        """Send plain bytes to the next rank, as all do; seconds."""
        return self._ring.transfer(count)

    def collectives(self) -> dict[str, float]:
        """Time gloo's collectives, and an all-reduce of almost nothing."""
        shard, tiny = torch.zeros(PAYLOAD // 4 // dist.get_world_size()), torch.zeros(1)
        full = shard.repeat(dist.get_world_size())
        return {
            "all_reduce": _seconds(lambda: dist.all_reduce(full)),
            "all_gather": _seconds(lambda: dist.all_gather_into_tensor(full, shard)),
            "tiny": _seconds(lambda: dist.all_reduce(tiny)),
        }

    def sent(self) -> int:
        """Bytes that have left this rank's interface, headers included."""
        return int(_SENT.read_text())

    def predict(
        self, name: str, wall: float, rest: tuple[float, float], links: list[dict[str, float]]
    ) -> dict[str, Any]:
        """Predict steps from one without a limit; the plan is the one that this rank carries out."""
        world, sent = dist.get_world_size(), sends(self._contenders[name])
        return {
            "planned_bytes": wire_bytes(sent, world),
            "seconds": predict_all(
                wall, rest, sent, world, [Link(link["bandwidth"], link["latency"]) for link in links]
            ),
        }


def main() -> None:
    """Answer until the input ends."""
    # Libraries print; what the parent reads must be ours alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank: Rank | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if rank is None:
            rank, answer = Rank(**asked), None
        else:
            answer = getattr(rank, asked.pop("do"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
