"""Which rule a parameter gets, by the module that owns it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmuon
from distmuon.errors import ConfigError, ParameterError
from distmuon.routing import param_groups, routes


def decisions(model: nn.Module, **options: Any) -> dict[str, tuple[str, str]]:
    return {route.name: (route.kind, route.reason) for route in routes(model, **options)}


def kinds(model: nn.Module, **options: Any) -> dict[str, str]:
    return {name: kind for name, (kind, _) in decisions(model, **options).items()}


class Language(nn.Module):
    """Two tables, hidden layers, and an LM head: untied, tied to the table, or only a product with the table."""

    def __init__(self, width: int, context: int, head: str = "untied", vocabulary: int = 500) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        if head != "product":
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if head == "tied":
            self.lm_head.weight = self.tokens.weight


class Experts(nn.Module):
    """Weights of experts stacked in one parameter each."""

    def __init__(self, shape: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(shape))


class TopKGate(nn.Module):
    """Has the name and the shape of DeepSpeed's gate."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(8, 4, bias=False)
        self.temperature = nn.Parameter(torch.ones(1))


class Getter(nn.Module):
    """Says itself which layer is its head."""

    def __init__(self, answer: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.decoder = nn.Linear(8, 50)
        self.hidden = nn.Linear(8, 8)
        self._answer = answer

    def get_output_embeddings(self) -> nn.Module | None:
        return self.decoder if self._answer else None


LAYERS: list[tuple[nn.Module, dict[str, tuple[str, str]]]] = [
    (nn.Linear(3, 5), {"weight": ("muon", "hidden matrix"), "bias": ("adamw", "1-D")}),
    (nn.Linear(1, 5, bias=False), {"weight": ("muon", "hidden matrix")}),
    (nn.Embedding(5, 3), {"weight": ("adamw", "embedding")}),
    (nn.EmbeddingBag(5, 3), {"weight": ("adamw", "embedding")}),
    (nn.LayerNorm(5), {"weight": ("adamw", "1-D"), "bias": ("adamw", "1-D")}),
    (nn.RMSNorm(5), {"weight": ("adamw", "1-D")}),
    (nn.Conv1d(3, 5, 2), {"weight": ("adamw", "convolution"), "bias": ("adamw", "convolution")}),
    (nn.Conv2d(3, 5, 2, bias=False), {"weight": ("adamw", "convolution")}),
    (nn.ConvTranspose1d(3, 5, 2, bias=False), {"weight": ("adamw", "convolution")}),
    (Experts(), {"up": ("muon", "4 hidden matrices")}),
    (Experts((6, 8)), {"up": ("muon", "hidden matrix")}),
    (Experts(()), {"up": ("adamw", "0-D")}),
    (Experts((2, 2, 3, 4)), {"up": ("adamw", "4-D")}),
]


@pytest.mark.parametrize(
    ("module", "expected"), LAYERS, ids=[type(m).__name__ + str(i) for i, (m, _) in enumerate(LAYERS)]
)
def test_module_types(module: nn.Module, expected: dict[str, tuple[str, str]]) -> None:
    assert decisions(module) == expected


def test_attention_projections_are_matrices() -> None:
    found = kinds(nn.MultiheadAttention(8, 2))
    assert found == {
        "in_proj_weight": "muon",
        "in_proj_bias": "adamw",
        "out_proj.weight": "muon",
        "out_proj.bias": "adamw",
    }


def test_a_class_derived_from_embedding_counts() -> None:
    class Positions(nn.Embedding):
        pass

    assert decisions(Positions(5, 3)) == {"weight": ("adamw", "embedding")}


def test_the_last_linear_layer_of_vocabulary_width_is_the_head() -> None:
    found = decisions(Language(width=16, context=32))
    assert found["lm_head.weight"] == ("adamw", "LM head")
    assert found["tokens.weight"] == ("adamw", "embedding")
    assert all(found[f"blocks.{i}.{j}.weight"][0] == "muon" for i in (0, 1) for j in (1, 2))


def test_a_last_linear_layer_of_another_width_is_hidden() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50), nn.Linear(50, 8))
    assert [route.kind for route in routes(model)] == ["adamw", "muon", "adamw", "muon", "adamw"]


def test_tied_weights_are_one_parameter_for_adamw() -> None:
    found = decisions(Language(16, 32, head="tied"))
    assert found["tokens.weight"] == ("adamw", "tied embedding")
    assert "lm_head.weight" not in found
    twins = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    twins[1].weight = twins[0].weight
    assert decisions(twins) == {"0.weight": ("adamw", "tied weight")}


def test_a_module_used_twice_is_not_tied() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert decisions(nn.Sequential(layer, layer)) == {"0.weight": ("muon", "hidden matrix")}


@pytest.mark.parametrize("head", ["untied", "tied", "product"])
def test_context_as_long_as_the_model_is_wide(head: str) -> None:
    """GPT-2 medium has 1,024 positions and is 1,024 wide: a table of positions does not make heads of its layers."""
    with torch.device("meta"):
        model = Language(width=1024, context=1024, head=head, vocabulary=50_257)
    found = kinds(model)
    assert {found[f"blocks.{i}.{j}.weight"] for i in (0, 1) for j in (1, 2)} == {"muon"}


def test_the_model_may_name_its_head() -> None:
    found = decisions(Getter())
    assert found["decoder.weight"] == ("adamw", "LM head")
    assert found["decoder.bias"][0] == "adamw"
    assert found["hidden.weight"][0] == "muon"
    # Without an answer the last linear layer is looked at, which is as wide as no table.
    assert kinds(Getter(answer=False))["decoder.weight"] == "muon"


