"""Matrices of a shard made whole: which pieces travel where, and how they are put together."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.bricks import Matrix
from distmuon.bucket import Bucket


def outgoing(bucket: Bucket, shard: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Collect the pieces of cut matrices that other ranks need, in the order of receiver, matrix, piece.

    Args:
        bucket: this rank's bucket.
        shard: [shard] Newton-Schulz inputs in the dtype that travels.

    Returns:
        Flat tensor to send, elements for each rank, elements from each rank.
    """
    parts: list[Tensor] = []
    sent, received = [0] * bucket.world, [0] * bucket.world
    for other in range(bucket.world):
        for matrix in _shared(bucket, other):
            for part in bucket.plan.parts(bucket.rank, matrix):
                parts.append(shard[part.offset : part.offset + part.length])
                sent[other] += part.length
            received[other] += sum(part.length for part in bucket.plan.parts(other, matrix))
    return torch.cat(parts) if parts else shard[:0], sent, received


def assemble(bucket: Bucket, shard: Tensor, received: Tensor) -> dict[Matrix, Tensor]:
    """Put every matrix together that this rank holds a piece of, except those of a team.

    Args:
        bucket: this rank's bucket.
        shard: [shard] Newton-Schulz inputs.
        received: what the other ranks' ``outgoing`` sent here; may be empty if no matrix is cut.

    Returns:
        [rows, cols] tensors; views of ``shard`` for whole matrices.
    """
    matrices: dict[Matrix, Tensor] = {}
    for held in bucket.held:
        matrix = held.matrix
        if matrix.team:
            continue
        if not matrix.cut and held.length == matrix.numel:
            matrices[matrix] = shard[held.part].view(matrix.rows, matrix.cols)
            continue
        flat = matrices.setdefault(matrix, shard.new_empty(matrix.rows, matrix.cols)).view(-1)
        flat[held.within : held.within + held.length].copy_(shard[held.part])
    offset = 0
    for other in range(bucket.world) if bucket.plan.cut else ():
        for matrix in _shared(bucket, other):
            flat = matrices[matrix].view(-1)
            for part in bucket.plan.parts(other, matrix):
                flat[part.within : part.within + part.length].copy_(received[offset : offset + part.length])
                offset += part.length
    assert offset == received.numel()
    return matrices


def _shared(bucket: Bucket, other: int) -> list[Matrix]:
    """Cut matrices that both this rank and another hold a piece of."""
    if other == bucket.rank:
        return []
    return [m for m in bucket.plan.cut if bucket.rank in m.holders and other in m.holders]
