"""Everything a user may pass as ``params``, and what is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distmuon import DistMuon, Muon
from distmuon.binding import bind
from distmuon.errors import ConfigError, ParameterError
from distmuon.groups import check_group, complete_group, to_groups

OPTIMIZERS = [DistMuon, Muon]


def matrix() -> Parameter:
    return Parameter(torch.ones(4, 3))


def vector() -> Parameter:
    return Parameter(torch.ones(5))


def kinds(optimizer: torch.optim.Optimizer) -> list[tuple[str, list[tuple[int, ...]]]]:
    return [(g["kind"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)
        self.hidden = nn.Linear(3, 4)
        self.lm_head = nn.Linear(3, 7, bias=False)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_tensors_are_split_by_shape(build: Any) -> None:
    params = [vector(), matrix(), Parameter(torch.ones(2, 3, 4)), Parameter(torch.tensor(1.0))]
    assert kinds(build(params)) == [("muon", [(4, 3), (2, 3, 4)]), ("adamw", [(5,), ()])]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_four_dimensions_go_to_adamw(build: Any) -> None:
    assert kinds(build([Parameter(torch.ones(2, 2, 3, 3))])) == [("adamw", [(2, 2, 3, 3)])]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_named_parameters_of_a_model(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Parameters carry no module types, so names that tell a table are believed, with a warning."""
    with caplog.at_level(logging.WARNING):
        optimizer = build(Small().named_parameters())
    assert [(g["kind"], g["param_names"]) for g in optimizer.param_groups] == [
        ("muon", ["hidden.weight"]),
        ("adamw", ["embed_tokens.weight", "norm.weight", "norm.bias", "hidden.bias", "lm_head.weight"]),
    ]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "embed_tokens.weight, lm_head.weight" in message
    assert "distmuon.param_groups(model)" in message


@pytest.mark.parametrize(
    "name", ["wte.weight", "transformer.wpe.weight", "Embedding.w", "word_embeddings", "lm_head.w"]
)
def test_names_of_tables(name: str, caplog: pytest.LogCaptureFixture) -> None:
    (group,) = to_groups([(name, matrix())])
    assert group["kind"] == "adamw"
    assert name in caplog.text


