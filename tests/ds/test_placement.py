"""Placement through DeepSpeed's JSON: splits, policies, and all-gathers under way in the next forward."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ds.engines import WIDTH, advance, build, config, forward, network, weights
from tests.ds.session import attempt
from tests.ranks import RankPool

SMALL_MB = 0.002


class Halves(nn.Module):
    """A linear layer whose weight is two parameters, one above the other."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        top, bottom = torch.chunk(whole.weight.detach().clone(), 2)
        self.top, self.bottom = nn.Parameter(top), nn.Parameter(bottom)
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The same product."""
        return F.linear(x, torch.cat([self.top, self.bottom]), self.bias)


def fused(rank: int, world: int, group: Any, params: dict[str, Any], splits: Any) -> bool:
    """Whether a split layer ends with the bits of two layers."""
    found = []
    for halves in (False, True):
        model = network(None)
        if halves:
            model.hidden = Halves(model.hidden)  # type: ignore[assignment]
        own = {} if halves else {"splits": splits}
        engine = build(config(params={**params, **own}), None, model=model)
        advance(engine, 0, 3)
        after = weights(engine)
        found.append(torch.cat([after["hidden.top"], after["hidden.bottom"]]) if halves else after["hidden.weight"])
    return torch.equal(*found)


@pytest.mark.parametrize("splits", [{"hidden.weight": 2}, {"*.weight": 1, "hidden.*": [8, 8]}], ids=str)
@pytest.mark.parametrize("params", [{}, {"transport": "owner", "bucket_mb": SMALL_MB}, {"policy": "flat"}], ids=str)
def test_a_split_layer_is_two_layers(ds2: RankPool, params: dict[str, Any], splits: Any) -> None:
    assert ds2.run(2, fused, params, splits) == [True, True]


def test_a_split_matters(ds2: RankPool) -> None:
    assert ds2.run(2, fused, {}, {}) == [False, False]


def refused(rank: int, world: int, group: Any, params: dict[str, Any]) -> Any:
    return attempt(lambda: build(config(params=params), None))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"splits": {"nothing.*": 2}}, ['splits["nothing.*"]', '.weight"']),
        ({"splits": {"hidden.weight": 3}}, ['"hidden.weight"', "3 blocks", f"{WIDTH} rows"]),
        ({"splits": {"hidden.weight": [8, 9]}}, ['"hidden.weight"', "[8, 9] rows", f"{WIDTH}"]),
        ({"splits": {"hidden.weight": "two"}}, ["splits", "'two'"]),
        ({"policy": "zigzag"}, ["policy", "'zigzag'", "balanced", "flat", "team"]),
        ({"policy": "flat", "transport": "owner"}, ['transport = "owner"', 'policy = "flat"', "scatter"]),
        ({"overlap_forward": "yes"}, ["overlap_forward", "'yes'"]),
    ],
    ids=str,
)
def test_refusals_say_what_is_legal(ds2: RankPool, params: dict[str, Any], words: list[str]) -> None:
    for classes, message in ds2.run(2, refused, params):
        assert "ValueError" in classes
        assert [word for word in words if word not in message] == []


def overlapped(rank: int, world: int, group: Any, ep: int, params: dict[str, Any]) -> dict[str, Any]:
    """Train with and without overlap_forward; whether the last step left all parameters for the next forward."""
    losses, late, ends = [], [], []
    for overlap in (False, True):
        engine = build(config(params={**params, "overlap_forward": overlap}, gradient_accumulation_steps=2), ep)
        seen = advance(engine, 0, 2)
        for micro in range(2):
            loss = forward(engine, 2, micro)
            engine.backward(loss)
            before = weights(engine)
            engine.step()
            seen.append(loss.item())
        late.append(all(torch.equal(before[name], value) for name, value in weights(engine).items()))
        engine.module.state_dict()
        losses.append(seen)
        ends.append(weights(engine))
    equal = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return {"losses": losses, "late": late, "equal": equal}


@pytest.mark.parametrize(
    ("world", "ep", "params"),
    [(2, 1, {"bucket_mb": SMALL_MB}), (2, 2, {"policy": "team", "bucket_mb": SMALL_MB}), (4, 2, {"policy": "flat"})],
    ids=str,
)
def test_overlap_forward(request: pytest.FixtureRequest, world: int, ep: int, params: dict[str, Any]) -> None:
    pool: RankPool = request.getfixturevalue(f"ds{world}")
    for found in pool.run(world, overlapped, ep, params):
        assert found["late"] == [False, True]
        assert found["losses"][0] == found["losses"][1]
        assert found["equal"]


def same_weights(rank: int, world: int, group: Any, ep: int, ways: list[dict[str, Any]]) -> list[float]:
    """Largest distance of the parameters from the first way's, relative to the largest parameter."""
    ends = []
    for params in ways:
        engine = build(config(params={"bucket_mb": SMALL_MB, **params}), ep)
        advance(engine, 0, 2)
        ends.append(torch.cat([value.flatten() for value in weights(engine).values()]))
    return [float((end - ends[0]).abs().max() / ends[0].abs().max()) for end in ends[1:]]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_policies_and_transports_agree(request: pytest.FixtureRequest, world: int, ep: int) -> None:
    """Equal bits but for teams; DeepSpeed's loss and clipping included."""
    pool: RankPool = request.getfixturevalue(f"ds{world}")
    ways = [{"transport": "scatter"}, {"transport": "owner"}, {"policy": "flat"}, {"policy": "team"}]
    for owner, flat, team in pool.run(world, same_weights, ep, ways):
        assert (owner, flat) == (0.0, 0.0)
        assert team < 1e-5
