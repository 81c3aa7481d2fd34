"""F18: thousands of broken configurations; each is refused by one of our errors, or valid and reads back the same."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from pydantic import BaseModel

from distmuon import DistMuon, Muon
from distmuon.config import MuonSettings, ShardSettings, parse
from distmuon.ds.config import JsonParams, normalize
from distmuon.errors import ConfigError
from distmuon.machine import Machine
from distmuon.planning.architecture import Architecture
from distmuon.planning.model_file import load_model
from distmuon.train.config import ModelConfig, RunConfig, load_run, read_toml
from distmuon.train.overrides import override
from tests.unit.fuzzing import TOML_TEXTS, TOML_VALUES, Broken, Check, Tally, broken, broken_text, fuzz, nested, places

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COUNTS = {
    **{"run tables": 1500, "run files": 1000, "flags": 1500, "DeepSpeed tables": 1500},
    **{"arguments": 1500, "param groups": 1000, "model tables": 800, "model files": 600},
    **{"machine tables": 400, "machine files": 200},
}
SECONDS = 60.0

Figure = Callable[[str], None]


def test_there_are_ten_thousand() -> None:
    assert sum(COUNTS.values()) == 10_000


def judge(what: str, strategy: st.SearchStrategy[Any], check: Check, figure: Figure) -> Tally:
    """Fuzz with this kind's share of the count and of the time."""
    tally = fuzz(COUNTS[what], strategy, check)
    figure(f"{what}: {tally}")
    assert tally.total >= COUNTS[what]
    assert tally.seconds <= SECONDS * COUNTS[what] / 10_000
    # Most changes are wrong, some are not.
    assert tally.refused > tally.total / 3
    assert tally.valid > tally.total / 100
    return tally


def round_trips(config: BaseModel) -> None:
    """A configuration is what its own tables say, as Python and as JSON."""
    assert parse(type(config), config.model_dump(), "again") == config
    assert parse(type(config), json.loads(config.model_dump_json()), "again") == config


def reads(model: type[BaseModel]) -> Check:
    return lambda table: round_trips(parse(model, table, "table"))


def texts(kind: str) -> list[str]:
    return [path.read_text() for path in sorted((CONFIGS / kind).glob("*.toml"))]


def tables(kind: str) -> list[dict[str, Any]]:
    return [tomllib.loads(text) for text in texts(kind)]


@pytest.mark.fault("F18")
def test_run_tables(figure: Figure) -> None:
    bases = [load_run(path).model_dump() for path in sorted((CONFIGS / "runs").glob("*.toml"))]
    judge("run tables", broken(bases), reads(RunConfig), figure)


