"""Newton-Schulz of a matrix by a team: each rank has a slice of the long side, and only X X^T is summed over the team.

All teams of a bucket go through their rounds together: two exchanges a round, however many matrices there are. A rank
without a slice takes part with nothing to send, so that all ranks issue the same collectives.

Shapes: M the short side, N this rank's part of the long side, B = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distmuon.bricks import Matrix, even_parts
from distmuon.bucket import Bucket
from distmuon.comm import Group
from distmuon.iteration import segments
from distmuon.kernels import host
from distmuon.newton_schulz import DTYPES, find_products, largest_magnitude, prescale
from distmuon.ns_settings import NewtonSchulz
from distmuon.schedule import make_schedule


@torch.no_grad()
def orthogonalize_slices(bucket: Bucket, inputs: Tensor, group: Group, ns: NewtonSchulz) -> dict[Matrix, Tensor]:
    """Orthogonalize the bucket's team matrices; every rank of the group must call it.

    Args:
        bucket: this rank's bucket.
        inputs: [shard] Newton-Schulz inputs. Not written to.
        group: the ranks that share the bucket.
        ns: Newton-Schulz settings; float16 is not supported.

    Returns:
        For each of this rank's slices its part of the polar factor, 1-D, in the order of the shard.
    """
    teams = [matrix for matrix in bucket.plan.matrices if matrix.team]
    if not teams:
        return {}
    slices = {held.matrix: _as_wide(held.matrix, inputs[held.part]) for held in bucket.held if held.matrix.team}
    dtype, products = DTYPES[ns.dtype], find_products(bucket.device, ns)
    done: dict[Matrix, Tensor] = {}
    with torch.autocast(bucket.device.type, enabled=False), host.precision(bucket.device, dtype):
        running = {}
        for matrix, x_BMN in _prescale(teams, slices, group, dtype, bucket.device).items():
            schedule = make_schedule(ns, matrix.short, max(matrix.slices), products.symmetric_fraction)
            running[matrix] = segments(x_BMN, schedule, products)
        grams = {matrix: next(steps) for matrix, steps in running.items()}
        for done_rounds in range(max(matrix.rounds for matrix in teams)):
            under_way = [matrix for matrix in teams if matrix.rounds > done_rounds]
            summed = sum_over_teams(under_way, grams, group, torch.empty(0, dtype=dtype, device=bucket.device))
            grams = {}
            for matrix, gram_BMM in summed.items():
                try:
                    grams[matrix] = running[matrix].send(gram_BMM)
                except StopIteration as end:
                    done[matrix] = _from_wide(matrix, end.value)
    return done


def sum_over_teams(
    teams: Sequence[Matrix], partial: Mapping[Matrix, Tensor], group: Group, empty: Tensor
) -> dict[Matrix, Tensor]:
    """Sum a square per matrix over its holders: reduce-scatter, then all-gather, within every team at once.

    Args:
        teams: all team matrices that take part, on every rank the same.
        partial: [1, M, M] of those that this rank holds a slice of.
        group: the ranks.
        empty: no elements, of the dtype and on the device of the squares.

    Returns:
        [1, M, M] sums of the matrices in ``partial``, equal on all their holders.
    """
    rank, ranks = group.rank, range(group.size)
    own = [matrix for matrix in teams if rank in matrix.holders]
    chunks = {matrix: _chunks(matrix) for matrix in own}
    together = {other: [m for m in own if other in m.holders and other != rank] for other in ranks}

    def exchange(parts: dict[int, list[Tensor]], counts: dict[int, int]) -> Tensor:
        flat = [part for other in ranks for part in parts[other]]
        sent = [sum(part.numel() for part in parts[other]) for other in ranks]
        return group.all_to_all(torch.cat(flat) if flat else empty, sent, [counts[other] for other in ranks]).wait()

    flat = {matrix: partial[matrix].reshape(-1) for matrix in own}
    received = exchange(
        {other: [flat[m][chunks[m][other]] for m in together[other]] for other in ranks},
        {other: sum(_length(chunks[m][rank]) for m in together[other]) for other in ranks},
    )
    sums: dict[Matrix, dict[int, Tensor]] = {m: {rank: flat[m][chunks[m][rank]].float()} for m in own}
    offset = 0
    for other in ranks:
        for matrix in together[other]:
            length = _length(chunks[matrix][rank])
            sums[matrix][other] = received[offset : offset + length].float()
            offset += length
    # In the order of the ranks, so that the sum does not depend on who computes it.
    chunk = {m: torch.stack([parts[r] for r in sorted(parts)]).sum(dim=0).to(empty.dtype) for m, parts in sums.items()}
    gathered = exchange(
        {other: [chunk[m] for m in together[other]] for other in ranks},
        {other: sum(_length(chunks[m][other]) for m in together[other]) for other in ranks},
    )
    whole = {matrix: torch.empty_like(flat[matrix]) for matrix in own}
    for matrix in own:
        whole[matrix][chunks[matrix][rank]] = chunk[matrix]
    offset = 0
    for other in ranks:
        for matrix in together[other]:
            part = chunks[matrix][other]
            whole[matrix][part] = gathered[offset : offset + _length(part)]
            offset += _length(part)
    return {matrix: whole[matrix].view_as(partial[matrix]) for matrix in own}


def _chunks(matrix: Matrix) -> dict[int, slice]:
    """The part of the flat square that each holder sums."""
    edges = [0, *itertools.accumulate(even_parts(matrix.short**2, len(matrix.holders)))]
    return {holder: slice(*edge) for holder, edge in zip(matrix.holders, itertools.pairwise(edges), strict=True)}


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _as_wide(matrix: Matrix, flat: Tensor) -> Tensor:
    """A slice as [1, M, N]; a tall matrix was cut into blocks of rows, which are columns of its transpose."""
    if matrix.rows >= matrix.cols:
        return flat.view(1, -1, matrix.short).mT.contiguous()
    return flat.view(1, matrix.short, -1)


def _from_wide(matrix: Matrix, x_BMN: Tensor) -> Tensor:
    return (x_BMN.mT if matrix.rows >= matrix.cols else x_BMN).reshape(-1)


def _prescale(
    teams: Sequence[Matrix],
    slices: Mapping[Matrix, Tensor],
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Matrix, Tensor]:
    """Divide all slices of a matrix by the same power of two, which the largest element in any of them decides."""
    largest = torch.zeros(len(teams), device=device)
    for place, matrix in enumerate(teams):
        if matrix in slices:
            largest[place] = largest_magnitude(slices[matrix]).float().view(())
    group.all_reduce_max(largest)
    return {
        matrix: prescale(slices[matrix], dtype, largest[place, None], matrix.long)
        for place, matrix in enumerate(teams)
        if matrix in slices
    }
