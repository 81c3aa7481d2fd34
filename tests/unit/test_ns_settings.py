"""Newton-Schulz settings: what is legal, what is refused and why, and what tables from files become."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from distmuon.coefficients import PresetName, gram_margin
from distmuon.config import ShardSettings, parse
from distmuon.errors import ConfigError
from distmuon.ns_settings import NewtonSchulz

CUBIC = (1.5, -0.5, 0.0)
# opt5 as published here, for the plain form: tolerates 1 % of overshoot.
OPT5 = (
    (8.15505, -22.765023, 16.362959),
    (3.991377, -2.843176, 0.521479),
    (3.597729, -2.639854, 0.51028),
    (2.639725, -1.922841, 0.431066),
    (1.96159, -1.343177, 0.384433),
)
RESTARTS = "must be one or more increasing numbers of steps from 1 to 4; without a restart the Gram form diverges"
UNSAFE = 'form = "gram" diverges with preset "you" on sparse matrices; use form = "plain"'
WIDE_MARGIN = 'form = "gram" needs coefficients that tolerate 8% of overshoot, preset '
# Field, legal values, and illegal ones with what the sentence says.
FIELDS: list[tuple[str, list[Any], list[tuple[Any, str]]]] = [
    (
        "preset",
        ["papers", "opt4", "papers8+2"],
        [("pap", "must be 'papers', 'you', .* or 'custom'"), (None, "must be")],
    ),
    (
        "steps",
        [None, 1, 20],
        [(0, "must be greater than or equal to 1"), (21, "must be less than or equal to 20"), (5.0, "valid integer")],
    ),
    ("dtype", ["float32", "bfloat16", "float16"], [("bf16", "must be 'float32', 'bfloat16' or 'float16'")]),
    ("form", ["auto", "plain", "gram"], [("Gram", "must be 'auto', 'plain' or 'gram'"), (None, "must be")]),
    ("kernels", ["auto", "torch", "triton"], [("cuda", "must be 'auto', 'torch' or 'triton'")]),
    ("restarts", [None], [("13", "must be a "), (3, "must be a ")]),
    ("lower", [None], [(0.0, "greater than 0"), (1.0, "less than 1"), ("x", "valid number"), (float("nan"), "finite")]),
    ("start", [None], [("l2", "must be 'frobenius' or 'schatten8'")]),
    ("coefficients", [None], [(1.5, "must be a "), ("abc", "must be a ")]),
]
# Combinations of legal fields, and what refuses them.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"preset": "you", "steps": 4}, 'steps = 4 is not legal: preset "you" has 5 steps'),
    ({"preset": "opt5", "steps": 6}, 'steps = 6 is not legal: preset "opt5" has 5 steps'),
    ({"preset": "papers8+2", "steps": 9}, "steps = 9 is not legal: .* has 10 steps"),
    ({"preset": "optimal", "steps": 2}, "steps = 2 is not legal: .* in so few"),
    ({"preset": "optimal", "steps": 4, "lower": 1e-3}, r"steps = 4 is not legal: .*\[0.001, 1\]"),
    ({"lower": 0.1}, 'lower = 0.1 is not legal with preset "papers"'),
    ({"preset": "opt5", "lower": 0.1}, 'lower = 0.1 is not legal with preset "opt5"'),
    ({"start": "schatten8"}, 'start = schatten8 is not legal with preset "papers"'),
    ({"coefficients": (CUBIC,)}, 'coefficients = .* is not legal with preset "papers"'),
    ({"preset": "custom"}, 'preset "custom" needs 1 to 20 triples'),
    ({"preset": "custom", "coefficients": ()}, 'preset "custom" needs 1 to 20 triples'),
    ({"preset": "custom", "coefficients": ((5.0, 0.0, 0.0),)}, r"take the singular value 1.010 to 5.05"),
    ({"preset": "custom", "coefficients": (CUBIC,) * 3, "steps": 4}, 'steps = 4 .* preset "custom" has 3 steps'),
    ({"restarts": (1, 3)}, r'restarts = \(1, 3\) needs form = "gram", not "auto"'),
    ({"restarts": (1, 3), "form": "plain"}, r'restarts = \(1, 3\) needs form = "gram", not "plain"'),
    ({"form": "gram", "restarts": ()}, rf"restarts = \(\) {RESTARTS}"),
    ({"form": "gram", "restarts": (0, 3)}, rf"restarts = \(0, 3\) {RESTARTS}"),
    ({"form": "gram", "restarts": (-1, 3)}, rf"restarts = \(-1, 3\) {RESTARTS}"),
    ({"form": "gram", "restarts": (1, 3, 5)}, rf"restarts = \(1, 3, 5\) {RESTARTS}"),
    ({"form": "gram", "restarts": (3, 1)}, rf"restarts = \(3, 1\) {RESTARTS}"),
    ({"form": "gram", "restarts": (1, 1, 3)}, rf"restarts = \(1, 1, 3\) {RESTARTS}"),
    ({"form": "gram", "restarts": (2,)}, r"restarts = \(2,\) leaves 3 steps without a restart; bfloat16 allows 2"),
    ({"form": "gram", "restarts": (3,), "preset": "opt5"}, "leaves 3 steps without a restart; bfloat16 allows 2"),
    ({"form": "gram", "restarts": (2,), "dtype": "float16"}, "leaves 3 steps without a restart; float16 allows 2"),
    ({"form": "gram", "restarts": (1,), "dtype": "float32"}, "leaves 4 steps without a restart; float32 allows 3"),
    ({"form": "gram", "steps": 1}, 'form = "gram" needs at least 3 steps, not 1, .* use form = "plain"'),
    ({"form": "gram", "steps": 2}, 'form = "gram" needs at least 3 steps, not 2, .* use form = "plain"'),
    ({"form": "gram", "preset": "you"}, UNSAFE),
    ({"form": "gram", "preset": "you", "dtype": "float32", "restarts": (1, 2, 3, 4)}, UNSAFE),
    ({"form": "gram", "preset": "polar_express"}, f'{WIDE_MARGIN}"polar_express" tolerates 2.1%; use form = "plain"'),
    ({"form": "gram", "preset": "cans"}, f'{WIDE_MARGIN}"cans" tolerates 1.0%'),
    ({"form": "gram", "preset": "cubic5"}, f'{WIDE_MARGIN}"cubic5" tolerates 1.4%'),
    (
        {"form": "gram", "preset": "custom", "coefficients": OPT5, "start": "schatten8"},
        f'{WIDE_MARGIN}"custom" tolerates 1.1%; use form = "plain" or another preset',
    ),
    ({"form": "gram", "preset": "optimal", "steps": 4}, "steps = 4 is not legal: .* margin of 0.08"),
]


def sentence(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(ShardSettings, {"ns": table}, "file.toml")
    return str(caught.value)


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, legal, _ in FIELDS for value in legal])
def test_legal_values(field: str, value: Any) -> None:
    assert getattr(NewtonSchulz.model_validate({field: value}), field) == value


@pytest.mark.parametrize(("field", "value", "says"), [(name, *pair) for name, _, bad in FIELDS for pair in bad])
def test_an_illegal_value_is_named_with_what_is_legal(field: str, value: Any, says: str) -> None:
    found = sentence({field: value})
    assert re.search(f'^file.toml: "ns.{field}" = {re.escape(repr(value))} is not legal: it .*{says}', found)
    assert "tuple" not in found
    assert found.endswith(".")
    assert not found.endswith("..")


@pytest.mark.parametrize(("table", "says"), REFUSED)
def test_combinations_that_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        NewtonSchulz(**table)
    found = sentence(table)
    assert found.startswith('file.toml: "ns" is not legal: ')
    assert re.search(says, found)
    assert "\n" not in found
    assert found.endswith(".")
    assert not found.endswith("..")


def test_unknown_keys() -> None:
    assert sentence({"restart": [1, 3]}) == 'file.toml: unknown key "ns.restart"; did you mean "restarts"?'
    assert sentence({"qqq": 1}).startswith(
        'file.toml: unknown key "ns.qqq"; legal keys are coefficients, dtype, form, '
    )


TABLES = [
    ({"preset": "custom", "coefficients": [[1.5, -0.5, 0.0], [2, -1.5, 0.5]]}, ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))),
    ({"form": "gram", "restarts": [1, 3], "preset": "opt5"}, (1, 3)),
]


@pytest.mark.parametrize(("table", "value"), TABLES)
def test_lists_of_files_are_taken(table: dict[str, Any], value: Any) -> None:
    toml = "\n".join(f"{key} = {json.dumps(item)}" for key, item in table.items())
    for loaded in (json.loads(json.dumps(table)), tomllib.loads(toml)):
        found = parse(ShardSettings, {"ns": loaded}, "file").ns
        assert value in (found.coefficients, found.restarts)
        assert hash(found) == hash(NewtonSchulz.model_validate(found.model_dump()))
        assert NewtonSchulz.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"preset": "custom", "coefficients": [[1.5, -0.5]]}, "ns.coefficients.0"),
        ({"preset": "custom", "coefficients": [[1.5, -0.5, 0.0], [1.5, "x", 0.0]]}, "ns.coefficients.1"),
        ({"preset": "custom", "coefficients": [[1.5, -0.5, float("nan")]]}, "ns.coefficients.0"),
        ({"preset": "custom", "coefficients": [1.5, -0.5, 0.0]}, "ns.coefficients.0"),
        ({"form": "gram", "restarts": [1.0, 3]}, "ns.restarts.0"),
        ({"form": "gram", "restarts": [1, "3"]}, "ns.restarts.1"),
        ({"form": "gram", "restarts": [True, 3]}, "ns.restarts.0"),
    ],
)
def test_elements_of_lists_are_not_converted(table: dict[str, Any], field: str) -> None:
    assert sentence(table).startswith(f'file.toml: "{field}')


def test_settings_are_frozen_and_hashable() -> None:
    settings = NewtonSchulz(preset="custom", coefficients=(CUBIC,), form="plain")
    for field in NewtonSchulz.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, field, None)
    same = NewtonSchulz(preset="custom", coefficients=(CUBIC,), form="plain")
    assert len({settings, same, NewtonSchulz()}) == 2


def test_defaults_are_the_published_algorithm() -> None:
    found = NewtonSchulz()
    assert found == NewtonSchulz(preset="papers", steps=None, dtype="bfloat16", form="auto", kernels="auto")
    assert found.polynomials("plain").quintics == ((3.4445, -4.7750, 2.0315),) * 5
    assert NewtonSchulz(steps=7).polynomials("gram").quintics == ((3.4445, -4.7750, 2.0315),) * 7


@pytest.mark.parametrize("name", ["opt4", "opt5", "opt6", "optimal"])
def test_generated_coefficients_get_the_margin_of_their_form(name: PresetName) -> None:
    settings = NewtonSchulz(preset=name)
    assert 0.01 <= gram_margin(settings.polynomials("plain").quintics) < 0.02
    assert 0.08 <= gram_margin(settings.polynomials("gram").quintics) < 0.09
    if name == "opt5":
        flat = [number for quintic in settings.polynomials("plain").quintics for number in quintic]
        assert flat == pytest.approx([number for quintic in OPT5 for number in quintic], abs=2e-6)


@pytest.mark.parametrize(
    ("settings", "segments"),
    [
        ({"steps": 3}, (1, 2)),
        ({"steps": 4}, (2, 2)),
        ({}, (1, 2, 2)),
        ({"preset": "opt4"}, (2, 2)),
        ({"preset": "opt5"}, (1, 2, 2)),
        ({"preset": "opt6"}, (2, 2, 2)),
        ({"preset": "papers8+2"}, (2, 2, 2, 2, 2)),
        ({"preset": "opt6", "form": "gram", "restarts": (1, 3, 5)}, (1, 2, 2, 1)),
        ({"preset": "opt5", "form": "gram", "restarts": (2, 4)}, (2, 2, 1)),
        ({"preset": "opt5", "form": "gram", "restarts": (2, 3), "dtype": "float16"}, (2, 1, 2)),
        ({"preset": "opt5", "form": "gram", "restarts": (2,), "dtype": "float32"}, (2, 3)),
        ({"preset": "opt5", "form": "gram", "restarts": (3,), "dtype": "float32"}, (3, 2)),
        ({"preset": "opt6", "form": "gram", "restarts": (1, 2, 3, 4, 5)}, (1,) * 6),
        ({"steps": 2}, None),
        ({"preset": "you"}, None),
        ({"preset": "polar_express"}, None),
        ({"preset": "cans"}, None),
        ({"preset": "cubic5"}, None),
        ({"preset": "custom", "coefficients": OPT5, "start": "schatten8"}, None),
        ({"preset": "custom", "coefficients": (CUBIC,) * 3}, (1, 2)),
        ({"preset": "optimal", "steps": 4}, None),
    ],
)
def test_segments(settings: dict[str, Any], segments: tuple[int, ...] | None) -> None:
    assert NewtonSchulz(**settings).gram_segments() == segments


@pytest.mark.parametrize("name", [name for name in get_args(PresetName) if name != "custom"])
def test_auto_takes_the_gram_form_only_where_it_may_be_asked_for(name: PresetName) -> None:
    segments = NewtonSchulz(preset=name).gram_segments()
    if segments is None:
        with pytest.raises(ValidationError, match=UNSAFE if name == "you" else WIDE_MARGIN):
            NewtonSchulz(preset=name, form="gram")
    else:
        assert NewtonSchulz(preset=name, form="gram").gram_segments() == segments
