"""The phases of a step between the guard and the all-gather, for one bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.adamw import AdamWRule
from distmuon.bucket import Bucket
from distmuon.comm import Group, Pending
from distmuon.completion import assemble, outgoing
from distmuon.config import GroupSettings, NewtonSchulz
from distmuon.newton_schulz import INPUT_DTYPES, orthogonalize
from distmuon.plan import Matrix
from distmuon.scaling import rms_matched_scale
from distmuon.update import apply_, momentum_

Settings = Sequence[GroupSettings]


def momentum(bucket: Bucket, grad: Tensor, settings: Settings, ns: NewtonSchulz) -> Tensor:
    """Advance the momentum of the shard's matrices.

    Args:
        bucket: this rank's bucket.
        grad: [shard] float32 mean gradient.
        settings: settings by param group.
        ns: Newton-Schulz settings, which decide the dtype that inputs travel in.

    Returns:
        [shard] Newton-Schulz inputs; elements that belong to AdamW are zero.
    """
    inputs = torch.zeros_like(grad, dtype=INPUT_DTYPES[ns.dtype])
    for span in bucket.spans:
        if span.kind == "muon":
            group = settings[span.group]
            state = bucket.first_moment[span.part]
            inputs[span.part] = momentum_(state, grad[span.part], group.momentum, group.nesterov)
    return inputs


def complete(bucket: Bucket, inputs: Tensor, group: Group) -> dict[Matrix, Tensor]:
    """Fetch the missing pieces of matrices that cross a shard edge.

    Args:
        bucket: this rank's bucket.
        inputs: [shard] Newton-Schulz inputs.
        group: the ranks that share the bucket.

    Returns:
        Every matrix that this rank holds a piece of, [rows, cols].
    """
    received = inputs[:0]
    if any(matrix.cut for matrix in bucket.plan.matrices):
        received = group.all_to_all(*outgoing(bucket, inputs)).wait()
    return assemble(bucket, inputs, received)


def orthogonalize_all(matrices: dict[Matrix, Tensor], ns: NewtonSchulz) -> dict[Matrix, Tensor]:
    """Orthogonalize matrices, those of one shape in one batch.

    Args:
        matrices: [rows, cols] inputs.
        ns: Newton-Schulz settings.

    Returns:
        [rows, cols] polar factors under the same keys.
    """
    by_shape: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        by_shape.setdefault((matrix.rows, matrix.cols), []).append(matrix)
    directions: dict[Matrix, Tensor] = {}
    for same in by_shape.values():
        o_BMN = orthogonalize(torch.stack([matrices[matrix] for matrix in same]), ns)
        directions.update(zip(same, o_BMN.unbind(0), strict=True))
    return directions


def apply(
    bucket: Bucket, grad: Tensor, directions: dict[Matrix, Tensor], settings: Settings, adamw: AdamWRule
) -> Tensor:
    """Update this rank's own weights: Muon on its pieces of matrices, AdamW on the rest.

    Args:
        bucket: this rank's bucket.
        grad: [shard] float32 mean gradient.
        directions: orthogonalized matrices.
        settings: settings by param group.
        adamw: the AdamW rule.

    Returns:
        [shard] updated float32 weights.
    """
    weights = bucket.weights()
    bucket.updates += 1
    for held in bucket.held:
        group = settings[held.group]
        direction = directions[held.matrix].reshape(-1)[held.within : held.within + held.length]
        scale = rms_matched_scale(held.matrix.rows, held.matrix.cols)
        apply_(weights[held.part], direction, group.lr, scale, group.weight_decay)
    for span in bucket.spans:
        if span.kind == "adamw":
            group = settings[span.group]
            adamw(
                weights[span.part],
                grad[span.part],
                bucket.first_moment[span.part],
                bucket.second_moment[span.second_moment_part],
                step=bucket.updates,
                lr=group.lr,
                betas=group.betas,
                eps=group.eps,
                weight_decay=group.weight_decay,
            )
    return weights


def unpack(gathering: list[tuple[Bucket, Pending]], keep: int) -> None:
    """Write gathered weights into the parameters, oldest bucket first.

    Args:
        gathering: buckets and their all-gathers; finished ones are removed.
        keep: number of all-gathers to leave under way.
    """
    while len(gathering) > keep:
        bucket, pending = gathering.pop(0)
        bucket.unpack(pending.wait())


def gather(bucket: Bucket, weights: Tensor, group: Group) -> Pending:
    """Start collecting the updated weights of all shards in the parameters' own dtype.

    Args:
        bucket: this rank's bucket.
        weights: [shard] float32 weights.
        group: the ranks that share the bucket.

    Returns:
        Handle of the [d * shard] result.
    """
    if bucket.world == 1:
        return Pending(weights.to(bucket.dtype))
    full = weights.new_empty(bucket.world * bucket.plan.shard_numel, dtype=bucket.dtype)
    full[bucket.own].copy_(weights)
    return group.all_gather(full)
