"""The global gradient norm and the factor that clips it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """Global norm of the gradients, infinite if any of them is not finite, and whether all are."""

    norm: float
    finite: bool


def judge(sum_of_squares: float) -> Verdict:
    """Turn a sum of squares into a norm.

    Args:
        sum_of_squares: over all gradients, computed in float64.

    Returns:
        The norm, rounded to float32 so that the order in which the sum was taken cannot show, and whether it is finite.
    """
    if not math.isfinite(sum_of_squares):
        return Verdict(math.inf, False)
    norm = math.sqrt(sum_of_squares)
    rounded = torch.tensor(norm, dtype=torch.float32).item()
    return Verdict(rounded if math.isfinite(rounded) else norm, True)


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Factor that clips gradients of a norm.

    Args:
        norm: global norm of the gradients.
        limit: largest norm; None does not clip.

    Returns:
        min(1, limit / (norm + 1e-6)), with the 1e-6 of torch.nn.utils.clip_grad_norm_.
    """
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
