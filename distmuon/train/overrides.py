"""Command-line flags that override a run file."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from typing import Any, cast

from distmuon.config import field_type, parse, printable
from distmuon.errors import ConfigError
from distmuon.train.config import RunConfig


def override(run: RunConfig, flags: Sequence[str]) -> RunConfig:
    """Apply flags to a configuration.

    Args:
        run: the configuration.
        flags: "--table.key value" or "--table.key=value", for switches also "--table.key" and "--table.no-key"; values
            are written as in TOML, text also without quotes, and hyphens in names may stand for underscores.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: a flag is unknown, has no value, or is out of range.
    """
    table = run.model_dump()
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f'"{printable(flag)}" is not a flag; write overrides as --table.key value.')
        name, equals, text = flag.removeprefix("--").partition("=")
        path = name.replace("-", "_").split(".")
        switched_off = [*path[:-1], path[-1].removeprefix("no_")]
        if _annotation(switched_off) is bool and not equals and rest[:1] not in (["true"], ["false"]):
            _set(table, switched_off, path == switched_off)
            continue
        if not equals:
            if not rest:
                raise ConfigError(f"--{printable(name)} has no value; write --{printable(name)} VALUE.")
            text = rest.pop(0)
        _set(table, path, _value(path, text))
    return parse(RunConfig, table, "command line")


def _set(table: dict[str, Any], path: list[str], value: object) -> None:
    inner: Any = table
    for part in path[:-1]:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise ConfigError(f"--{printable('.'.join(path))} is not a flag; distmuon train --help lists them.")
    inner[path[-1]] = value


def _annotation(path: list[str]) -> Any:
    """Type of the setting that a path leads to, None if there is no such setting."""
    return functools.reduce(field_type, path, cast(Any, RunConfig))


def _value(path: list[str], text: str) -> Any:
    if _annotation(path) is str:
        return text
    if text == "None":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        # Not TOML, hence text; or a value that no setting takes.
        return text
