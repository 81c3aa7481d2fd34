"""One validation: what a param group may hold is decided alike at construction, on adding and on loading."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from distmuon.config import GroupSettings
from distmuon.errors import ConfigError, StateError
from tests.distributed.scenario import digest
from tests.problems import BUILDS, both

NAN, INF = math.nan, math.inf
NO_NUMBERS: list[Any] = ["0.1", True, None, [0.1], {}, 1j, torch.ones(2), torch.tensor(NAN), torch.tensor(True)]
NO_RATES = [NAN, INF, -INF, -1.0, -1, torch.tensor(-1.0), *NO_NUMBERS]
BAD: dict[str, list[Any]] = {
    "lr": NO_RATES,
    "weight_decay": NO_RATES,
    "momentum": [1.0, 1.5, 1, *NO_RATES],
    "eps": [0.0, 0, *NO_RATES],
    "nesterov": ["yes", 1, 0.0, None, []],
    "betas": [0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (True, 0.5), "ab", None, {0.1, 0.2}],
    "kind": ["sgd", "Muon", "", None, 3, ["muon"]],
}
WRONG_KEYS: dict[str, str] = {
    **{"weigth_decay": "weight_decay", "weightdecay": "weight_decay", "LR": "lr", "nestrov": "nesterov"},
    **{"beta": "betas", "moment": "momentum", "kinds": "kind", "Weight_Decay": "weight_decay"},
    **{"adamw_lr": '"lr"', "adamw_betas": '"betas"', "max_grad_norm": "to the optimizer", "ns": "to the optimizer"},
    **{"maximize": "not supported", "capturable": "not supported", "fused": "not supported"},
}
FINE: dict[str, list[Any]] = {
    "lr": [0.0, 1, 1e-3, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)],
    "weight_decay": [0, 0.1, torch.tensor(0.1)],
    "betas": [[0.5, 0.5], (0, 0.5), (torch.tensor(0.5), 0.5)],
    "eps": [1, 1e-30],
    **{key: [0.1] for key in ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")},
    **{key: [False, None] for key in ("maximize", "foreach", "fused", "capturable", "differentiable")},
    **{key: ["mine", 3] for key in ("name", "tag", "lr_scale", "no_decay", "layer", "id", "index", "bias")},
    **{key: [0.5, True] for key in ("lr0", "warmup_lr", "weight_decay_mult", "decoupled_weight_decay", "steps")},
}


def vector(name: str) -> list[Any]:
    return [(name, Parameter(torch.ones(3)))]


def outcome(attempt: Any, *args: Any, **kwargs: Any) -> str:
    try:
        attempt(*args, **kwargs)
    except (ConfigError, StateError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def entrances(build: Any, key: str, value: Any) -> list[str]:
    """What each entrance says to a group with this key; an optimizer that refuses it is as before."""
    group = {"params": vector("late"), "kind": "adamw", key: value}
    said = [outcome(build, [dict(group)])]
    for entrance in ("add_param_group", "load_state_dict"):
        optimizer = build([{"params": vector("first"), "kind": "adamw"}])
        saved = optimizer.state_dict()
        before = digest(saved)
        loaded = {**saved, "param_groups": [{**saved["param_groups"][0], key: value}]}
        said.append(outcome(getattr(optimizer, entrance), group if entrance == "add_param_group" else loaded))
        assert said[-1] == "fine" or digest(optimizer.state_dict()) == before
    assert not any("\n" in text for text in said)
    return said


def test_every_setting_is_here() -> None:
    assert set(BAD) == set(GroupSettings.model_fields)


@both
@pytest.mark.parametrize("key", BAD)
def test_illegal_values(key: str, build: Any) -> None:
    for value in BAD[key]:
        said = entrances(build, key, value)
        assert len(set(said)) == 1, said
        assert said[0].startswith("ConfigError")
        assert f'"{key}' in said[0]


@both
@pytest.mark.parametrize("key", WRONG_KEYS)
def test_wrong_keys(key: str, build: Any) -> None:
    said = entrances(build, key, 0.5)
    assert len(set(said)) == 1, said
    assert f'"{key}"' in said[0]
    assert WRONG_KEYS[key] in said[0]


@both
@pytest.mark.parametrize("key", FINE)
def test_legal_values(key: str, build: Any) -> None:
    for value in FINE[key]:
        assert entrances(build, key, value) == ["fine"] * 3


@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum", "nesterov"])
def test_the_constructor_says_the_same_of_its_arguments(key: str) -> None:
    for build in BUILDS:
        for value in BAD[key]:
            as_group = entrances(build, key, value)[0].partition("param group: ")[2]
            as_argument = outcome(build, vector("w"), **{key: value})
            assert as_argument == f"ConfigError: {build.__name__}: {as_group}"


values = st.one_of(
    st.floats(),
    st.integers(-2, 2),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.lists(st.floats(-0.5, 1.5), max_size=3),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(width=32).map(torch.tensor),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=st.sampled_from([*BAD, "max_lr", "tag"]), value=values)
def test_entrances_agree_on_any_value(key: str, value: Any) -> None:
    assert len({text for build in BUILDS for text in entrances(build, key, value)}) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([name for name in GroupSettings.model_fields if len(name) > 5]),
    place=st.integers(0, 20),
    letter=st.sampled_from(string.ascii_lowercase),
    edit=st.sampled_from(["drop", "double", "replace", "swap"]),
)
def test_any_wrong_letter_is_noticed(name: str, place: int, letter: str, edit: str) -> None:
    at = place % (len(name) - 1)
    head, here, tail = name[:at], name[at], name[at + 1 :]
    wrong = {
        "drop": head + tail,
        "double": head + here * 2 + tail,
        "replace": head + letter + tail,
        "swap": head + tail[0] + here + tail[1:],
    }[edit]
    if wrong != name:
        said = entrances(BUILDS[place % 2], wrong, 0.5)
        assert len(set(said)) == 1
        assert f'did you mean "{name}"?' in said[0]
