"""Which buckets are orthogonalized together, between the all-gathers of those before and those after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distmuon.plan import BucketPlan

# Elements of matrices, per rank, from which a batch of one shape keeps a device busy by itself.
CPU_NUMEL, GPU_NUMEL = 2**20, 2**22
# Bytes of all-gathers under way beyond which a step waits for the first of them.
IN_FLIGHT_BYTES = 2**30


def make_waves(buckets: Sequence[BucketPlan], least: int) -> Iterator[list[int]]:
    """Group consecutive buckets; every rank finds the same groups.

    A wave has matrices enough for two of the largest on every rank: were buckets taken one by one, those whose matrices
    lie on one rank would keep all others waiting for it.

    Args:
        buckets: in the order of their launch.
        least: elements of matrices per rank that a wave has at least.

    Yields:
        Indices of the buckets of a wave.
    """
    largest = max((matrix.numel for bucket in buckets for matrix in bucket.matrices), default=0)
    wave: list[int] = []
    numel = 0
    for index, bucket in enumerate(buckets):
        wave.append(index)
        numel += sum(matrix.numel for matrix in bucket.matrices) // len(bucket.lengths)
        if numel >= max(least, 2 * largest):
            yield wave
            wave, numel = [], 0
    if wave:
        yield wave