@pytest.mark.parametrize("name", ["hidden.weight", "twte.weight", "head.weight", "sweep.w"])
def test_other_names_say_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert [group["kind"] for group in to_groups([(name, matrix()), (f"{name}.b", vector())])] == ["muon", "adamw"]
    assert not caplog.records


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_groups_keep_their_kind_and_settings(build: Any) -> None:
    groups = [
        {"params": [matrix()], "kind": "adamw", "lr": 0.5, "betas": (0.5, 0.75)},
        {"params": [matrix()], "kind": "muon", "momentum": 0.25, "nesterov": False},
        {"params": [matrix(), vector()], "weight_decay": 0.125},
    ]
    optimizer = build(groups, lr=0.25, adamw_lr=0.0625, weight_decay=0.5, adamw_weight_decay=0.0)
    assert [(g["kind"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("adamw", 0.5, 0.0),
        ("muon", 0.25, 0.5),
        ("muon", 0.25, 0.125),
        ("adamw", 0.0625, 0.125),
    ]
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert (optimizer.param_groups[1]["momentum"], optimizer.param_groups[1]["nesterov"]) == (0.25, False)
    assert "kind" not in groups[2]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_adamw_takes_lr_and_decay_over(build: Any) -> None:
    optimizer = build([matrix(), vector()], lr=0.25, weight_decay=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.5)] * 2


def test_one_tensor_is_enough_for_a_group() -> None:
    assert [group["kind"] for group in to_groups([{"params": matrix()}])] == ["muon"]


def test_a_generator_of_groups() -> None:
    def generate() -> Iterator[dict[str, Any]]:
        yield {"params": [matrix()]}
        yield {"params": [vector()]}

    assert [group["kind"] for group in to_groups(generate())] == ["muon", "adamw"]


def test_positions_order_the_plan() -> None:
    a, b, c = matrix(), vector(), matrix()
    groups = [
        {"params": [("a", a), ("c", c)], "kind": "muon", "positions": [0, 2]},
        {"params": [("b", b)], "kind": "adamw", "positions": [1]},
    ]
    (plan,) = DistMuon(groups).plans
    assert [spec.name for spec in plan.params] == ["a", "b", "c"]


def test_names_are_made_up_where_there_are_none() -> None:
    optimizer = Muon([{"params": [vector()], "kind": "adamw"}, {"params": [vector(), vector()], "kind": "adamw"}])
    trained, frozen = bind(optimizer.param_groups[1:], 1)
    assert [param.name for param in trained] == ["group1.param0", "group1.param1"]
    assert [param.group for param in trained] == [1, 1]
    assert frozen == []


def test_added_groups_get_defaults() -> None:
    optimizer = DistMuon([matrix()], lr=0.25)
    optimizer.add_param_group({"params": [vector(), matrix()]})
    assert [(g["kind"], g["lr"]) for g in optimizer.param_groups] == [("muon", 0.25), ("muon", 0.25), ("adamw", 0.25)]


def bad_stride() -> Tensor:
    return Parameter(torch.ones(3, 4).mT)


def not_a_leaf() -> Tensor:
    return matrix() * 2


REFUSED: list[tuple[str, Callable[[], Tensor], str, str]] = [
    ("dtype", lambda: Parameter(torch.ones(4, 3, dtype=torch.float64)), "muon", "has dtype torch.float64; float32, bf"),
    ("complex", lambda: Parameter(torch.ones(4, dtype=torch.complex64)), "adamw", "has dtype torch.complex64"),
    ("layout", lambda: Parameter(torch.ones(4, 3).to_sparse()), "muon", "has layout torch.sparse_coo; make it dense"),
    ("stride", bad_stride, "muon", r"is not contiguous \(strides \(1, 4\)\); call .contiguous\(\) on it first"),
    ("vector", vector, "muon", 'has 1 dimensions and kind "muon", which takes \\[A, B\\] or \\[E, A, B\\]'),
    ("scalar", lambda: Parameter(torch.tensor(1.0)), "muon", 'has 0 dimensions and kind "muon"'),
    ("image", lambda: Parameter(torch.ones(2, 2, 3, 3)), "muon", 'has 4 dimensions and kind "muon"'),
]


@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize(("make", "kind", "problem"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_by_name(build: Any, make: Callable[[], Tensor], kind: str, problem: str) -> None:
    group = {"params": [("fine", matrix() if kind == "muon" else vector()), ("wrong one", make())], "kind": kind}
    with pytest.raises(ParameterError, match=f'parameter "wrong one" {problem}'):
        build([group])


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_what_is_not_a_leaf_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="leaf"):
        build([{"params": [not_a_leaf()], "kind": "muon"}])


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_frozen_parameters_are_not_checked(build: Any) -> None:
    odd = bad_stride().requires_grad_(False)
    optimizer = build([{"params": [matrix(), odd], "kind": "muon"}])
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_all_frozen() -> None:
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        DistMuon([matrix().requires_grad_(False)])


@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize("kinds", [("muon", "adamw"), ("muon", "muon")])
def test_overlapping_storage_is_refused_by_name(build: Any, kinds: tuple[str, str]) -> None:
    memory = torch.ones(20)
    first, second = Parameter(memory[:12].view(4, 3)), Parameter(memory[11:].view(3, 3))
    groups = [{"params": [("one", first)], "kind": kinds[0]}, {"params": [("two", second)], "kind": kinds[1]}]
    with pytest.raises(ParameterError, match='parameters "one" and "two" share storage; tie weights by using one'):
        build(groups)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_neighbours_in_one_storage_are_fine(build: Any) -> None:
    memory = torch.ones(20)
    build([Parameter(memory[:12].view(4, 3)), Parameter(memory[12:])])


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_storage_of_an_added_group_is_compared_with_the_first(build: Any) -> None:
    memory = torch.ones(20)
    optimizer = build([("one", Parameter(memory[:12].view(4, 3)))])
    with pytest.raises(ParameterError, match="share storage"):
        optimizer.add_param_group({"params": [("two", Parameter(memory[11:].view(3, 3)))]})


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_the_same_parameter_twice(build: Any) -> None:
    shared = matrix()
    with pytest.raises(ValueError, match=r"more than one parameter group|share storage|duplicate"):
        build([{"params": [shared], "kind": "muon"}, {"params": [shared], "kind": "adamw"}])


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ([], "params is empty; pass model.named_parameters()"),
        (["weight"], "params holds a str; it takes tensors or"),
        ([("weight", 3)], "params holds a int; it takes tensors or"),
        ([matrix(), {"params": [matrix()]}], "params holds a dict"),
        ([{"params": [matrix()]}, matrix()], "params"),
        ([{"lr": 0.1}], "params"),
    ],
)
def test_what_is_no_parameter(params: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DistMuon(params)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, '"lr" = -1.0 is not legal'),
    ({"lr": float("nan")}, '"lr" = nan is not legal'),
    ({"lr": float("inf")}, '"lr" = inf is not legal'),
    ({"lr": "fast"}, "\"lr\" = 'fast' is not legal"),
    ({"weight_decay": -0.1}, '"weight_decay" = -0.1 is not legal'),
    ({"momentum": 1.0}, '"momentum" = 1.0 is not legal'),
    ({"momentum": -0.1}, '"momentum" = -0.1 is not legal'),
    ({"nesterov": 1}, '"nesterov" = 1 is not legal'),
    ({"betas": (0.9, 1.0)}, '"betas.1" = 1.0 is not legal'),
    ({"betas": (0.9,)}, "betas"),
    ({"eps": 0.0}, '"eps" = 0.0 is not legal'),
]