@pytest.mark.fault("F18")
def test_run_files(figure: Figure, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(CONFIGS / "models")
    path = tmp_path / "runs" / "run.toml"
    path.parent.mkdir()

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        round_trips(load_run(path))

    judge("run files", broken_text(texts("runs")), check, figure)


@pytest.mark.fault("F18")
def test_flags(figure: Figure) -> None:
    base = RunConfig()
    names = [".".join(map(str, path)) for path in places(base.model_dump())]
    value = st.one_of(st.sampled_from([*TOML_VALUES, *TOML_TEXTS, "1\nx = 2"]), st.text(max_size=5))
    name = st.one_of(
        st.sampled_from([*names, *(f"{name}.x" for name in names), "", ".", "..", "--"]), st.text(max_size=5)
    )
    flag = st.one_of(
        st.tuples(name, value).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(name, value).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.one_of(name.map("--{}".format), st.text(max_size=3)).map(lambda text: [text]),
    )
    flags = st.lists(flag, min_size=1, max_size=3).map(
        lambda lists: Broken([word for words in lists for word in words])
    )
    judge("flags", flags, lambda words: round_trips(override(base, words)), figure)


@pytest.mark.fault("F18")
def test_deepspeed_tables(figure: Figure) -> None:
    params = JsonParams(splits={"*.qkv.weight": 3, "*.kv": [4, 8]}, ns={"preset": "opt5", "restarts": None})
    bases = [{"optimizer": {"type": "DistMuon", "params": params.model_dump()}}, {"optimizer": "distmuon"}]

    def check(config: dict[str, Any]) -> None:
        block = normalize(config).get("optimizer")
        # Another type of optimizer is DeepSpeed's to check.
        table = block.get("params") if isinstance(block, dict) else {}
        round_trips(parse(JsonParams, table if isinstance(table, dict) else {}, "optimizer.params"))

    judge("DeepSpeed tables", broken(bases), check, figure)


def weights() -> list[tuple[str, torch.nn.Parameter]]:
    return [("w", torch.nn.Parameter(torch.ones(2, 3))), ("b", torch.nn.Parameter(torch.ones(3)))]


@pytest.mark.fault("F18")
def test_arguments(figure: Figure) -> None:
    muon = {name: value for name, value in dict(MuonSettings()).items() if name != "adamw_backend"}
    sharded = dict(ShardSettings(grad_accum_dtype="float32")) | {"reduce_dtype": torch.bfloat16}

    def check(arguments: dict[str, Any]) -> None:
        # Names that neither has are Python's to refuse.
        build = DistMuon if "policy" in arguments else Muon
        optimizer = build(
            weights(), **{name: arguments[name] for name in arguments if build is DistMuon or name in muon}
        )
        round_trips(optimizer.settings)
        optimizer.load_state_dict(optimizer.state_dict())

    judge("arguments", broken([muon, sharded], new_keys=False), check, figure)


@pytest.mark.fault("F18")
def test_param_groups(figure: Figure) -> None:
    group = {**MuonSettings().group_defaults("muon"), "lr": torch.tensor(0.1), "note": "kept"}
    bases = [{"groups": [group, {**MuonSettings().group_defaults("adamw"), "kind": "adamw"}]}]
    tensors = [parameter for _, parameter in weights()]

    def check(table: dict[str, Any]) -> None:
        groups = table.get("groups", [])
        if not isinstance(groups, list) or not all(isinstance(inner, dict) for inner in groups):
            raise ConfigError("params are no groups.")
        given = [{**inner, "params": [tensor]} for inner, tensor in zip(groups, tensors, strict=False)]
        optimizer = Muon(given)
        optimizer.load_state_dict(optimizer.state_dict())

    judge("param groups", broken(bases), check, figure)


@pytest.mark.fault("F18")
def test_model_tables(figure: Figure) -> None:
    bases = [table for table in tables("models") if "vocabulary" in table]
    judge("model tables", broken(bases), reads(Architecture), figure)


@pytest.mark.fault("F18")
def test_model_files(figure: Figure, tmp_path: Path) -> None:
    path = tmp_path / "model.toml"

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        model = load_model(path, vocabulary=None)
        assert isinstance(model.shape, Architecture | ModelConfig)
        round_trips(model.shape)

    judge("model files", broken_text(texts("models")), check, figure)


@pytest.mark.fault("F18")
def test_machine_tables(figure: Figure) -> None:
    judge("machine tables", broken(tables("machines")), reads(Machine), figure)


@pytest.mark.fault("F18")
def test_machine_files(figure: Figure, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        round_trips(parse(Machine, read_toml(path), "machine.toml"))

    judge("machine files", broken_text(texts("machines")), check, figure)


SHAPE = {"vocabulary": 8, "width": 8, "layers": 1, "heads": 1}
NAMED: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    (RunConfig, {"optimizer": {"lr": float("nan")}}, '"optimizer.lr" = nan is not legal: it must be a finite number.'),
    (RunConfig, {"optimizer": {"lr": 1e999}}, '"optimizer.lr" = inf is not legal: it must be a finite number.'),
    (RunConfig, {"optimizer": {"lr": -1}}, '"optimizer.lr" = -1 is not legal: it must be greater than or equal to 0.'),
    (RunConfig, {"optimizer": {"lr": "0.02"}}, "\"optimizer.lr\" = '0.02' is not legal: it must be a valid number."),
    (RunConfig, {"optimizer": {"lr": True}}, '"optimizer.lr" = True is not legal: it must be a valid number.'),
    (
        RunConfig,
        {"optimizer": None},
        '"optimizer" = None is not legal: it must be a valid dictionary or instance of OptimizerConfig.',
    ),
    (RunConfig, {"seed": 2**40}, '"seed" = 1099511627776 is not legal: it must be less than 2147483648.'),
    (
        RunConfig,
        {"optimizer": {"bucket_mb": 1e308}},
        '"optimizer.bucket_mb" = 1e+308 is not legal: it must be less than or equal to 1000000.',
    ),
    (
        RunConfig,
        {"run": {"run": {}}},
        'unknown key "run"; legal keys are batch, checkpoint, data, evaluation, model, name, optimizer, out, '
        "precision, resume, schedule, seed, timeout_s, trace, trace_steps, watchdog_s.",
    ),
    (RunConfig, {"se\ned": 1}, 'unknown key "se\\ned"; did you mean "seed"?'),
    (RunConfig, {"trace": nested(200)}, '"trace" = [[[[...]]]] is not legal: it must be a valid boolean.'),
    (
        RunConfig,
        {"resume": "x" * 5000},
        f"\"resume\" = '{'x' * 37}...{'x' * 38}' is not legal: it must be 'never' or 'auto'.",
    ),
    (JsonParams, {"splits": {"q": 1.5}}, '"splits.q" = 1.5 is not legal: it must be a valid integer.'),
    (JsonParams, {"ns": {"stesp": 5}}, 'unknown key "ns.stesp"; did you mean "steps"?'),
    (Machine, {"link_efficiency": 1.5}, '"link_efficiency" = 1.5 is not legal: it must be less than or equal to 1.'),
    (Architecture, {**SHAPE, "moe": {"cuont": 1}}, 'unknown key "moe.cuont"; did you mean "count"?'),
    (Architecture, {"width": 8}, '"vocabulary" is missing and has no default; add it.'),
    (Architecture, {**SHAPE, "moe": {"count": 1}}, '"moe.top_k" is missing and has no default; add it.'),
]


@pytest.mark.parametrize(("model", "table", "sentence"), NAMED)
def test_sentences(model: type[BaseModel], table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, table, "file")
    assert str(caught.value) == f"file: {sentence}"


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 5000, "x = \x00", "x = '\ud800'"])
def test_texts_that_are_no_toml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError, match=r"^\S*run.toml cannot be read as TOML: [^\n]{10,200}\.$"):
        load_run(path)


def test_groups_with_values_of_other_types() -> None:
    for name, value in [("betas", 0.9), ("betas", None), ("lr", torch.ones(2)), ("momentum", "0.9"), ("eps", [1e-8])]:
        with pytest.raises(ConfigError, match=rf'^param group: "{name}[.0-9]*" = .* is not legal: it must be '):
            Muon([{"params": [torch.nn.Parameter(torch.ones(2, 2))], "kind": "muon", name: value}])
