"""What the planner, the configuration and splits refuse: one sentence with the field, its value and what is legal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import distmuon
from distmuon.bricks import ParamSpec
from distmuon.errors import ConfigError, ParameterError
from distmuon.planner import make_plan
from distmuon.splits import find_split, row_blocks

PLANS: list[tuple[dict[str, Any], list[str]]] = [
    ({"world": 0}, ["world = 0", "at least 1 rank"]),
    ({"world": -3}, ["world = -3", "at least 1 rank"]),
    ({"policy": "zigzag"}, ["policy = 'zigzag'", "balanced", "flat", "team"]),
    ({"transport": "mail"}, ["transport = 'mail'", "auto", "scatter", "owner"]),
    ({"policy": "flat", "transport": "owner"}, ['transport = "owner"', 'policy = "flat"', '"auto"', '"scatter"']),
    ({"policy": "team", "transport": "scatter"}, ['transport = "scatter"', 'policy = "team"', '"auto"', '"owner"']),
]
SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"bucket_mb": 0}, ['"bucket_mb" = 0', "greater than 0"]),
    ({"bucket_mb": float("inf")}, ['"bucket_mb" = inf', "finite"]),
    ({"bucket_mb": "big"}, ["\"bucket_mb\" = 'big'", "number"]),
    ({"policy": "zigzag"}, ["\"policy\" = 'zigzag'", "balanced", "flat", "team"]),
    ({"transport": "mail"}, ["\"transport\" = 'mail'", "auto", "scatter", "owner"]),
    ({"policy": "flat", "transport": "owner"}, ['transport = "owner"', 'policy = "flat"', 'use "scatter"']),
    ({"policy": "team", "transport": "scatter"}, ['transport = "scatter"', 'policy = "team"', 'use "owner"']),
    (
        {"policy": "team", "ns": distmuon.NewtonSchulz(dtype="float16")},
        ['policy = "team"', 'ns.dtype = "float16"', '"bfloat16"'],
    ),
]
SPLITS: list[tuple[Any, str]] = [
    (0, "0 blocks"),
    (-1, "-1 blocks"),
    (5, "5 blocks"),
    (2.0, "2.0"),
    ("3", "3"),
    ([4, 4], "[4, 4] rows"),
    ([4, -4, 12], "[4, -4, 12] rows"),
    ([0, 12], "[0, 12] rows"),
    ([4.0, 8.0], "[4.0, 8.0] rows"),
    ([], "[] rows"),
]


def has(message: str, words: list[str]) -> None:
    assert [word for word in words if word not in message] == []
    assert message.endswith(".")


@pytest.mark.parametrize(("given", "words"), PLANS, ids=str)
def test_planner(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan([ParamSpec("w", (4, 4), "muon")], **{"world": 2, **given})
    has(str(caught.value), words)


@pytest.mark.parametrize(("given", "words"), SETTINGS, ids=str)
def test_settings(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        distmuon.DistMuon([("w", Parameter(torch.ones(12, 4)))], **given)
    has(str(caught.value), words)


@pytest.mark.parametrize(("split", "words"), SPLITS, ids=str)
def test_splits(split: Any, words: str) -> None:
    with pytest.raises(ParameterError) as caught:
        row_blocks("w", (3, 12, 4), split)
    has(str(caught.value), ['"w"', "(3, 12, 4)", words, "12"])


def test_split_of_what_has_no_rows() -> None:
    with pytest.raises(ParameterError) as caught:
        row_blocks("bias", (12,), 3)
    has(str(caught.value), ['"bias"', "(12,)", "matrix"])


@pytest.mark.parametrize("build", [distmuon.DistMuon, distmuon.Muon])
def test_splits_of_a_param_group(build: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        build([{"params": [("w", Parameter(torch.ones(12, 4)))], "kind": "muon", "split": 5}])
    has(str(caught.value), ["(12, 4)", "5 blocks", "12 rows"])


@pytest.mark.parametrize(
    ("split", "blocks"),
    [(None, ()), (1, ()), (3, (4, 4, 4)), (12, (1,) * 12), ([12], ()), ([8, 3, 1], (8, 3, 1))],
    ids=str,
)
def test_legal_splits(split: Any, blocks: tuple[int, ...]) -> None:
    assert row_blocks("w", (12, 4), split) == blocks
    assert row_blocks("w", (3, 12, 4), split) == blocks


def test_patterns() -> None:
    """Of several patterns the last counts; one that matches nothing is a mistake."""
    splits: dict[str, Any] = {"*.weight": 2, "1.*": [3, 1], "*.bias": 4}
    assert [find_split(name, splits) for name in ("0.weight", "1.weight", "0.gain")] == [2, [3, 1], None]
    assert find_split("w", None) is None
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError) as caught:
        distmuon.param_groups(model, splits={"nope.*": 2})
    has(str(caught.value), ['splits["nope.*"]', '"0.weight"'])
    # A pattern that is about no matrix of Muon's would have no effect.
    with_table = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    with pytest.raises(ConfigError) as caught:
        distmuon.param_groups(with_table, splits={"0.weight": 2})
    has(str(caught.value), ['splits["0.weight"]', '"1.weight"'])
    groups = distmuon.param_groups(model, splits={"1.weight": 2})
    split = {g["params"][0][0]: row_blocks("w", (4, 4), g.get("split")) for g in groups if g["kind"] == "muon"}
    assert split == {"0.weight": (), "1.weight": (2, 2)}
