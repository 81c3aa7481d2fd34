"""Model files as parameters: published totals, routing, and the very parameters of the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distmuon.bricks import Kind
from distmuon.config import parse
from distmuon.errors import ConfigError
from distmuon.planning.architecture import Architecture
from distmuon.planning.model_file import Model, load_model

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
SMALL: dict[str, Any] = {"vocabulary": 50, "width": 8, "layers": 2, "heads": 2, "hidden": 12}
MOE: dict[str, Any] = {"count": 4, "top_k": 2, "hidden": 6}


def small(**changes: Any) -> Model:
    return Model("small", parse(Architecture, SMALL | changes, "small"), 50)


def shapes(model: Model, ep: int = 1) -> dict[str, tuple[int, ...]]:
    return {param.spec.name: param.spec.shape for param in model.parameters(ep) if param.exists}


def numel(model: Model, ep: int = 1) -> int:
    return sum(param.spec.numel * (ep if param.expert else 1) for param in model.parameters(ep) if param.exists)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama3_8b", 8_030_261_248),
        ("qwen3_30b_a3b", 30_532_122_624),
        ("moonlight_16b_a3b", 15_960_110_208),
        ("kimi_k2_1t", 1_026_408_232_448),
        ("moe_79m", 79_059_840),
    ],
)
def test_totals_are_the_published_ones(name: str, total: int) -> None:
    model = load_model(MODELS / f"{name}.toml")
    assert numel(model) == total
    assert numel(model, ep=2 if model.experts > 1 else 1) == total


@pytest.mark.parametrize(("name", "vocabulary"), [("debug", 64), ("moe_mini", None)])
def test_a_training_file_has_the_parameters_of_the_model_that_is_trained(name: str, vocabulary: int | None) -> None:
    from distmuon.routing import routes
    from distmuon.train.config import ModelConfig, read_toml
    from distmuon.train.model import MoETransformer

    model = load_model(MODELS / f"{name}.toml", vocabulary)
    real = MoETransformer(ModelConfig(**read_toml(MODELS / f"{name}.toml")), model.vocabulary, seed=0)
    assert list(shapes(model).items()) == [(name, tuple(p.shape)) for name, p in real.named_parameters()]
    planned = [(p.spec.name, p.spec.kind, p.reason) for p in model.parameters(1) if p.exists]
    assert planned == [(route.name, route.kind, route.reason) for route in routes(real)]


def test_silu_experts_and_a_head_of_its_own_too(tmp_path: Path) -> None:
    from distmuon.train.config import ModelConfig
    from distmuon.train.model import MoETransformer

    config = {"width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "experts": 2, "top_k": 1, "expert_hidden": 6}
    text = "\n".join(f"{key} = {value}" for key, value in config.items())
    (tmp_path / "m.toml").write_text(text + '\nexpert = "silu"\ntie_embeddings = false\n')
    real = MoETransformer(ModelConfig(**config, expert="silu", tie_embeddings=False), 30, seed=0)
    found = shapes(load_model(tmp_path / "m.toml", 30))
    assert list(found.items()) == [(name, tuple(p.shape)) for name, p in real.named_parameters()]


def test_latent_attention_of_a_hand_written_model() -> None:
    latent = {"q_rank": 5, "kv_rank": 3, "qk_nope_dim": 4, "qk_rope_dim": 2, "v_dim": 7}
    found = shapes(small(layers=1, attention=latent))
    attention = {name.split("self_attn.")[1]: shape for name, shape in found.items() if "self_attn" in name}
    assert attention == {
        "q_a_proj.weight": (5, 8),
        "q_a_layernorm.weight": (5,),
        "q_b_proj.weight": (12, 5),
        "kv_a_proj_with_mqa.weight": (5, 8),
        "kv_a_layernorm.weight": (3,),
        "kv_b_proj.weight": (22, 3),
        "o_proj.weight": (8, 14),
    }


def test_grouped_attention_with_biases_and_norms() -> None:
    found = shapes(small(layers=1, kv_heads=1, head_dim=5, qkv_bias=True, qk_norm=True))
    attention = {name.split("self_attn.")[1]: shape for name, shape in found.items() if "self_attn" in name}
    assert attention == {
        "q_proj.weight": (10, 8),
        "q_proj.bias": (10,),
        "k_proj.weight": (5, 8),
        "k_proj.bias": (5,),
        "v_proj.weight": (5, 8),
        "v_proj.bias": (5,),
        "o_proj.weight": (8, 10),
        "q_norm.weight": (5,),
        "k_norm.weight": (5,),
    }


def test_stacked_experts_are_three_dimensional_and_divided_by_expert_parallelism() -> None:
    model = small(moe={**MOE, "layout": "stacked", "shared": 3, "dense_layers": 1, "router_bias": True})
    found = shapes(model, ep=2)
    assert found["model.layers.1.mlp.experts.up_proj"] == (2, 6, 8)
    assert found["model.layers.1.mlp.experts.down_proj"] == (2, 8, 6)
    assert found["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (18, 8)
    assert found["model.layers.1.mlp.gate.weight"] == (4, 8)
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"] == (4,)
    assert found["model.layers.0.mlp.gate_proj.weight"] == (12, 8)
    assert (
        numel(model, 2)
        == numel(model, 1)
        == numel(small(moe={**MOE, "shared": 3, "dense_layers": 1, "router_bias": True}))
    )


def test_flops_are_two_per_element_and_use_the_experts_that_tokens_choose() -> None:
    flops = {p.spec.name: p.flops for p in small(moe={**MOE, "layout": "stacked"}, tie_embeddings=True).parameters(2)}
    assert flops["model.embed_tokens.weight"] == 0
    assert flops["lm_head.weight"] == 2 * 50 * 8
    assert flops["model.layers.0.self_attn.q_proj.weight"] == 2 * 64
    # Two of four experts per token; half of the experts see the tokens of both ranks.
    assert flops["model.layers.0.mlp.experts.up_proj"] == 2 * (2 * 6 * 8) * 2 * 2 / 4


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_routing(router: Kind) -> None:
    model = load_model(MODELS / "qwen3_30b_a3b.toml", router=router)
    kinds = {p.spec.name.replace("layers.0", "L"): (p.spec.kind, p.part) for p in model.parameters(128)}
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == ("adamw", "elementwise")
    assert kinds["model.L.self_attn.k_norm.weight"] == ("adamw", "elementwise")
    assert kinds["model.L.self_attn.k_proj.weight"] == ("muon", "attention")
    assert kinds["model.L.mlp.experts.0.up_proj.weight"] == ("muon", "expert")
    assert kinds["model.L.mlp.gate.weight"] == (router, "dense" if router == "muon" else "elementwise")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "width = 8 is not a multiple of heads = 3"),
        ({"kv_heads": 3, "heads": 4}, "kv_heads = 3"),
        ({"hidden": None}, "hidden is missing"),
        ({"moe": {**MOE, "top_k": 5}}, "top_k = 5"),
        ({"moe": {**MOE, "dense_layers": 3}}, "dense_layers = 3"),
        ({"widht": 8}, 'did you mean "width"'),
    ],
)
def test_impossible_models_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(**changes)


def test_files_without_vocabulary_and_wrong_expert_parallelism_are_named() -> None:
    with pytest.raises(ConfigError, match="--vocab"):
        load_model(MODELS / "debug.toml")
    with pytest.raises(ConfigError, match="use one of 1, 2, 4"):
        load_model(MODELS / "debug.toml", 64).parameters(3)
    with pytest.raises(ConfigError, match="has none"):
        load_model(MODELS / "llama3_8b.toml").parameters(2)
    assert load_model(MODELS / "llama3_8b.toml", 7).parameters(1)[0].spec.shape == (7, 4096)


def test_the_expert_parallel_size_of_a_file_gives_way_to_the_ranks() -> None:
    model = load_model(MODELS / "kimi_k2_1t.toml")
    assert [model.default_ep(world) for world in (1024, 24, 3)] == [16, 8, 1]
