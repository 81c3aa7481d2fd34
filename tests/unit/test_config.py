"""Settings: what is legal, and the one sentence for what is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import Field

from distmuon import DistMuon, Muon
from distmuon.config import GroupSettings, MuonSettings, ShardSettings, make_settings, parse
from distmuon.errors import ConfigError, DistMuonError
from distmuon.ns_settings import NewtonSchulz
from distmuon.strict import Strict


class Inner(Strict):
    depth: int = 3
    width: int = 5


class Outer(Strict):
    rate: float = Field(ge=0)
    inner: Inner = Inner()


def sentence(model: type[Strict], table: dict[str, Any], where: str = "file.toml") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(model, table, where)
    assert isinstance(caught.value, DistMuonError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_legal_table() -> None:
    found = parse(Outer, {"rate": 1, "inner": {"depth": 4}}, "here")
    assert found == Outer(rate=1.0, inner=Inner(depth=4, width=5))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        NewtonSchulz().steps = 3


def test_the_table_is_not_changed() -> None:
    table = {"rate": 1.0, "inner": {"depth": 4}}
    parse(Outer, table, "here")
    assert table == {"rate": 1.0, "inner": {"depth": 4}}


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"rate": 1.0, "rat": 2.0}, 'file.toml: unknown key "rat"; did you mean "rate"?'),
        ({"rate": 1.0, "inner": {"wdith": 2}}, 'file.toml: unknown key "inner.wdith"; did you mean "width"?'),
        ({"rate": 1.0, "inner": {"xyz": 2}}, 'file.toml: unknown key "inner.xyz"; legal keys are depth, width.'),
        ({"rate": 1.0, "xyz": 2}, 'file.toml: unknown key "xyz"; legal keys are inner, rate.'),
        ({}, 'file.toml: "rate" is missing and has no default; add it.'),
        ({"rate": -1.0}, 'file.toml: "rate" = -1.0 is not legal: it must be greater than or equal to 0.'),
        (
            {"rate": 1.0, "inner": {"depth": 4.5}},
            'file.toml: "inner.depth" = 4.5 is not legal: it must be a valid integer.',
        ),
    ],
)
def test_sentences(table: dict[str, Any], found: str) -> None:
    assert sentence(Outer, table) == found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", True, None, [1.0]])
def test_what_is_no_finite_number(value: Any) -> None:
    assert sentence(Outer, {"rate": value}).startswith(f'file.toml: "rate" = {value!r} is not legal: ')


@pytest.mark.parametrize("value", [4.0, "4", True, None])
def test_what_is_no_whole_number(value: Any) -> None:
    assert f'"inner.depth" = {value!r}' in sentence(Outer, {"rate": 1.0, "inner": {"depth": value}})


def test_a_value_where_a_table_belongs() -> None:
    assert sentence(Outer, {"rate": 1.0, "inner": 3}).startswith('file.toml: "inner" = 3 is not legal: ')


def test_only_the_first_problem_is_told() -> None:
    text = sentence(Outer, {"rate": -1.0, "inner": {"depth": "x"}})
    assert "rate" in text
    assert "depth" not in text


RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("lr", [0.0, 1e-3, 10.0, 1], [-1e-9, float("nan"), float("inf"), "1e-3", None]),
    ("weight_decay", [0.0, 2.0], [-0.1, None]),
    ("momentum", [0.0, 0.999], [1.0, -0.1]),
    ("nesterov", [True, False], [1, "yes", None]),
    ("adamw_lr", [None, 0.0, 1.0], [-1.0, "x"]),
    ("adamw_betas", [(0.0, 0.999), [0.5, 0.5]], [(0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.95, 0.99), 0.9]),
    ("adamw_eps", [1e-30, 1.0], [0.0, -1e-8]),
    ("adamw_weight_decay", [None, 0.0], [-1.0]),
    ("max_grad_norm", [None, 1e-9, 5], [0.0, -1.0, float("inf")]),
    ("max_skipped_steps", [None, 1, 5, 10**9], [0, -1, 2.5, True, "5"]),
    ("adamw_backend", ["auto", "torch", "apex"], ["cuda", None]),
    ("policy", ["balanced", "flat", "team"], ["zero", None]),
    ("transport", ["auto", "scatter", "owner"], ["ring", None]),
    ("bucket_mb", [None, 1e-6, 25, 4000.0], [0.0, -1.0]),
    ("reduce_dtype", ["float32", "bfloat16", torch.float32, torch.bfloat16], ["fp32", torch.float16, torch.float64]),
    ("grad_accum_dtype", [None, "float32", torch.float32], ["bfloat16", torch.bfloat16]),
    ("ns", [NewtonSchulz(), {"steps": 3}], [{"steps": 0}, 5, None]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, legal, _ in RANGES for value in legal])
def test_legal_values(field: str, value: Any) -> None:
    found = getattr(make_settings(**{field: value}), field)
    expected = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    expected = tuple(expected) if isinstance(expected, list) else expected
    assert found == (NewtonSchulz(steps=3) if isinstance(expected, dict) else expected)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, _, illegal in RANGES for value in illegal])
def test_illegal_values(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf'^DistMuon: "{field}[."]') as caught:
        make_settings(**{field: value})
    assert str(caught.value).endswith(".")


def test_every_setting_has_its_range_tested() -> None:
    assert {field for field, _, _ in RANGES} == set(ShardSettings.model_fields)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"steps": 0}, '"steps" = 0 is not legal: it must be greater than or equal to 1.'),
        ({"steps": 21}, '"steps" = 21 is not legal: it must be less than or equal to 20.'),
        (
            {"dtype": "float64"},
            "\"dtype\" = 'float64' is not legal: it must be 'float32', 'bfloat16' or 'float16'.",
        ),
        (
            {"preset": "mine"},
            "\"preset\" = 'mine' is not legal: it must be 'papers', 'you', 'polar_express', 'cans', 'cubic5', "
            "'papers8+2', 'opt4', 'opt5', 'opt6', 'optimal' or 'custom'.",
        ),
        ({"step": 5}, 'unknown key "step"; did you mean "steps"?'),
    ],
)
def test_newton_schulz(table: dict[str, Any], problem: str) -> None:
    assert sentence(NewtonSchulz, table, "ns") == f"ns: {problem}"


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            {"policy": "flat", "transport": "owner"},
            'transport = "owner" does not go with policy = "flat"; use "scatter".',
        ),
        (
            {"policy": "team", "transport": "scatter"},
            'transport = "scatter" does not go with policy = "team"; use "owner".',
        ),
        (
            {"policy": "team", "ns": {"dtype": "float16"}},
            'policy = "team" does not support ns.dtype = "float16"; use "bfloat16".',
        ),
    ],
)
def test_placements_that_do_not_go_together(table: dict[str, Any], problem: str) -> None:
    assert sentence(ShardSettings, table, "DistMuon") == f"DistMuon: {problem}"


def test_nested_newton_schulz_key() -> None:
    assert sentence(ShardSettings, {"ns": {"stesp": 5}}, "x") == 'x: unknown key "ns.stesp"; did you mean "steps"?'


@pytest.mark.parametrize("build", [DistMuon, Muon])
def test_optimizers_check_their_arguments(build: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    for field, _, illegal in RANGES:
        if field in MuonSettings.model_fields and field not in ("adamw_backend", "ns"):
            with pytest.raises(ConfigError, match=f"^{build.__name__}: .*{field}"):
                build([weight], **{field: illegal[0]})


def test_distmuon_takes_dtypes_and_a_tensor_as_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = DistMuon([weight], lr=torch.tensor(0.5), reduce_dtype=torch.bfloat16, grad_accum_dtype=torch.float32)
    assert optimizer.settings == ShardSettings(lr=0.5, reduce_dtype="bfloat16", grad_accum_dtype="float32")
    with pytest.raises(ConfigError, match=re.escape("\"reduce_dtype\" = 'float16' is not legal")):
        DistMuon([weight], reduce_dtype=torch.float16)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_group_defaults_are_complete(kind: Any) -> None:
    settings = MuonSettings(lr=0.5, adamw_lr=0.25, weight_decay=0.125, adamw_weight_decay=0.0)
    defaults = settings.group_defaults(kind)
    assert set(defaults) == set(GroupSettings.model_fields)
    expected = (0.5, 0.125) if kind == "muon" else (0.25, 0.0)
    assert (defaults["lr"], defaults["weight_decay"]) == expected
    defaults["lr"] = 9.0
    assert settings.group_defaults(kind)["lr"] != 9.0


def test_zero_rates_of_adamw_are_not_missing_ones() -> None:
    defaults = MuonSettings(adamw_lr=0.0, adamw_weight_decay=0.0).group_defaults("adamw")
    assert (defaults["lr"], defaults["weight_decay"]) == (0.0, 0.0)