def test_the_caller_may_name_the_head() -> None:
    model = Getter()
    found = decisions(model, head=model.hidden)
    assert found["hidden.weight"] == ("adamw", "LM head")
    assert found["decoder.weight"][0] == "muon"


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_router(router: str) -> None:
    model = nn.Sequential(TopKGate(), nn.Linear(8, 8, bias=False))
    assert decisions(model, router=router) == {
        "0.temperature": ("adamw", "1-D"),
        "0.wg.weight": (router, "router"),
        "1.weight": ("muon", "hidden matrix"),
    }


def test_routers_go_to_muon_by_default() -> None:
    assert decisions(TopKGate())["wg.weight"] == ("muon", "router")


def test_overrides() -> None:
    model = Language(16, 32)
    found = decisions(model, overrides={"blocks.0.*": "adamw", "tokens.*": "muon", "blocks.0.1.weight": "muon"})
    assert found["blocks.0.2.weight"] == ("adamw", "override")
    assert found["blocks.0.1.weight"] == ("muon", "override")
    assert found["tokens.weight"] == ("muon", "override")
    assert found["blocks.1.1.weight"] == ("muon", "hidden matrix")


def test_an_override_wins_over_the_router_option() -> None:
    assert kinds(TopKGate(), router="adamw", overrides={"wg.weight": "muon"})["wg.weight"] == "muon"


def test_frozen_parameters_get_no_rule() -> None:
    model = Language(16, 32)
    model.blocks[0].requires_grad_(False)
    found = decisions(model, overrides={"blocks.*": "adamw"})
    assert found["blocks.0.1.weight"] == ("frozen", "does not require a gradient")
    assert found["blocks.1.1.weight"] == ("adamw", "override")
    names = [name for group in param_groups(model) for name, _ in group["params"]]
    assert not [name for name in names if name.startswith("blocks.0.")]


def test_groups_hold_every_parameter_once_with_its_position() -> None:
    model = Language(16, 32, head="tied")
    groups = param_groups(model)
    assert [group["kind"] for group in groups] == ["muon", "adamw"]
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    members = {
        name: (parameter, n) for g in groups for (name, parameter), n in zip(g["params"], g["positions"], strict=True)
    }
    assert {name: n for name, (_, n) in members.items()} == order
    assert all(parameter is model.get_parameter(name) for name, (parameter, _) in members.items())
    table = kinds(model)
    assert {name: group["kind"] for group in groups for name, _ in group["params"]} == table


def test_the_optimizer_plans_in_the_order_of_the_model() -> None:
    model = Language(16, 32)
    (plan,) = distmuon.DistMuon(param_groups(model)).plans
    assert [spec.name for spec in plan.params] == [name for name, _ in model.named_parameters()]
    assert {spec.name: spec.kind for spec in plan.params} == kinds(model)


def test_the_table_can_be_printed() -> None:
    text = str(routes(nn.Sequential(nn.Linear(3, 5), Experts(()), nn.Embedding(7, 2))))
    rows = [line.split(maxsplit=3) for line in text.splitlines()]
    assert rows == [
        ["0.weight", "5x3", "muon", "hidden matrix"],
        ["0.bias", "5", "adamw", "1-D"],
        ["1.up", "scalar", "adamw", "0-D"],
        ["2.weight", "7x2", "adamw", "embedding"],
    ]
    assert (
        len(
            {
                line.index(kind)
                for line, kind in zip(text.splitlines(), ("muon", "adamw", "adamw", "adamw"), strict=True)
            }
        )
        == 1
    )
    assert str(routes(nn.ReLU())) == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"router": "sgd"}, 'router = \'sgd\' is not legal: use "muon" or "adamw".'),
        ({"overrides": {"0.*": "sgd"}}, 'overrides["0.*"] = \'sgd\' is not legal: use "muon" or "adamw".'),
        ({"overrides": {"layer.*": "muon"}}, 'overrides["layer.*"] matches no parameter; names look like "0.weight".'),
    ],
)
def test_illegal_options(options: dict[str, Any], sentence: str) -> None:
    for call in (routes, param_groups):
        with pytest.raises(ConfigError) as caught:
            call(nn.Sequential(nn.Linear(2, 2)), **options)
        assert str(caught.value) == sentence


def test_an_override_on_a_model_without_parameters() -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        routes(nn.ReLU(), overrides={"a": "muon"})


@pytest.mark.parametrize("model", [nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), nn.Conv2d(2, 2, 2)])
def test_a_model_without_hidden_matrices_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="the model has no hidden matrix for Muon"):
        param_groups(model)


def test_a_flattened_model_is_refused_unless_overridden() -> None:
    model = Experts((96,))
    with pytest.raises(ConfigError, match='overrides={"pattern": "muon"}'):
        param_groups(model)
    assert [group["kind"] for group in param_groups(nn.Linear(2, 2), overrides={"*": "adamw"})] == ["adamw"]


def test_an_override_cannot_make_a_matrix_of_a_vector() -> None:
    with pytest.raises(ParameterError, match='"bias" has 1 dimensions and kind "muon"'):
        distmuon.DistMuon(param_groups(nn.Linear(2, 2), overrides={"bias": "muon"}))


def test_the_model_is_left_alone() -> None:
    model = Language(16, 32)
    before: dict[str, Tensor] = {name: p.clone() for name, p in model.named_parameters()}
    param_groups(model, overrides={"blocks.*": "adamw"})
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
