"""The phases of a step between the guard and the all-gather, for one bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.adamw import AdamWRule
from distmuon.blocks import blocks
from distmuon.bricks import Matrix
from distmuon.bucket import Bucket, Span
from distmuon.comm import Group
from distmuon.completion import assemble, outgoing
from distmuon.config import GroupSettings
from distmuon.kernels import host
from distmuon.newton_schulz import INPUT_DTYPES
from distmuon.ns_settings import NewtonSchulz
from distmuon.scaling import rms_matched_scale
from distmuon.update import apply_, momentum_

Settings = Sequence[GroupSettings]


def momentum(bucket: Bucket, grad: Tensor, settings: Settings, ns: NewtonSchulz) -> tuple[Tensor, dict[Matrix, Tensor]]:
    """Advance the momentum of the shard's matrices.

    Args:
        bucket: this rank's bucket.
        grad: [shard] float32 mean gradient.
        settings: settings by param group.
        ns: Newton-Schulz settings, which decide the dtype that inputs travel in.

    Returns:
        [shard] Newton-Schulz inputs, in which elements that belong to AdamW have no meaning, and the largest magnitude
        in each matrix that lies here whole, if a kernel measured it on the way.
    """
    inputs = torch.empty_like(grad, dtype=INPUT_DTYPES[ns.dtype])
    largest: dict[Matrix, Tensor] = {}
    fused = host.fused_momentum(grad.device, ns.kernels)
    if fused is None:
        for span in bucket.spans:
            if span.kind == "muon":
                group = settings[span.group]
                for part in blocks(span.part, grad.device):
                    state = bucket.first_moment[part]
                    inputs[part] = momentum_(state, grad[part], group.momentum, group.nesterov)
        return inputs, largest
    for held in bucket.held:
        group, state = settings[held.group], bucket.first_moment[held.part]
        values, partials = fused(state, grad[held.part], group.momentum, group.nesterov, inputs.dtype)
        inputs[held.part] = values
        if held.length == held.matrix.numel:
            largest[held.matrix] = partials[:, 0].amax()
    return inputs, largest


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
    if bucket.plan.cut:
        received = group.all_to_all(*outgoing(bucket, inputs)).wait()
    return assemble(bucket, inputs, received)


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
        [full] buffer in the parameters' dtype, of which this rank's shard is filled in.
    """
    full = bucket.take_buffer(bucket.dtype)
    weights = bucket.load_weights(full)
    for group_number in bucket.updates:
        bucket.updates[group_number] += 1
    for held in bucket.held:
        group = settings[held.group]
        direction = directions[held.matrix].reshape(-1)[held.within : held.within + held.length]
        scale = rms_matched_scale(held.matrix.rows, held.matrix.cols)
        own = weights[held.part]
        for part in blocks(slice(0, held.length), bucket.device):
            apply_(own[part], direction[part], group.lr, scale, group.weight_decay)
    for span in bucket.spans:
        if span.kind == "adamw":
            _apply_adamw(bucket, span, weights, grad, settings[span.group], adamw)
    if bucket.master is not None:
        full[bucket.own].copy_(weights)
    return full


def _apply_adamw(
    bucket: Bucket, span: Span, weights: Tensor, grad: Tensor, group: GroupSettings, adamw: AdamWRule
) -> None:
    second = bucket.second_moment[span.second_moment_part]
    for part in blocks(slice(0, span.length), bucket.device):
        adamw(
            weights[span.part][part],
            grad[span.part][part],
            bucket.first_moment[span.part][part],
            second[part],
            step=bucket.updates[span.group],
            lr=group.lr,
            betas=group.betas,
            eps=group.eps,
            weight_decay=group.weight_decay,
        )
