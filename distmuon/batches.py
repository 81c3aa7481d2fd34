"""Matrices of several buckets, gathered by shape: one Newton-Schulz call per shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distmuon.bricks import Matrix
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz

# Device, rows and columns of matrices that can be one batch.
Kind = tuple[torch.device, int, int]


def orthogonalize_by_shape(
    buckets: Sequence[dict[Matrix, Tensor]], largest: Sequence[Mapping[Matrix, Tensor]], ns: NewtonSchulz
) -> list[dict[Matrix, Tensor]]:
    """Orthogonalize the matrices of several buckets.

    Args:
        buckets: [rows, cols] inputs of each bucket; emptied as they are computed.
        largest: for each bucket the largest magnitude in those matrices where it is known, float32 scalars.
        ns: Newton-Schulz settings.

    Returns:
        For each bucket the [rows, cols] polar factors of all its matrices.
    """
    kinds: dict[Kind, list[tuple[int, Matrix]]] = {}
    for index, matrices in enumerate(buckets):
        for matrix, x_MN in matrices.items():
            kinds.setdefault((x_MN.device, matrix.rows, matrix.cols), []).append((index, matrix))
    done: list[dict[Matrix, Tensor]] = [{} for _ in buckets]
    for chosen in kinds.values():
        x_BMN = torch.stack([buckets[index].pop(matrix) for index, matrix in chosen])
        known = [largest[index][matrix] for index, matrix in chosen if matrix in largest[index]]
        largest_B = torch.stack(known) if len(known) == len(chosen) else None
        for (index, matrix), o_MN in zip(chosen, orthogonalize(x_BMN, ns, largest_B).unbind(0), strict=True):
            done[index][matrix] = o_MN
    return done
