"""Counts of one step on this rank: collectives, bytes that leave, and FLOPs of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distmuon.benchmarks import optimizers
from distmuon.benchmarks.launch import sent_bytes
from distmuon.benchmarks.loops import Contender
from distmuon.benchmarks.tracer import Tally, Tracer
from distmuon.benchmarks.verify import run

_REDUCTIONS = ("reduce_scatter", "reduce_scatter_base", "reduce", "allreduce", "allreduce_coalesced")


@dataclass
class Counts:
    """What a step on this rank amounts to."""

    tally: Tally
    late: int
    """Reductions of gradients that were issued inside step()."""
    own_calls: int
    """Calls by DistMuon's own tally, which takes a group of collectives for one."""
    guard: int
    """Bytes of DistMuon's norms and flags, by its own tally."""
    sent: float
    """Bytes that left all ranks."""


def count(contender: Contender, tokens: Sequence[Tensor]) -> Counts:
    """Count the collectives of a step; every rank must call it.

    Args:
        contender: who.
        tokens: this rank's micro-batches.

    Returns:
        The counts.
    """
    own = contender.dist_muon
    if own is not None:
        own.traffic.reset()
    with Tracer() as tracer:
        contender.forward_backward(tokens[0])
        before = reductions(tracer.tally, own)
        contender.step()
        late = reductions(tracer.tally, own) - before
    costs = [] if own is None else list(own.traffic.costs.items())
    own_calls = sum(cost.calls for _, cost in costs)
    guard = sum(cost.wire for key, cost in costs if (key.collective, key.dtype) == ("all_reduce", "float64"))
    sent = sent_bytes(lambda: run(contender, tokens)) / len(tokens)
    return Counts(tracer.tally, late, own_calls, guard, sent)


def reductions(tally: Tally, dist_muon: Any) -> int:
    """Count the reductions of gradients so far.

    Args:
        tally: what the tracer saw.
        dist_muon: the optimizer, whose own tally tells reductions from exchanges that look alike; or None.

    Returns:
        Calls.
    """
    if dist_muon is not None:
        costs = dist_muon.traffic.costs.items()
        return sum(cost.calls for key, cost in costs if key.collective == "reduce_scatter")
    return sum(tally.large_calls.get(name, 0) for name in _REDUCTIONS)


def minus(calls: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    """Take away calls.

    Args:
        calls: by collective.
        others: those that do not count.

    Returns:
        What is left, without zeros.
    """
    left = {name: number - others.get(name, 0) for name, number in calls.items()}
    return {name: number for name, number in left.items() if number}


def count_flops(work: Callable[[], object]) -> int:
    """Count the multiplications and additions of matrix products.

    Args:
        work: what to do meanwhile.

    Returns:
        FLOPs on this rank.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def flops_once(orthogonalize: Callable[[Tensor], object] | None, model: nn.Module) -> int:
    """Count the FLOPs of orthogonalizing every matrix once.

    Args:
        orthogonalize: how; None does nothing.
        model: the model.

    Returns:
        FLOPs.
    """
    if orthogonalize is None:
        return 0
    matrices = [parameter.detach() for parameter in optimizers.muon_matrices(model)]
    return count_flops(lambda: [orthogonalize(matrix) for matrix in matrices])
