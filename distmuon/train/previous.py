"""What a run's directory holds from before, and whether it may be continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from distmuon.errors import ConfigError
from distmuon.train.config import RunConfig
from distmuon.train.metrics import FILE_NAME, read_metrics

# What may differ between the parts of a run; anything else would change what its curve means.
_MAY_DIFFER = {
    *("name", "out", "resume", "timeout_s", "trace", "trace_steps", "watchdog_s"),
    *("checkpoint.background", "checkpoint.every", "checkpoint.keep", "evaluation.every", "data.cache_dir"),
    # Placement: checkpoints load under any.
    *("model.ep_size", "optimizer.policy", "optimizer.transport", "optimizer.bucket_mb", "optimizer.overlap_forward"),
}


class Previous(NamedTuple):
    """Whether the directory holds a run of this name, and whether that has ended."""

    started: bool
    complete: bool


def find_previous(run: RunConfig) -> Previous:
    """Look for an earlier part of a run.

    Args:
        run: the configuration.

    Returns:
        What was found.

    Raises:
        ConfigError: there is one that must not be continued, or that was configured differently.
    """
    started = run.directory / FILE_NAME
    if not started.exists() or not started.stat().st_size:
        return Previous(False, False)
    if run.resume == "never":
        raise ConfigError(
            f"{run.directory} already holds a run; continue it with --resume auto, choose another --name, "
            "or remove the directory."
        )
    metrics = read_metrics(started)
    if metrics.run is not None:
        _check_same(metrics.run.config, run)
    return Previous(True, metrics.final is not None and metrics.final.step >= run.schedule.updates)


def _check_same(before: Mapping[str, Any], run: RunConfig) -> None:
    then, now = dict(_flatten(before)), dict(_flatten(run.model_dump(mode="json")))
    for key in sorted(now.keys() - _MAY_DIFFER):
        if key in then and then[key] != now[key]:
            raise ConfigError(
                f"{run.directory} was started with {key} = {then[key]!r} and cannot go on with {now[key]!r}; "
                "set it back, or choose another --name."
            )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
