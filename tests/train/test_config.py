"""Every configuration in the repository is legal, and every illegal one is refused with one sentence."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from distmuon.config import parse
from distmuon.ds.config import JsonParams
from distmuon.errors import ConfigError
from distmuon.train.config import ModelConfig, RunConfig, load_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS, MODELS, DEEPSPEED = (sorted((CONFIGS / kind).glob("*.*")) for kind in ("runs", "models", "deepspeed"))


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, table, "run.toml")
    text = str(caught.value)
    assert text.startswith("run.toml: ")
    assert text.endswith((".", "?"))
    assert "\n" not in text
    return text.removeprefix("run.toml: ")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_run_files(path: Path, world: int) -> None:
    run = load_run(path)
    assert run.accumulation(world) * world * run.batch.micro_sequences == run.batch.sequences
    assert run.name != RunConfig().name
    assert run.model == parse(
        ModelConfig, tomllib.loads((path.parent / str(table(path)["model"])).read_text()), "model"
    )


def table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_run_files_have_different_names() -> None:
    assert len({load_run(path).name for path in RUNS}) == len(RUNS) >= 5


@pytest.mark.parametrize(
    "path", [path for path in MODELS if "vocabulary" not in table(path)], ids=lambda path: path.stem
)
def test_model_files(path: Path) -> None:
    """Those with a vocabulary are for planning only."""
    model = parse(ModelConfig, table(path), str(path))
    assert model.model_dump(include=set(table(path))) == table(path)
    assert any(load_run(run).model == model for run in RUNS)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_files(path: Path) -> None:
    config = json.loads(path.read_text())
    optimizer = config["optimizer"]
    assert config["zero_optimization"] == {"stage": 1}
    assert (optimizer if isinstance(optimizer, str) else optimizer["type"]) == "DistMuon"
    if not isinstance(optimizer, str):
        parse(JsonParams, optimizer["params"], str(path))


def test_the_comparison_differs_in_the_optimizer_only() -> None:
    ours, theirs = (load_run(CONFIGS / "runs" / f"{name}.toml") for name in ("moe_mini", "moe_mini_adamw"))
    changed = {"name": theirs.name, "optimizer": theirs.optimizer}
    assert ours.model_copy(update=changed) == theirs
    assert ours.optimizer.model_copy(update={"name": "adamw", "lr": theirs.optimizer.lr}) == theirs.optimizer


def test_defaults() -> None:
    run = parse(RunConfig, {}, "run.toml")
    assert run == RunConfig()
    assert run.directory == Path("runs") / "run"


WRONG: list[tuple[str, Any]] = [
    *[("name", value) for value in ("", "../up", "a/b", ".hidden", "with space", 3)],
    *[("out", 3), ("resume", "yes"), ("seed", -1), ("seed", 2**31), ("seed", 1.0)],
    *[("model.width", 1), ("model.width", 128.0), ("model.layers", 0), ("model.heads", 0), ("model.kv_heads", 0)],
    *[("model.experts", 0), ("model.top_k", 0), ("model.expert_hidden", 0), ("model.expert", "gelu")],
    *[("model.context", 1), ("model.rope_base", 1.0), ("model.tie_embeddings", 1)],
    *[("model.aux_loss_weight", -0.1), ("model.ep_size", 0)],
    *[("data.max_docs", 0), ("data.val_fraction", 0.0), ("data.val_fraction", 1.0), ("data.eos_token", "")],
    *[("optimizer.name", "sgd"), ("optimizer.lr", -1.0), ("optimizer.lr", float("nan")), ("optimizer.lr", "1e-3")],
    *[("optimizer.embedding_lr", float("inf")), ("optimizer.weight_decay", -0.1), ("optimizer.momentum", 1.0)],
    *[("optimizer.nesterov", 1), ("optimizer.beta1", 1.0), ("optimizer.beta2", -0.1), ("optimizer.eps", 0.0)],
    *[("optimizer.gradient_clipping", -1.0), ("optimizer.router", "sgd"), ("optimizer.policy", "zero")],
    *[("optimizer.transport", "ring"), ("optimizer.overlap_forward", "yes")],
    *[("optimizer.bucket_mb", 0.0), ("optimizer.ns.steps", 0), ("optimizer.ns.dtype", "float64")],
    *[("schedule.updates", 0), ("schedule.updates", 10.0), ("schedule.warmup", 1.0), ("schedule.warmup", -0.1)],
    *[("schedule.final_lr", 1.1), ("schedule.final_lr", -0.1)],
    *[("batch.sequences", 0), ("batch.micro_sequences", 0), ("batch.micro_sequences", True)],
    *[("precision.parameters", "float16"), ("precision.autocast", "on"), ("precision.matmul", "low")],
    *[("evaluation.every", 0), ("evaluation.sequences", 0)],
    *[("checkpoint.background", 1), ("timeout_s", 0.0), ("timeout_s", 1e6), ("watchdog_s", 0.0), ("watchdog_s", "1")],
    *[("checkpoint.every", 0), ("checkpoint.keep", 0), ("trace", 1), ("trace_steps", 0), ("trace_steps", True)],
]


def nested(field: str, value: Any) -> dict[str, Any]:
    for part in reversed(field.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_illegal_values(field: str, value: Any) -> None:
    assert refusal(nested(field, value)).startswith(f'"{field}" = {value!r} is not legal: ')


def test_every_field_has_an_illegal_value_above() -> None:
    """But those with a grammar of their own, tested with the data, and a path that may be any text."""
    known = {field for field, _ in WRONG} | {
        "data.source",
        "data.tokenizer",
        "data.cache_dir",
        "data.document_separator",
    }
    fields = set()
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        fields |= {f"{name}.{key}" for key in inner} if inner else {name}
    assert fields - {"optimizer.ns"} <= known


@pytest.mark.parametrize(("field", "value"), [("data.source", 5), ("data.source", [5]), ("data.tokenizer", 5)])
def test_specs_of_another_type(field: str, value: Any) -> None:
    assert refusal(nested(field, value)).startswith(f'"{field}" = {value!r} is not legal: ')


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("shedule", 'unknown key "shedule"; did you mean "schedule"?'),
        ("optimizer.learning_rate", 'unknown key "optimizer.learning_rate"; legal keys are beta1, beta2, bucket_mb'),
        ("optimizer.weight_deacy", 'unknown key "optimizer.weight_deacy"; did you mean "weight_decay"?'),
        ("optimizer.ns.step", 'unknown key "optimizer.ns.step"; did you mean "steps"?'),
        ("checkpoint.resum", 'unknown key "checkpoint.resum"; legal keys are background, every, keep.'),
        ("model.vocabulary", 'unknown key "model.vocabulary"; legal keys are '),
    ],
)
def test_unknown_keys(field: str, sentence: str) -> None:
    assert refusal(nested(field, 1)).startswith(sentence)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"width": 30, "heads": 4}, "width = 30 is not a multiple of heads = 4"),
        ({"heads": 4, "kv_heads": 3}, "heads = 4 is not a multiple of kv_heads = 3"),
        ({"experts": 4, "ep_size": 3}, "experts = 4 is not a multiple of ep_size = 3"),
        ({"width": 20, "heads": 4}, "width / heads = 5 must be even for rotary positions"),
        ({"experts": 4, "top_k": 5}, "top_k = 5 is more than experts = 4"),
    ],
)
def test_shapes_that_do_not_fit(model: dict[str, Any], sentence: str) -> None:
    text = refusal({"model": model})
    assert sentence in text
    assert text.startswith('"model" is not legal: ')


@pytest.mark.parametrize(
    ("world", "micro", "sequences", "expected"), [(1, 4, 16, 4), (2, 4, 16, 2), (4, 4, 16, 1), (3, 1, 9, 3)]
)
def test_accumulation(world: int, micro: int, sequences: int, expected: int) -> None:
    run = parse(RunConfig, {"batch": {"sequences": sequences, "micro_sequences": micro}}, "run.toml")
    assert run.accumulation(world) == expected


@pytest.mark.parametrize(
    ("world", "changes", "sentence"),
    [
        (3, {}, "batch.sequences = 16 is not a multiple of 3 ranks x batch.micro_sequences = 4; change one of them."),
        (8, {}, "batch.sequences = 16 is not a multiple of 8 ranks x batch.micro_sequences = 4; change one of them."),
        (
            1,
            {"batch": {"micro_sequences": 3}},
            "batch.sequences = 16 is not a multiple of 1 ranks x batch.micro_sequences = 3; change one of them.",
        ),
        (
            2,
            {"model": {"ep_size": 4}},
            "model.ep_size = 4 does not divide the 2 ranks; use a divisor of 2, or start another number of ranks.",
        ),
    ],
)
def test_accumulation_errors(world: int, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, changes, "run.toml").accumulation(world)
    assert str(caught.value) == sentence


def test_a_run_file_may_hold_its_model(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "x"\n[model]\nwidth = 64\n')
    assert load_run(path).model == ModelConfig(width=64)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.toml").write_text("width = 32\n")
    path.write_text('name = "x"\nmodel = "models/m.toml"\n')
    assert load_run(path).model == ModelConfig(width=32)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "{path} does not exist; look in configs/runs, configs/models and configs/machines."),
        (b"name = \n", "{path} cannot be read as TOML: "),
        (b"name = '\xff'\n", "{path} cannot be read as TOML: "),
        (b"model = 'gone.toml'\n", "{dir}/gone.toml does not exist; "),
        (b"model = 3\n", '{path}: "model" = 3 is not legal: '),
        (b"[schedule]\nupdates = 0\n", '{path}: "schedule.updates" = 0 is not legal: '),
    ],
)
def test_files_that_cannot_be_used(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(sentence.format(path=path, dir=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_run(tmp_path)
