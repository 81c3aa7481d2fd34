"""Which gradients decide about a step, and which steps count towards the error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from distmuon import DistMuon, Muon
from distmuon.errors import NonFiniteGradientError, ParameterError
from tests.problems import both


def test_a_frozen_parameter_has_no_say() -> None:
    frozen, weight = Parameter(torch.ones(2, 2), requires_grad=False), Parameter(torch.ones(2, 2))
    optimizer = Muon([("frozen", frozen), ("weight", weight)], lr=0.5, max_grad_norm=1.0)
    frozen.grad, weight.grad = torch.full((2, 2), torch.nan), torch.eye(2)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.equal(weight, torch.ones(2, 2))


@both
@pytest.mark.parametrize(("scale", "raises"), [(2.0, False), (1.0, True), (0.25, True)])
def test_a_scaler_that_cannot_go_lower_hides_nothing(build: Any, scale: float, raises: bool) -> None:
    weight = Parameter(torch.ones(2, 2))
    optimizer = build([("weight", weight)], max_skipped_steps=2)

    def step() -> None:
        weight.grad = torch.full((2, 2), torch.nan)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    if raises:
        with pytest.raises(NonFiniteGradientError, match='"weight"'):
            step()
    else:
        step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_param_groups_cannot_be_removed() -> None:
    weight, bias = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    optimizer = DistMuon([("weight", weight), ("bias", bias)])
    del optimizer.param_groups[1]
    with pytest.raises(ParameterError, match="1 param groups were removed"):
        optimizer.step()
