"""Matrices of a step, gathered by shape over all buckets: one Newton-Schulz call per shape."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.bricks import Matrix
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz

# Device, rows and columns of matrices that can be one batch.
Kind = tuple[torch.device, int, int]


class ShapeBatches:
    """Orthogonalizes all matrices of one shape when the first of them is asked for.

    So the buckets whose shapes are done can be applied and all-gathered while others are computed.

    Args:
        ns: Newton-Schulz settings.
    """

    def __init__(self, ns: NewtonSchulz) -> None:
        self._ns = ns
        self._buckets: list[dict[Matrix, Tensor]] = []
        self._largest: list[dict[Matrix, Tensor]] = []
        self._done: list[dict[Matrix, Tensor]] = []

    def add(self, matrices: dict[Matrix, Tensor], largest: dict[Matrix, Tensor]) -> None:
        """Take over the matrices of the next bucket.

        Args:
            matrices: [rows, cols] inputs; emptied as they are computed.
            largest: the largest magnitude in those where it is known, float32 scalars.
        """
        self._buckets.append(matrices)
        self._largest.append(largest)
        self._done.append({})

    def take(self, bucket: int) -> dict[Matrix, Tensor]:
        """Hand over the orthogonalized matrices of a bucket.

        Args:
            bucket: its index; each is taken once.

        Returns:
            [rows, cols] polar factors of all its matrices.
        """
        while self._buckets[bucket]:
            self._compute(_kind(*next(iter(self._buckets[bucket].items()))))
        done, self._done[bucket] = self._done[bucket], {}
        return done

    def _compute(self, kind: Kind) -> None:
        chosen = [
            (index, matrix)
            for index, matrices in enumerate(self._buckets)
            for matrix, x_MN in matrices.items()
            if _kind(matrix, x_MN) == kind
        ]
        x_BMN = torch.stack([self._buckets[index].pop(matrix) for index, matrix in chosen])
        known = [self._largest[index][matrix] for index, matrix in chosen if matrix in self._largest[index]]
        largest_B = torch.stack(known) if len(known) == len(chosen) else None
        for (index, matrix), o_MN in zip(chosen, orthogonalize(x_BMN, self._ns, largest_B).unbind(0), strict=True):
            self._done[index][matrix] = o_MN


def _kind(matrix: Matrix, x_MN: Tensor) -> Kind:
    return x_MN.device, matrix.rows, matrix.cols
