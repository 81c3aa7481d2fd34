"""The RMS-matched scale of Moonlight's equation 4."""

from __future__ import annotations

import math

import pytest
import torch

from distmuon.scaling import rms_matched_scale
from tests import oracle


@pytest.mark.parametrize(
    ("rows", "cols", "scale"),
    [(1, 1, 0.2), (4, 4, 0.4), (9, 4, 0.6), (4, 9, 0.6), (1, 100, 2.0), (10_000, 3, 20.0)],
)
def test_by_hand(rows: int, cols: int, scale: float) -> None:
    assert rms_matched_scale(rows, cols) == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
def test_an_exactly_orthogonal_update_has_rms_0_2(shape: tuple[int, int]) -> None:
    """Lemma 1: the polar factor of a full-rank matrix has RMS 1 / sqrt(max(A, B))."""
    exact = oracle.polar(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert oracle.rms(rms_matched_scale(*shape) * exact) == pytest.approx(0.2, rel=1e-9)
    assert math.isclose(oracle.rms(exact), 1 / math.sqrt(max(shape)))
