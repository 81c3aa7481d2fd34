"""The language model: its size, its initial weights, and what a token can know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.routing import routes
from distmuon.train.config import ModelConfig, load_run
from distmuon.train.model import Attention, MoETransformer, Output, initialize, rotary_angles, rotate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOCABULARY = 64


def config(**changes: Any) -> ModelConfig:
    small = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "experts": 4, "expert_hidden": 24, "context": 12}
    return ModelConfig.model_validate({**small, **changes})


def build(seed: int = 0, autocast: torch.dtype | None = None, **changes: Any) -> MoETransformer:
    return MoETransformer(config(**changes), VOCABULARY, seed, autocast)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def shaped(name: str, vocabulary: int) -> MoETransformer:
    """A configured model without memory for its weights."""
    model_config = load_run(CONFIGS / "runs" / f"{name}.toml").model
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("distmuon.train.model.initialize", lambda model, seed: None)
        return MoETransformer(model_config, vocabulary, 0)


@pytest.mark.parametrize(
    ("name", "vocabulary", "sizes"),
    [
        ("moe_79m", 49_152, {"embedding": 18_874_368, "hidden": 60_180_480, "gains": 4_992}),
        ("moe_mini", 4_096, {"embedding": 524_288, "hidden": 3_346_432, "gains": 1_152}),
        ("moe_mid", 8_192, {"embedding": 2_097_152, "hidden": 20_066_304, "gains": 3_328}),
        ("debug", 512, {"embedding": 16_384, "hidden": 43_264, "gains": 160}),
    ],
)
def test_parameter_counts(name: str, vocabulary: int, sizes: dict[str, int]) -> None:
    model = shaped(name, vocabulary)
    found = dict.fromkeys(sizes, 0)
    for route in routes(model):
        part = {"muon": "hidden", "adamw": "embedding" if route.reason == "embedding" else "gains"}[route.kind]
        found[part] += math.prod(route.shape)
    assert found == sizes
    assert sum(p.numel() for p in model.parameters()) == sum(sizes.values())


def test_totals_that_the_files_promise() -> None:
    totals = {
        n: sum(p.numel() for p in shaped(n, v).parameters()) / 1e6 for n, v in (("moe_mini", 4096), ("moe_mid", 8192))
    }
    assert totals == pytest.approx({"moe_mini": 3.9, "moe_mid": 22.2}, abs=0.05)
    assert sum(p.numel() for p in shaped("moe_79m", 49_152).parameters()) == 79_059_840


@pytest.mark.parametrize(("expert", "names"), [("swiglu", ["down", "gate", "up"]), ("silu", ["down", "up"])])
def test_experts(expert: str, names: list[str]) -> None:
    experts = [n for n, _ in build(expert=expert).blocks[0].named_parameters() if "deepspeed_experts" in n]
    assert sorted({name.split(".")[-2] for name in experts}) == names
    assert len(experts) == 4 * len(names)


def test_untied_head() -> None:
    tied, untied = build(), build(tie_embeddings=False)
    extra = set(dict(untied.named_parameters())) - set(dict(tied.named_parameters()))
    assert extra == {"head.weight"}
    assert {r.name: r.reason for r in routes(untied)}["head.weight"] == "LM head"
    x = tokens()
    with torch.no_grad():
        before = untied.logits(x)[0]
        untied.head.weight.mul_(2.0)  # type: ignore[union-attr]
        torch.testing.assert_close(untied.logits(x)[0], 2 * before)


def test_initial_weights() -> None:
    model = build(width=64, expert_hidden=96)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.detach().mean()) == pytest.approx(0, abs=0.005), name
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name


def test_initial_weights_depend_on_the_seed_only() -> None:
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    torch.manual_seed(77)
    for (name, p), q, r in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.ndim == 1 or not torch.equal(p, r), name


def test_no_two_matrices_start_equal() -> None:
    matrices = [p for p in build().parameters() if p.ndim == 2]
    assert len({tuple(p.flatten()[:5].tolist()) for p in matrices}) == len(matrices)


def experts_of(model: nn.Module, block: int) -> list[Tensor]:
    local = model.get_submodule(f"blocks.{block}.moe.deepspeed_moe.experts.deepspeed_experts")
    return [expert.get_parameter("up.weight") for expert in local.children()]


@pytest.mark.parametrize(("ep_size", "rank", "first"), [(2, 0, 0), (2, 1, 2), (4, 3, 3), (2, 2, 0), (2, 3, 2)])
def test_initial_weights_do_not_depend_on_ep_size(
    ep_size: int, rank: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank r of an expert-parallel group of n holds experts r % n * experts / n and the following ones."""
    whole, shared = build(), build(ep_size=ep_size)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    initialize(shared, 0)
    for block in (0, 1):
        mine = experts_of(shared, block)
        assert len(mine) == 4 // ep_size
        for number, weight in enumerate(mine):
            assert torch.equal(weight, experts_of(whole, block)[first + number])
    names = dict(whole.named_parameters())
    for name, parameter in shared.named_parameters():
        assert "experts" in name or torch.equal(parameter, names[name]), name


