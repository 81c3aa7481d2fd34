"""What cannot be optimized is refused by name by Muon and by DistMuon, at construction and later."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from distmuon import Muon
from distmuon.errors import ConfigError, ParameterError
from tests.distributed.scenario import digest
from tests.problems import BUILDS, both, lines


def twice() -> list[Any]:
    weight = Parameter(torch.ones(2, 2))
    return [{"params": [("a", weight)], "kind": "muon"}, {"params": [("b", weight)], "kind": "muon"}]


def once_too_often() -> list[Any]:
    weight = Parameter(torch.ones(2, 2))
    return [("a", weight), ("b", weight)]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "not a leaf": (lambda: [("w", Parameter(torch.ones(2, 2)) * 2)], '"w" is not a leaf'),
    "nameless": (lambda: [Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2], "group0.param1"),
    "twice in a group": (once_too_often, '"b" is a duplicate'),
    "twice": (twice, '"b" is a duplicate'),
    "a set": (lambda: {Parameter(torch.ones(2, 2))}, "params is a set; .* keeps its order"),
    "a set in a group": (lambda: [{"params": {Parameter(torch.ones(2, 2))}, "kind": "muon"}], "params is a set"),
    "one tensor": (lambda: Parameter(torch.ones(2, 2)), "params is a Parameter"),
    "nothing": (lambda: None, "params is a NoneType"),
    "a number": (lambda: [{"params": [3.0], "kind": "adamw"}], "holds a float"),
    "some names": (lambda: [("w", Parameter(torch.ones(2))), Parameter(torch.ones(3))], "with names and some without"),
    "sparse": (lambda: [("w", Parameter(torch.eye(2).to_sparse()))], '"w" has layout torch.sparse_coo'),
    "complex": (lambda: [("w", Parameter(torch.ones(2, dtype=torch.cfloat)))], '"w" has dtype torch.complex64'),
    "strided": (lambda: [("w", Parameter(torch.ones(3, 2).mT))], '"w" is not contiguous'),
}


@both
@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(build: Any, what: str) -> None:
    make, sentence = REFUSED[what]
    with pytest.raises(ParameterError, match=sentence):
        build(make())
    if what == "one tensor":
        # A group may have one.
        return
    optimizer = build([("first", Parameter(torch.ones(2, 2)))] if what != "nameless" else [Parameter(torch.ones(2, 2))])
    given = make()
    *before, last = given if isinstance(given, list) and isinstance(given[0], dict) else [{"params": given}]
    for group in before:
        optimizer.add_param_group(group)
    state = digest(optimizer.state_dict())
    with pytest.raises(ParameterError, match=sentence.replace("group0", "group1")):
        optimizer.add_param_group(last)
    assert digest(optimizer.state_dict()) == state


@both
def test_names_in_some_groups_only(build: Any) -> None:
    named = {"params": [("w", Parameter(torch.ones(2, 2)))]}
    with pytest.raises(ParameterError, match="with names and some without"):
        build([named, {"params": [Parameter(torch.ones(2, 2))]}])
    optimizer = build([named])
    with pytest.raises(ParameterError, match="with names and some without"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2, 2))]})
    assert len(optimizer.param_groups) == 1


def test_integer_parameters_are_frozen_and_stay() -> None:
    for build in BUILDS:
        codes = Parameter(torch.arange(4), requires_grad=False)
        weight = Parameter(torch.ones(2, 2))
        optimizer = build([("codes", codes), ("weight", weight)], lr=0.1)
        weight.sum().backward()
        optimizer.step()
        assert codes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [lambda p: p.bfloat16(), lambda p: p.reshape(3, 8)])
def test_muon_refuses_a_parameter_that_was_cast_or_reshaped(change: Callable[[Tensor], Tensor]) -> None:
    params, slopes = lines()
    optimizer = Muon(params.items(), lr=0.1)
    params["w"].data = change(params["w"].data)
    with pytest.raises(ParameterError, match='"w" was float32 \\(6, 4\\)'):
        optimizer.step()


@both
def test_settings_are_no_default_in_disguise(build: Any) -> None:
    for ns in (0, "", False):
        with pytest.raises(ConfigError, match="ns"):
            build([Parameter(torch.ones(2, 2))], ns=ns)
