"""What a step of every contender sends, computes and keeps: counted, not timed; each is verified first.

What the model does without an optimizer is counted, too, and subtracted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.benchmarks import launch
from distmuon.benchmarks.contenders import Entry
from distmuon.benchmarks.counting import count, count_flops, flops_once, minus
from distmuon.benchmarks.launch import Row, gathered, say
from distmuon.benchmarks.loops import Contender, Hookless
from distmuon.benchmarks.models import CASES, Case
from distmuon.benchmarks.verify import present, run, verified

ITEMSIZE = 4
# Newton-Schulz inputs travel in bfloat16.
INPUT_ITEMSIZE = 2
STEPS = 2
Accountant = Callable[[Entry, Contender, dict[str, Tensor]], Row]


class Communication:
    """Accounts for collectives and bytes.

    Args:
        case: the model.
        tokens: this rank's micro-batches.
    """

    def __init__(self, case: Case, tokens: Sequence[Tensor]) -> None:
        self._tokens = tokens
        self._bare = count(Hookless(case.build()), tokens)

    def __call__(self, entry: Entry, contender: Contender, found: dict[str, Tensor]) -> Row:
        """Count a contender's step; every rank must call it.

        Args:
            entry: who.
            contender: some steps old: the first ones may set things up.
            found: its parameters.

        Returns:
            Part of a row; lists are by rank.
        """
        bare, counts = self._bare, count(contender, self._tokens)
        world, elements = dist.get_world_size(), sum(parameter.numel() for parameter in found.values())
        wire = gathered(counts.tally.total_wire() - bare.tally.total_wire())
        ideal = 2 * ITEMSIZE * elements * (world - 1) / world
        return {
            "elements": elements,
            "wire_bytes": sum(wire) / world,
            "ratio": sum(wire) / world / ideal,
            "busiest_ratio": max(wire) / ideal,
            "sent_ratio": (counts.sent - bare.sent) / world / ideal,
            "calls": minus(counts.tally.calls, bare.tally.calls),
            "own_calls": counts.own_calls,
            "late_reductions": counts.late - bare.late,
            "wire_by_rank": wire,
            "guard_bytes": counts.guard,
            "plan": planned_traffic(contender),
        }


class Memory:
    """Accounts for optimizer state and for the work of Newton-Schulz.

    Args:
        case: the model.
        tokens: this rank's micro-batches.
    """

    def __init__(self, case: Case, tokens: Sequence[Tensor]) -> None:
        self._twin = Hookless(case.build())
        self._tokens = tokens[0]
        self._once: dict[object, int] = {None: 0}

    def __call__(self, entry: Entry, contender: Contender, found: dict[str, Tensor]) -> Row:
        """Count a contender's state and FLOPs; every rank must call it.

        Args:
            entry: who.
            contender: the contender.
            found: its parameters.

        Returns:
            Part of a row; lists are by rank.
        """
        # With the same weights, so that the same tokens go to the same experts.
        with torch.no_grad():
            for name, parameter in self._twin.model.named_parameters():
                parameter.copy_(found[name])
        flops = count_flops(lambda: run(contender, [self._tokens])) - count_flops(
            lambda: run(self._twin, [self._tokens])
        )
        if entry.orthogonalize not in self._once:
            self._once[entry.orthogonalize] = flops_once(entry.orthogonalize, self._twin.model)
        return {
            "elements": sum(parameter.numel() for parameter in found.values()),
            "state_bytes": gathered(sum(tensor.nbytes for tensor in contender.state())),
            "ns_flops": gathered(flops),
            "ns_flops_once": self._once[entry.orthogonalize],
            "plan": gathered(planned_memory(contender)),
        }


PARTS: dict[str, Callable[[Case, Sequence[Tensor]], Accountant]] = {"comm": Communication, "memory": Memory}


def worker(part: str, models: Sequence[str], result: Path) -> None:
    """Account for every contender on every model; rank 0 writes the rows.

    Args:
        part: what to account for.
        models: names of cases.
        result: where to.
    """
    launch.join()
    rows = []
    for name in models:
        case = CASES[name]
        generator = torch.Generator().manual_seed(dist.get_rank())
        tokens = [case.tokens(generator) for _ in range(STEPS)]
        accountant = PARTS[part](case, tokens)
        for entry, contender, found, error in verified(case, present(case), tokens):
            row = accountant(entry, contender, found)
            say(f"  {name}: {entry.name}: verified (error {error:.0e}) and counted")
            rows.append({"world": dist.get_world_size(), "model": name, "name": entry.name, "error": error, **row})
    launch.leave(result, rows)


def planned_traffic(contender: Contender) -> Row | None:
    """What DistMuon knew of its traffic before the run.

    Args:
        contender: who.

    Returns:
        The bytes of every rank, without the guard's, and the buckets; None for others.
    """
    if contender.dist_muon is None:
        return None
    plans, ranks = contender.dist_muon.plans, range(dist.get_world_size())
    return {
        "transport": "/".join(plan.transport for plan in plans),
        "buckets": sum(len(plan.buckets) for plan in plans),
        "padding": sum(plan.padding for plan in plans),
        "wire_by_rank": [
            sum(
                2 * plan.shard_bytes(ITEMSIZE)
                + plan.completion_bytes(rank, INPUT_ITEMSIZE)
                + plan.team_bytes(rank, INPUT_ITEMSIZE)
                for plan in plans
            )
            for rank in ranks
        ],
    }


def planned_memory(contender: Contender) -> Row | None:
    """What DistMuon knew of this rank's state and work before the run.

    Args:
        contender: who.

    Returns:
        Bytes and FLOPs; None for others.
    """
    if contender.dist_muon is None:
        return None
    rank, plans = dist.get_rank(), contender.dist_muon.plans
    return {
        "state_bytes": sum(plan.state_bytes(rank, ITEMSIZE) for plan in plans),
        "ns_flops": sum(plan.newton_schulz_flops(rank) for plan in plans),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--worker", type=Path, required=True)
    options = parser.parse_args(arguments)
    worker(options.part, options.models.split(","), options.worker)
    return 0


if __name__ == "__main__":
    sys.exit(main())
