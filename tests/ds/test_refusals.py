"""What DistMuon cannot honour under DeepSpeed is refused before training, in one sentence with a remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmuon
from tests.ds.engines import BF16, PARAMS, advance, build, config, network, weights
from tests.ds.session import attempt
from tests.ranks import RankPool

Refusal = tuple[list[str], str] | None
Figure = Callable[[str], None]

# (changes of the configuration, what the message names, the remedy)
REACHABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "stage 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0", "set it to 1"),
    "no stage": ({"zero_optimization": {}}, "zero_optimization.stage = 0", "set it to 1"),
    "stage 2": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2", "set it to 1"),
    "stage 3": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3", "set it to 1"),
    "stage 0 bf16": ({"zero_optimization": {"stage": 0}, **BF16}, "zero_optimization.stage = 0", "set it to 1"),
    "offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_",
        "remove it",
    ),
    "prescale": ({"prescale_gradients": True}, "prescale_gradients", "set it to false"),
    "predivide": ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor", "set it to 1.0"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", 'set it to "avg"'),
    "universal": ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "set it to false"),
    "fp16 comm": ({"communication_data_type": "fp16"}, "communication_data_type", 'set it to "fp32" or "bf16"'),
    "elastic": (
        {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
        "elastic_checkpoint",
        "set it to false",
    ),
    "quantized": (
        {"zero_optimization": {"stage": 1, "zero_quantized_weights": True}},
        "zero_quantized_weights",
        "set it to false",
    ),
    "hpz": ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size", "1"),
    "allgather": ({"disable_allgather": True}, "disable_allgather", "set it to false"),
    "accumulation": ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype", "float32"),
}

# (the optimizer.params table, what the message names, the remedy)
TABLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "max_grad_norm": ({"max_grad_norm": 1.0}, '"max_grad_norm"', "gradient_clipping"),
    "reduce_dtype": ({"reduce_dtype": "float32"}, '"reduce_dtype"', "communication_data_type"),
    "grad_accum_dtype": ({"grad_accum_dtype": "float32"}, '"grad_accum_dtype"', "data_types"),
    "unknown": ({"momentun": 0.9}, '"momentun"', 'did you mean "momentum"?'),
    "unknown nested": ({"ns": {"step": 5}}, '"ns.step"', 'did you mean "steps"?'),
    "of stock Muon": ({"ns_method": "gram"}, '"ns_method"', "legal keys are"),
    "policy": ({"policy": "even"}, "'even'", "'balanced', 'flat' or 'team'"),
    "lr": ({"lr": -1.0}, '"lr" = -1.0', "greater than or equal to 0"),
    "lr text": ({"lr": "1e-3"}, "\"lr\" = '1e-3'", "valid number"),
    "momentum": ({"momentum": 1.0}, '"momentum" = 1.0', "less than 1"),
    "betas": ({"adamw_betas": [0.9, 1.5]}, '"adamw_betas.1" = 1.5', "less than 1"),
    "steps": ({"ns": {"steps": 0}}, '"ns.steps" = 0', "greater than or equal to 1"),
    "router": ({"router": "sgd"}, "'sgd'", "'muon' or 'adamw'"),
}


def refuse(rank: int, world: int, group: Any, settings: Any) -> Refusal:
    """Try to build an engine over a dense model."""
    return attempt(lambda: build(settings, None))


def check(ranks: list[Refusal], names: str, remedy: str, kind: str = "ConfigError") -> None:
    """Every rank got the same one-sentence error."""
    assert ranks[0] is not None, "nothing was refused"
    classes, message = ranks[0]
    assert {kind, "ValueError"} <= set(classes), (classes[0], message)
    assert names in message
    assert remedy in message
    assert "\n" not in message
    assert message[-1] in ".?"
    assert all(rank == ranks[0] for rank in ranks)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("case", REACHABLE)
def test_a_setting_that_cannot_be_honoured(ds2: RankPool, case: str, figure: Figure) -> None:
    changes, names, remedy = REACHABLE[case]
    found = ds2.run(2, refuse, config(**changes))
    check(found, names, remedy)
    figure(f"unsupported DeepSpeed setting: one sentence on {sum(error is not None for error in found)} of 2 ranks")


@pytest.mark.parametrize("case", TABLES)
def test_an_illegal_optimizer_table(ds2: RankPool, case: str) -> None:
    table, names, remedy = TABLES[case]
    settings = {**config(), "optimizer": {"type": "DistMuon", "params": {**PARAMS, **table}}}
    check(ds2.run(2, refuse, settings), names, remedy)


def _yes() -> bool:
    return True


# What a CPU cannot reach, or what would change the process for good: (answers of the engine, name, remedy)
STAND_INS: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp16": ({"fp16_enabled": _yes}, "fp16.enabled", '"bf16": {"enabled": true}'),
    "pipeline": ({"pipeline_parallelism": True}, "PipelineModule", "plain nn.Module"),
    "zenflow": ({"zenflow": object()}, "zenflow", "remove it"),
    "sequence parallel": ({"sequence_parallel_size": 2}, "sequence parallelism", "data and expert parallelism"),
    "autotp": ({"autotp_size": lambda: 2}, "tensor parallelism", "data and expert parallelism"),
    "mpu": (
        {"mpu": SimpleNamespace(get_model_parallel_world_size=lambda: 2)},
        "tensor parallelism",
        "data and expert parallelism",
    ),
    "deepcompile": ({"is_deepcompile_enabled": _yes}, "deepcompile", "set it to false"),
    "autocast fp16": (
        {"torch_autocast_enabled": _yes, "torch_autocast_dtype": lambda: torch.float16},
        "torch_autocast",
        "bfloat16",
    ),
}


def stand_in(rank: int, world: int, group: Any, case: str) -> Refusal:
    """Run the check on a real engine that answers one question differently."""
    from distmuon.ds.config import check_engine

    engine = build(config(), None)
    check_engine(engine)
    answers = STAND_INS[case][0]

    class Other:
        def __getattr__(self, name: str) -> Any:
            return answers[name] if name in answers else getattr(engine, name)

    return attempt(lambda: check_engine(Other()))


@pytest.mark.parametrize("case", STAND_INS)
def test_an_engine_that_cannot_be_served(ds2: RankPool, case: str) -> None:
    check(ds2.run(2, stand_in, case), *STAND_INS[case][1:])


def client_optimizer(rank: int, world: int, group: Any, call: bool) -> Refusal:
    """Hand a DistMuon object, or a callable that makes one, to deepspeed.initialize."""
    model = network(None)

    def make(params: Any) -> Any:
        return distmuon.DistMuon(distmuon.param_groups(model))

    settings = {key: value for key, value in config().items() if key != "optimizer"}
    given = make if call else make(None)
    return attempt(lambda: build(settings, None, model=model, optimizer=given))


@pytest.mark.parametrize("call", [False, True])
def test_a_client_distmuon_object(ds2: RankPool, call: bool) -> None:
    check(ds2.run(2, client_optimizer, call), "DistMuon object", '"optimizer": {"type": "DistMuon"')


def flattened(model: nn.Module) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()
    return list(model.parameters())


def foreign(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), nn.Parameter(torch.zeros(3, 5))]


GROUPS: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "flattened": (flattened, "no hidden matrix", "zero.Init"),
    "foreign": (foreign, "(3, 5)", "pass parameters of the model"),
    "unknown kind": (
        lambda model: [{"params": list(model.parameters()), "kind": "sgd"}],
        "'sgd'",
        'use "muon" or "adamw"',
    ),
}


def given_groups(rank: int, world: int, group: Any, case: str) -> Refusal:
    """Build an engine over chosen parameters."""
    return attempt(lambda: build(config(), None, groups=GROUPS[case][0]))


@pytest.mark.fault("S6")
@pytest.mark.parametrize("case", GROUPS)
def test_06_parameters_that_cannot_be_served(ds2: RankPool, case: str, figure: Figure) -> None:
    """Silent failure 6: zero.Init makes every shape 1-D, so nothing would be left for Muon."""
    found = ds2.run(2, given_groups, case)
    check(found, *GROUPS[case][1:])
    figure(f"{case}: refused on {sum(error is not None for error in found)} of 2 ranks")


def named_pairs(rank: int, world: int, group: Any, routed: bool) -> Refusal:
    """Hand (name, parameter) pairs to deepspeed.initialize, as DistMuon takes them."""

    def pairs(model: nn.Module) -> Any:
        return distmuon.param_groups(model) if routed else list(model.named_parameters())

    return attempt(lambda: advance(build(config(), None, groups=pairs), 0, 1))


@pytest.mark.parametrize("routed", [False, True])
def test_named_pairs_are_taken_or_refused(ds2: RankPool, routed: bool) -> None:
    for error in ds2.run(2, named_pairs, routed):
        assert error is None or "ConfigError" in error[0], error


def test_a_negative_clip_is_refused_before_training(ds2: RankPool) -> None:
    check(ds2.run(2, refuse, config(gradient_clipping=-1.0)), "gradient_clipping", "0")


def test_listed_keys_are_legal(ds2: RankPool) -> None:
    error = ds2.run(2, refuse, config(params={"zzz": 1}))[0]
    assert "legal keys are" in error[1]
    for key in ("max_grad_norm", "reduce_dtype", "grad_accum_dtype"):
        assert key not in error[1]


def other_on_rank_one(rank: int, world: int, group: Any) -> Refusal:
    """Give rank 1 another learning rate."""
    return attempt(lambda: build(config(params={"lr": 0.02 + 0.01 * rank}), None))


def test_ranks_with_different_settings(ds2: RankPool) -> None:
    check(ds2.run(2, other_on_rank_one), 'setting "lr"', "on every rank", "RankMismatchError")


def refused_then_good(rank: int, world: int, group: Any) -> bool:
    """A refusal leaves the model as it was, and the process able to build a legal engine."""
    model = network(None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attempt(lambda: build(config(zero_optimization={"stage": 2}), None, model=model))
    engine = build(config(), None, model=model)
    return all(torch.equal(before[name], value) for name, value in weights(engine).items())


def test_a_refusal_changes_nothing(ds2: RankPool) -> None:
    assert ds2.run(2, refused_then_good) == [True, True]


def test_settings_without_effect_are_named(ds2: RankPool) -> None:
    """Bucket sizes of stock ZeRO are not an error, since many configurations carry them."""
    zero = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True, "allgather_bucket_size": 1000}
    for text in ds2.run(2, warned, config(zero_optimization=zero)):
        assert "allgather_bucket_size, reduce_bucket_size" in text
        assert "bucket_mb" in text


def warned(rank: int, world: int, group: Any, settings: Any) -> str:
    """What distmuon logs while an engine is built."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distmuon")
    logger.addHandler(handler)
    try:
        build(settings, None)
    finally:
        logger.removeHandler(handler)
    return "\n".join(lines)
