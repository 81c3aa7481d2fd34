"""Held-out loss of a model whose ranks evaluate together.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from distmuon.train.data import TokenData, gather, validation_ids


class Score(NamedTuple):
    """Mean next-token loss in nats and share of correct predictions."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: Any, data: TokenData, context: int, sequences: int, micro_sequences: int) -> Score:
    """Score a model on fixed validation sequences, spread over the ranks.

    Args:
        model: a ``MoETransformer``; every rank must call.
        data: the tokens.
        context: positions per sequence.
        sequences: number of sequences, the same ones at any world size.
        micro_sequences: sequences per forward pass.

    Returns:
        The score, equal on all ranks.
    """
    device = next(model.parameters()).device
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = validation_ids(data.val.size, context, sequences)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for start in range(0, sequences, world * micro_sequences):
        first = start + rank * micro_sequences
        mine = ids[first : first + micro_sequences]
        # Experts live on other ranks, so a rank without sequences left still takes part; its result does not count.
        x_BT, y_BT = gather(data.val, mine if len(mine) else ids[:1], context)
        logits_BTV = model.logits(x_BT.to(device))[0].float()
        if len(mine):
            targets = y_BT.to(device).flatten()
            logits = logits_BTV.flatten(0, 1)
            totals[0] += F.cross_entropy(logits, targets, reduction="sum").double()
            totals[1] += (logits.argmax(-1) == targets).sum()
            totals[2] += targets.numel()
    model.train(training)
    dist.all_reduce(totals)
    loss, correct, count = totals.tolist()
    return Score(loss / count, correct / count)


def bits_per_byte(loss: float, data: TokenData) -> float | None:
    """Convert nats per token to bits per byte of text.

    Args:
        loss: nats per token.
        data: the tokens; None is returned where their text is not known.

    Returns:
        Bits per byte.
    """
    return None if data.bytes_per_token is None else float(loss / np.log(2) / data.bytes_per_token)
