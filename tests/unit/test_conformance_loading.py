"""A state dict that does not fit is refused by name, with nothing changed."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distmuon import DistMuon, Muon
from distmuon.errors import StateError
from tests.distributed.scenario import digest
from tests.problems import both, descend, lines


def trained(build: Any, dtype: torch.dtype = torch.float32) -> Any:
    params, slopes = lines(dtype)
    optimizer = build(params.items(), lr=0.1)
    descend(params, slopes).float().backward()
    optimizer.step()
    return optimizer


def without(tree: dict[Any, Any], key: Any) -> dict[Any, Any]:
    return {k: v for k, v in tree.items() if k != key}


def with_group(saved: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = saved["param_groups"]
    return {**saved, "param_groups": [{**first, **changes}, *others]}


def with_entry(saved: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Changes to what is saved of the first parameter or bucket; None takes a key away."""
    entry = {k: v for k, v in {**saved["state"][0], **changes}.items() if v is not None}
    return {**saved, "state": {**saved["state"], 0: entry}}


Change = Callable[[dict[str, Any]], Any]
DAMAGED: dict[str, Change] = {
    "no dict": lambda saved: list(saved),
    "nothing": lambda saved: None,
    "a text": lambda saved: "state",
    "empty": lambda saved: {},
    "no groups": lambda saved: without(saved, "param_groups"),
    "groups in a dict": lambda saved: {**saved, "param_groups": {"0": {}}},
    "groups that are none": lambda saved: {**saved, "param_groups": [1, 2]},
    "a group less": lambda saved: {**saved, "param_groups": saved["param_groups"][:1]},
    "a group more": lambda saved: {**saved, "param_groups": saved["param_groups"] * 2},
    "a parameter more": lambda saved: with_group(saved, params=[0, 1]),
    "no parameters": lambda saved: with_group(saved, params=None),
    "an older group": lambda saved: {
        **saved,
        "param_groups": [without(group, "nesterov") for group in saved["param_groups"]],
    },
    "another kind": lambda saved: with_group(saved, kind="adamw"),
    "no state": lambda saved: without(saved, "state"),
    "no entry": lambda saved: {**saved, "state": without(saved["state"], 0)},
    "no momentum": lambda saved: with_entry(saved, first_moment=None),
    "no count": lambda saved: with_entry(saved, updates=None),
    "another shape": lambda saved: with_entry(saved, first_moment=torch.zeros(3, 3)),
    "an entry that is none": lambda saved: {**saved, "state": {**saved["state"], 0: 3}},
    "an integer momentum": lambda saved: with_entry(saved, first_moment=saved["state"][0]["first_moment"].int()),
    "a negative count": lambda saved: with_entry(saved, updates=-1),
    "a count in words": lambda saved: with_entry(saved, updates="one"),
    "one key more": lambda saved: with_entry(saved, third_moment=torch.zeros(6, 4)),
    "momentum in a list": lambda saved: with_entry(saved, first_moment=[0.0]),
}
OF_MUON: dict[str, Change] = {
    "sharded": lambda saved: trained(DistMuon).state_dict(),
    "of 16-bit parameters": lambda saved: trained(Muon, torch.bfloat16).state_dict(),
}
OF_DISTMUON: dict[str, Change] = {
    "not sharded": lambda saved: trained(Muon).state_dict(),
    "no header": lambda saved: without(saved, "shard"),
    "another plan": lambda saved: {**saved, "shard": {**saved["shard"], "plans": ["other"]}},
    "another rank": lambda saved: {**saved, "shard": {**saved["shard"], "rank": 1}},
}
CASES = [
    *[(build, change) for change in DAMAGED.values() for build in (Muon, DistMuon)],
    *[(Muon, change) for change in OF_MUON.values()],
    *[(DistMuon, change) for change in OF_DISTMUON.values()],
]
NAMES = [f"{name}-{build}" for name in DAMAGED for build in ("Muon", "DistMuon")]


@pytest.mark.parametrize(("build", "change"), CASES, ids=[*NAMES, *OF_MUON, *OF_DISTMUON])
def test_refused(build: Any, change: Change) -> None:
    optimizer = trained(build)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.5
    before = digest(optimizer.state_dict())
    with pytest.raises(StateError) as caught:
        optimizer.load_state_dict(change(saved))
    assert len(str(caught.value)) > 20
    assert "\n" not in str(caught.value)
    assert digest(optimizer.state_dict()) == before


@both
def test_settings_are_copied_and_what_describes_the_parameters_stays(build: Any) -> None:
    optimizer = trained(build)
    saved = copy.deepcopy(optimizer.state_dict())
    names = [group["param_names"] for group in optimizer.param_groups]
    for group in saved["param_groups"]:
        group.update(param_names=["other"], positions=[7], max_lr=0.5, layers=[1])
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["layers"].append(2)
    assert optimizer.param_groups[0]["layers"] == [1]
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert all(group["positions"] != [7] and group["max_lr"] == 0.5 for group in optimizer.param_groups)


def test_muon_takes_state_of_a_parameter_that_is_frozen_now() -> None:
    params, slopes = lines()
    optimizer = trained(Muon)
    saved = optimizer.state_dict()
    params["b"].requires_grad_(False)
    again = Muon(params.items(), lr=0.1)
    again.load_state_dict(saved)
    params["b"].requires_grad_(True)
    descend(params, slopes).backward()
    again.step()
    assert again.state[params["b"]]["updates"] == 2