def test_later_tokens_do_not_reach_earlier_positions() -> None:
    model, x = build().eval(), tokens()
    for position in (1, 5, 11):
        changed = x.clone()
        changed[:, position] = (x[:, position] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = model.logits(x)[0], model.logits(changed)[0]
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-4)
        assert bool((after[:, position:] != before[:, position:]).any(-1).all())


def test_sequences_of_a_batch_do_not_mix() -> None:
    model, x = build().eval(), tokens(3)
    with torch.no_grad():
        together = model.logits(x)[0]
        alone = torch.cat([model.logits(row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_rotary_products_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    cos, sin = rotary_angles(40, config(width=32), torch.device("cpu"))
    assert cos.shape == sin.shape == (40, 8)
    queries, keys = (rotate(x.expand(1, 1, 40, 8), cos, sin)[0, 0] for x in (q, k))
    products = queries @ keys.mT
    for shift in (0, 1, 17, -9):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert float(products.diagonal(0)[0]) == pytest.approx(float(q @ k), abs=1e-5)
    assert len({round(float(products.diagonal(s)[0]), 3) for s in range(-5, 6)}) == 11


def test_attention_depends_on_distances_only() -> None:
    """The same tokens, five positions later."""
    attention = Attention(config())
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(17, config(), torch.device("cpu"))
    with torch.no_grad():
        early, late = attention(x, cos[:12], sin[:12]), attention(x, cos[5:], sin[5:])
        assert not torch.allclose(attention(x, cos[:1], sin[:1]), early, atol=1e-3)
    torch.testing.assert_close(early, late, rtol=0, atol=1e-5)


def test_embeddings_enter_at_unit_scale() -> None:
    model, x, seen = build(), tokens(), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.logits(x)
    torch.testing.assert_close(seen, [model.embedding.weight[x] * 4.0])


def test_rotary_frequencies() -> None:
    cos, sin = rotary_angles(3, config(width=16, heads=4, rope_base=100.0), torch.device("cpu"))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]).repeat(1, 2)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert rotate(torch.ones(1, 1, 3, 4, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_word_order_matters() -> None:
    """Without positions, the last token would see a set."""
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(10.0)
    x = tokens(1)
    swapped = x[:, [1, 0, *range(2, 12)]]
    with torch.no_grad():
        assert not torch.allclose(model.logits(x)[0][:, -1], model.logits(swapped)[0][:, -1], atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_every_token_reaches_its_experts(top_k: int, training: bool) -> None:
    x = tokens(3)
    counts = build(top_k=top_k).train(training).logits(x)[2]
    assert counts.shape == (2, 4)
    assert counts.sum(1).tolist() == [x.numel() * top_k] * 2


def forward(model: MoETransformer) -> Output:
    x = tokens(4, 13)
    output: Output = model(x[:, :-1], x[:, 1:])
    return output


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_initial_loss_is_that_of_guessing(autocast: torch.dtype | None) -> None:
    output = forward(build(autocast=autocast))
    assert float(output.loss) == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert output.loss.dtype == torch.float32
    assert not output.loss.requires_grad
    assert not output.aux_loss.requires_grad


def test_objective_is_the_loss_plus_the_weighted_load_balancing_loss() -> None:
    for weight in (0.0, 0.25):
        output = forward(build(aux_loss_weight=weight))
        assert float(output.objective.detach()) == pytest.approx(float(output.loss + weight * output.aux_loss))
    # Two blocks whose loads are about level: each contributes about 1 per expert chosen.
    assert 1.5 < float(output.aux_loss) < 6.0


def test_every_parameter_gets_a_gradient() -> None:
    model = build()
    forward(model).objective.backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()] == []


def test_a_forward_pass_is_reproducible() -> None:
    """Routing has no randomness: neither sampling nor dropping."""
    model = build()
    assert torch.equal(forward(model).objective, forward(model).objective)