@pytest.mark.parametrize(("setting", "sentence"), SETTINGS, ids=[str(setting) for setting, _ in SETTINGS])
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_settings_of_a_group(build: Any, setting: dict[str, Any], sentence: str) -> None:
    group = {"params": [vector()], "kind": "adamw", **setting}
    with pytest.raises(ConfigError, match=sentence):
        build([group])
    optimizer = build([{"params": [vector()], "kind": "adamw"}])
    optimizer.param_groups[0].update(setting)
    with pytest.raises(ConfigError, match=sentence):
        optimizer.step()


def test_unknown_kind() -> None:
    group = {"params": [vector()], "kind": "sgd"}
    with pytest.raises(ConfigError, match='"kind" = \'sgd\' is not legal: use "muon" or "adamw"'):
        DistMuon([group])


def test_a_refused_group_is_left_as_it_was() -> None:
    group = {"params": [vector()], "kind": "adamw", "lr": -1.0}
    with pytest.raises(ConfigError):
        complete_group(group, Muon([vector()]).settings)
    assert set(group) == {"params", "kind", "lr"}


def test_a_learning_rate_may_be_a_tensor_and_betas_a_list() -> None:
    optimizer = Muon([{"params": [vector()], "kind": "adamw", "lr": torch.tensor(0.5), "betas": [0.5, 0.75]}])
    settings = check_group(optimizer.param_groups[0])
    assert (settings.lr, settings.betas) == (0.5, (0.5, 0.75))


def test_the_order_of_the_model_outlasts_the_split_by_kind() -> None:
    """Or all biases would be in one bucket, which is complete when backward ends."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    extra = torch.nn.Linear(4, 2)
    groups = to_groups([{"params": list(model.named_parameters())}, {"params": extra.parameters(), "kind": "adamw"}])
    assert [(group["kind"], group["positions"]) for group in groups] == [
        ("muon", [0, 2]),
        ("adamw", [1, 3]),
        ("adamw", [4, 5]),
    ]
    (plan,) = DistMuon(model.named_parameters()).plans
    assert [spec.name for spec in plan.params] == [name for name, _ in model.named_parameters()]
