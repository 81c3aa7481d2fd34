"""What of a run reaches DeepSpeed: groups with their rates, the JSON, the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distmuon.config import parse
from distmuon.ds.config import JsonParams
from distmuon.train.config import ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig
from distmuon.train.engine import deepspeed_config, parameter_groups, rate
from distmuon.train.model import MoETransformer

MODEL: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "experts": 2, "expert_hidden": 8}
RATES = {"lr": 0.5, "embedding_lr": 0.25, "weight_decay": 0.125}


def model(**changes: Any) -> MoETransformer:
    return MoETransformer(ModelConfig.model_validate({**MODEL, "context": 8, **changes}), 32, 0)


def groups(module: MoETransformer, **settings: Any) -> dict[str, dict[str, Any]]:
    config = OptimizerConfig.model_validate({**RATES, **settings})
    return {group["name"]: group for group in parameter_groups(config, module)}


def names(module: MoETransformer, group: dict[str, Any]) -> set[str]:
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def test_distmuon_groups() -> None:
    module = model()
    found = groups(module)
    table = {name: (g["kind"], g["lr"], g["weight_decay"]) for name, g in found.items()}
    assert table == {
        "embeddings": ("adamw", 0.25, 0.125),
        "gains": ("adamw", 0.5, 0.0),
        "matrices": ("muon", 0.5, 0.125),
    }
    assert names(module, found["embeddings"]) == {"embedding.weight"}
    assert {name.split(".")[-2] for name in names(module, found["gains"])} == {"attention_norm", "moe_norm", "norm"}
    assert {p.ndim for p in found["matrices"]["params"]} == {2}


@pytest.mark.parametrize("name", ["distmuon", "adamw", "deepspeed-adamw"])
@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_every_parameter_is_in_one_group(name: str, router: str) -> None:
    module = model(tie_embeddings=False)
    members = [n for group in groups(module, name=name, router=router).values() for n in names(module, group)]
    assert sorted(members) == sorted(n for n, _ in module.named_parameters())


def test_an_untied_head_has_the_rate_of_the_embedding() -> None:
    module = model(tie_embeddings=False)
    assert names(module, groups(module)["embeddings"]) == {"embedding.weight", "head.weight"}


def test_routers_under_adamw_are_a_group_with_the_rate_of_matrices() -> None:
    module = model()
    found = groups(module, router="adamw")
    assert names(module, found["routers"]) == {"blocks.0.moe.deepspeed_moe.gate.wg.weight"}
    assert (found["routers"]["kind"], found["routers"]["lr"], found["routers"]["weight_decay"]) == ("adamw", 0.5, 0.125)


def test_adamw_differs_in_the_rule_only() -> None:
    ours, theirs = groups(model()), groups(model(), name="adamw")
    for name, group in ours.items():
        assert theirs[name]["kind"] == "adamw"
        assert (theirs[name]["lr"], theirs[name]["weight_decay"]) == (group["lr"], group["weight_decay"])
        assert len(theirs[name]["params"]) == len(group["params"])


def test_stock_adamw_gets_no_kind() -> None:
    assert all("kind" not in group for group in groups(model(), name="deepspeed-adamw").values())


def run(**tables: Any) -> RunConfig:
    return parse(RunConfig, {"model": {**MODEL, "context": 8}, **tables}, "run.toml")


def test_json_of_distmuon() -> None:
    optimizer = {
        **RATES,
        **{"momentum": 0.5, "nesterov": False, "beta1": 0.25, "beta2": 0.75, "eps": 1e-6, "router": "adamw"},
        **{"policy": "flat", "bucket_mb": 3.0, "gradient_clipping": 0.5, "ns": {"steps": 3, "dtype": "float32"}},
    }
    found = deepspeed_config(run(optimizer=optimizer), 2)
    assert found["optimizer"]["type"] == "DistMuon"
    params = parse(JsonParams, found["optimizer"]["params"], "params")
    assert (params.lr, params.weight_decay, params.momentum, params.nesterov) == (0.5, 0.125, 0.5, False)
    assert (params.adamw_betas, params.adamw_eps, params.router) == ((0.25, 0.75), 1e-6, "adamw")
    assert (params.policy, params.bucket_mb) == ("flat", 3.0)
    assert (params.ns.steps, params.ns.dtype) == (3, "float32")
    assert found["gradient_clipping"] == 0.5
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 2)
    assert found["zero_optimization"]["stage"] == 1


def test_json_of_stock_adamw() -> None:
    found = deepspeed_config(run(optimizer={"name": "deepspeed-adamw", "beta1": 0.25, "eps": 1e-6}), 1)["optimizer"]
    assert found["type"] == "AdamW"
    assert found["params"]["betas"] == [0.25, 0.95]
    assert found["params"]["eps"] == 1e-6


def test_adamw_runs_on_our_own_path() -> None:
    assert deepspeed_config(run(optimizer={"name": "adamw"}), 1)["optimizer"]["type"] == "DistMuon"


@pytest.mark.parametrize(("parameters", "enabled"), [("float32", False), ("bfloat16", True)])
def test_precision(parameters: str, enabled: bool) -> None:
    found = deepspeed_config(run(precision={"parameters": parameters}), 1)
    assert found["bf16"]["enabled"] is enabled
    assert found["communication_data_type"] == "fp32"
    assert found["data_types"] == ({"grad_accum_dtype": "fp32"} if enabled else {})


def shares(**settings: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    share = rate(schedule)
    return [share(update) for update in range(schedule.updates + 1)]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert shares(updates=100, warmup=0.05)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_no_warm_up() -> None:
    found = shares(updates=100, warmup=0.0)
    assert found[0] == 1.0
    assert found[1] < 1.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("updates", "warmup"), [(100, 0.05), (37, 0.3), (10, 0.0)])
def test_cosine_ends_at_the_final_rate(updates: int, warmup: float, final: float) -> None:
    found = shares(updates=updates, warmup=warmup, final_lr=final)
    start = round(warmup * updates)
    assert found[-1] == pytest.approx(final, abs=1e-12)
    assert all(later <= earlier for earlier, later in zip(found[start:], found[start + 1 :], strict=False))
    # Halfway, in the middle of the two rates; after a third, 3/4 of the way above the final one.
    for part, height in ((1 / 2, 1 / 2), (1 / 3, 3 / 4)):
        schedule = ScheduleConfig(updates=600, warmup=0.0, final_lr=final)
        assert rate(schedule)(round(600 * part)) == pytest.approx(final + (1 - final) * height)


def test_after_the_end_the_rate_stays() -> None:
    share = rate(ScheduleConfig(updates=10, warmup=0.0, final_lr=0.25))
    assert share(11) == share(1000) == pytest.approx(0.25)


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_the_shortest_runs(updates: int, warmup: float) -> None:
    assert all(0 < share <= 1 and math.isfinite(share) for share in shares(updates=updates, warmup=warmup))


def test_schedule_drives_every_group() -> None:
    module = model()
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups(module).values()])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(ScheduleConfig(updates=10, warmup=0.2)))
    assert sorted(scheduler.get_last_lr()) == [0.125, 0.25, 0.25]
