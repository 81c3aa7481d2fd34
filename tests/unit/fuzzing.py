"""Broken configurations: valid tables and texts, changed in a few places."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from distmuon.config import printable
from distmuon.errors import DistMuonError

Path = tuple[str | int, ...]
Check = Callable[[Any], object]


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


NUMBERS = [*map(float, ("nan", "inf", "-inf")), -1, -0.0, 0, 1, 2, 3, 0.5, 1.0, 1e-320, 1e308, 10**400, -(10**30)]
TEXTS = ["", "0.02", "nan", "auto", "None", "\x00", "a\nb", "\ud800", "\u00fc\U0001f600", "x" * 5000]
TABLES = [(), [], {}, [[]], {"": 0}, {"a": {"b": 1}}, [0.9, 0.95, 0.99], nested(200), {3: 4}]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, *TABLES, None, True, False, b"bytes"]),
    st.integers(-5, 300),
    st.floats(),
    st.text(max_size=3),
).map(copy.deepcopy)
# The same, as TOML writes them; and what is no TOML at all.
TOML_VALUES = [
    "nan",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1.5",
    '"0.02"',
    "true",
    "[]",
    "[1, 2]",
    "{}",
    "{a = 1}",
    "2026-05-27",
]
TOML_TEXTS = [
    '"\\u00fc"',
    '"a\\nb"',
    "'''x'''",
    "9" * 30,
    "9" * 5000,
    "[" * 400,
    "[" * 5000,
    "=",
    "\\",
    "\x00",
    "",
    "None",
]


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of everything below a tree."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


class Broken(NamedTuple):
    """A table, and the names of what was changed in it and of what that is in; none where a message may name others."""

    table: Any
    touched: frozenset[str] = frozenset()


@st.composite
def broken(draw: st.DrawFn, bases: list[dict[str, Any]], new_keys: bool = True) -> Broken:
    """A valid table with one to three changes."""
    tree = _lists(copy.deepcopy(draw(st.sampled_from(bases))))
    touched: set[str] = set()
    deleted = False
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        *way, key = draw(st.sampled_from(found))
        inner = tree
        for part in way:
            inner = inner[part]
        touched |= {part for part in (*way, key) if isinstance(part, str)}
        action = draw(st.sampled_from(["set", "set", "set", "delete", "add", "add", "copy"]))
        if action == "delete" and isinstance(inner, dict):
            del inner[key]
            deleted = True
        elif action == "add" and isinstance(inner, dict) and new_keys:
            name = draw(misspelt(str(key)))
            touched.add(printable(name))
            inner[name] = draw(ODD)
        elif action == "copy" and isinstance(inner, dict):
            inner[key] = copy.deepcopy(draw(st.sampled_from([tree, *tree.values()])))
        else:
            inner[key] = draw(ODD)
    return Broken(tree, frozenset(touched if not deleted else ()))


def _lists(value: Any) -> Any:
    """A table in which everything can be replaced."""
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def misspelt(key: str) -> st.SearchStrategy[str]:
    """Names like a key, and others."""
    near = [key.upper(), key + "s", key[1:], key[:-1], key.replace("_", "-"), f"{key}.{key}"]
    return st.sampled_from([*near, "", "__class__", "model_config", "a\nb", "\x00", "\ud800", "x" * 300])


@st.composite
def broken_text(draw: st.DrawFn, bases: list[str]) -> Broken:
    """A valid TOML text with one to three changes of lines, values or characters."""
    lines = draw(st.sampled_from(bases)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[number].partition("=")
        odd = draw(st.sampled_from([*TOML_VALUES, *TOML_TEXTS]))
        action = draw(st.sampled_from(["value", "value", "value", "line", "twice", "cut", "key"]))
        if action == "value" and equals:
            lines[number] = f"{key}= {odd}"
        elif action == "key" and equals:
            lines[number] = f"{draw(misspelt(key.strip()))} = {odd}"
        elif action == "twice":
            lines.insert(number, lines[number])
        elif action == "cut":
            lines[number] = lines[number][: draw(st.integers(0, 5))]
        else:
            lines.insert(number, draw(st.sampled_from([odd, f"[{odd}]", f"x = {odd}", f"[[{key.strip()}]]"])))
    return Broken("\n".join(lines))


@dataclass
class Tally:
    """What became of the broken configurations."""

    valid: int = 0
    refused: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return self.valid + self.refused

    def __str__(self) -> str:
        return f"{self.total:,} in {self.seconds:.1f} s: {self.refused:,} refused, {self.valid:,} valid and unchanged"


def fuzz(count: int, strategy: st.SearchStrategy[Any], check: Check) -> Tally:
    """Try many: each passes ``check``, or raises one of our errors, one short line that names what was changed."""
    tally = Tally()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case: Broken) -> None:
        try:
            check(case.table)
        except DistMuonError as error:
            text = str(error)
            assert len(text.splitlines()) == 1, text
            assert text.isprintable(), text
            assert text.endswith((".", "?")), text
            assert len(text) <= 1000, text
            assert not case.touched or any(name in text for name in case.touched), (text, case.touched)
            tally.refused += 1
        else:
            tally.valid += 1

    start = time.process_time()
    run()
    tally.seconds = time.process_time() - start
    return tally
