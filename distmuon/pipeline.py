"""Phases 3 to 7 of a step over all buckets: what is computed while what is on the way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distmuon import phases
from distmuon.adamw import AdamWRule
from distmuon.batches import orthogonalize_by_shape
from distmuon.bricks import Matrix
from distmuon.clock import PhaseClock
from distmuon.comm import Group
from distmuon.forward_overlap import ForwardOverlap
from distmuon.ns_settings import NewtonSchulz
from distmuon.reducer import BucketReduction
from distmuon.team import orthogonalize_slices
from distmuon.waves import CPU_NUMEL, GPU_NUMEL, make_waves


def agree_on_waves(main: Group, reductions: Sequence[BucketReduction]) -> list[list[int]]:
    """Decide which buckets are orthogonalized together, so that all ranks issue their collectives in one order.

    Args:
        main: all ranks.
        reductions: in the order of their launch.

    Returns:
        Indices of the buckets of each wave; one wave of all where ranks have expert groups of different shapes.
    """
    if not reductions:
        return []
    least = CPU_NUMEL if reductions[0].bucket.device.type == "cpu" else GPU_NUMEL
    found = list(make_waves([reduction.bucket.plan for reduction in reductions], least))
    return found if len(set(main.all_gather_text(repr(found)))) == 1 else [list(range(len(reductions)))]


def update(
    reductions: Sequence[BucketReduction],
    waves: Sequence[Sequence[int]],
    settings: phases.Settings,
    coefficient: float,
    ns: NewtonSchulz,
    adamw: AdamWRule,
    clock: PhaseClock,
    overlap: ForwardOverlap,
) -> None:
    """Update this rank's shards and gather everybody's.

    The matrices of a wave of buckets are orthogonalized while the buckets before are gathered: in the order of the
    reductions, or the other way round if a forward waits for the results, which needs the first parameters first.

    Args:
        reductions: with the mean gradients, which are used up.
        waves: what ``agree_on_waves`` returned.
        settings: settings by param group.
        coefficient: factor from mean to unscaled and clipped gradients.
        ns: Newton-Schulz settings.
        adamw: the AdamW rule.
        clock: takes the time of the phases.
        overlap: takes over the all-gathers.
    """
    forward = [list(wave)[::-1] for wave in waves][::-1]
    for wave in forward if overlap.active else waves:
        for reduction in (reductions[index] for index in wave):
            if coefficient != 1.0 and reduction.mean is not None:
                reduction.mean.mul_(coefficient)
        directions = _orthogonalize(reductions, wave, settings, ns, clock)
        for index, of_bucket in zip(wave, directions, strict=True):
            bucket, group = reductions[index].bucket, reductions[index].group
            with clock("apply", bucket=index):
                full = phases.apply(bucket, reductions[index].take_mean(), of_bucket, settings, adamw)
                of_bucket.clear()
            with clock("gather", bucket=index):
                pending = group.all_gather(full, bucket.plan.lengths)
            overlap.add(bucket, pending)
    if not overlap.active:
        overlap.wait()


def _orthogonalize(
    reductions: Sequence[BucketReduction],
    wave: Sequence[int],
    settings: phases.Settings,
    ns: NewtonSchulz,
    clock: PhaseClock,
) -> list[dict[Matrix, Tensor]]:
    """Momentum, completion and Newton-Schulz of a wave: for each bucket the directions of what this rank holds."""
    inputs, largest, slices = [], [], []
    for index in wave:
        bucket, group, grad = reductions[index].bucket, reductions[index].group, reductions[index].mean
        assert grad is not None
        with clock("momentum", bucket=index):
            advanced, measured = phases.momentum(bucket, grad, settings, ns)
        with clock("complete", bucket=index):
            inputs.append(phases.complete(bucket, advanced, group))
            largest.append(measured)
        with clock("newton_schulz", bucket=index):
            slices.append(orthogonalize_slices(bucket, advanced, group, ns))
    with clock("newton_schulz"):
        whole = orthogonalize_by_shape(inputs, largest, ns)
    return [of_whole | of_slices for of_whole, of_slices in zip(whole, slices, strict=True)]
