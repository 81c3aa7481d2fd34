"""Phases 3 to 7 of a step over all buckets: what is computed while what is on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distmuon import phases
from distmuon.adamw import AdamWRule
from distmuon.batches import ShapeBatches
from distmuon.clock import PhaseClock
from distmuon.forward_overlap import ForwardOverlap
from distmuon.ns_settings import NewtonSchulz
from distmuon.reducer import BucketReduction
from distmuon.team import orthogonalize_slices

# Elements of matrices, per rank, from which a batch of one shape keeps a device busy by itself. What is gathered
# while the next wave computes is worth more than a larger batch.
WAVE_NUMEL = {"cpu": 2**20, "cuda": 2**22}


def waves(reductions: Sequence[BucketReduction]) -> Iterator[list[int]]:
    """Group consecutive buckets whose matrices are worth being orthogonalized together.

    Args:
        reductions: in the order of their launch.

    Yields:
        Indices of the buckets of a wave; the same on all ranks.
    """
    wave: list[int] = []
    numel = 0
    for index, reduction in enumerate(reductions):
        bucket = reduction.bucket
        wave.append(index)
        numel += sum(matrix.numel for matrix in bucket.plan.matrices) // bucket.world
        if numel >= WAVE_NUMEL.get(bucket.device.type, WAVE_NUMEL["cuda"]):
            yield wave
            wave, numel = [], 0
    if wave:
        yield wave


def update(
    reductions: Sequence[BucketReduction],
    settings: phases.Settings,
    coefficient: float,
    ns: NewtonSchulz,
    adamw: AdamWRule,
    clock: PhaseClock,
    overlap: ForwardOverlap,
) -> None:
    """Update this rank's shards and gather everybody's.

    Args:
        reductions: with the mean gradients, which are used up.
        settings: settings by param group.
        coefficient: factor from mean to unscaled and clipped gradients.
        ns: Newton-Schulz settings.
        adamw: the AdamW rule.
        clock: takes the time of the phases.
        overlap: takes over the all-gathers.
    """
    for wave in waves(reductions):
        batches = ShapeBatches(ns)
        slices = []
        for index in wave:
            bucket, group, grad = reductions[index].bucket, reductions[index].group, reductions[index].mean
            assert grad is not None
            if coefficient != 1.0:
                grad.mul_(coefficient)
            with clock("momentum", bucket=index):
                inputs, largest = phases.momentum(bucket, grad, settings, ns)
            with clock("complete", bucket=index):
                batches.add(phases.complete(bucket, inputs, group), largest)
            with clock("newton_schulz", bucket=index):
                slices.append(orthogonalize_slices(bucket, inputs, group, ns))
        for place, index in enumerate(wave):
            bucket, group = reductions[index].bucket, reductions[index].group
            with clock("newton_schulz", bucket=index):
                directions = batches.take(place) | slices[place]
            with clock("apply", bucket=index):
                full = phases.apply(bucket, reductions[index].take_mean(), directions, settings, adamw)
            with clock("gather", bucket=index):
                pending = group.all_gather(full, bucket.plan.lengths)
            overlap.add(bucket, pending)
    if not overlap.active:
        overlap.wait()
