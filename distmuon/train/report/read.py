"""One run as the report sees it: its records and the numbers that follow from them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from distmuon.train.metrics import Collective, Metrics, StepRecord, TraceRecord, read_metrics

LABEL_LENGTH = 40


@dataclass(frozen=True)
class Validation:
    """Validation loss (nats per token), accuracy (fraction), bits per byte, and the step they belong to."""

    step: int
    loss: float
    accuracy: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a step and of its parts, over ``steps`` steps after ``warmup`` left out."""

    seconds: float
    parts: dict[str, float]
    steps: int
    warmup: int


@dataclass(frozen=True)
class Exposed:
    """Median seconds of a step in which the host waited for a collective, and median share of the step."""

    seconds: float
    share: float


@dataclass(frozen=True)
class RunView:
    """A run, the label that tells it from the others, and its records."""

    label: str
    metrics: Metrics

    @property
    def status(self) -> str:
        """``finished``, ``failed`` or ``not finished``."""
        if self.metrics.failure:
            return "failed"
        return "finished" if self.metrics.final else "not finished"

    @property
    def last_step(self) -> int:
        """The last step on record, 0 if there is none."""
        final = self.metrics.final
        return max([0, *list(self.metrics.steps)[-1:], *([final.step] if final else [])])

    @property
    def validation(self) -> Validation | None:
        """The final validation result, of a run without end its last evaluation."""
        final = self.metrics.final
        if final:
            return Validation(final.step, final.val_loss, final.val_accuracy, final.bits_per_byte)
        if not self.metrics.evals:
            return None
        last = list(self.metrics.evals.values())[-1]
        return Validation(last.step, last.loss, last.accuracy, last.bits_per_byte)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with dotted keys."""
        return flatten(self.metrics.run.config) if self.metrics.run else {}

    @property
    def tokens(self) -> int | None:
        """Tokens trained on up to the last step on record."""
        if self.metrics.final:
            return self.metrics.final.tokens
        return list(self.metrics.steps.values())[-1].tokens if self.metrics.steps else None

    @property
    def state_bytes(self) -> list[int]:
        """Optimizer state of every rank, bytes."""
        source = self.metrics.final or self.metrics.run
        return source.state_bytes_per_rank if source else []

    @property
    def comm(self) -> list[Collective]:
        """Traffic per rank and step by collective; only a finished run has it."""
        return self.metrics.final.comm if self.metrics.final else []

    @property
    def skipped(self) -> list[int]:
        """Steps whose update was skipped."""
        return [step for step, record in self.metrics.steps.items() if record.skipped]

    @property
    def nonfinite(self) -> list[int]:
        """Steps whose training loss was NaN or infinite."""
        return [step for step, record in self.metrics.steps.items() if not math.isfinite(record.loss)]

    def timed(self) -> tuple[list[StepRecord], int]:
        """Steps that count for speed, and how many were left out: the first tenth, at most 10."""
        records = [record for record in self.metrics.steps.values() if not record.skipped]
        warmup = min(10, len(records) // 10)
        return records[warmup:], warmup

    def step_time(self) -> StepTime | None:
        """Where the time of a step went, or None without steps."""
        records, warmup = self.timed()
        if not records:
            return None
        names = dict.fromkeys(name for record in records for name in record.split)
        parts = {name: typical([record.split.get(name, 0.0) for record in records]) or 0.0 for name in names}
        return StepTime(typical([record.seconds for record in records]) or 0.0, parts, len(records), warmup)

    def exposed(self) -> Exposed | None:
        """Exposed communication of a step, or None if no step has it on record."""
        records, _ = self.timed()
        seconds = typical([record.exposed_seconds for record in records])
        share = typical([exposed_share(record) for record in records])
        return None if seconds is None or share is None else Exposed(seconds, share)


def exposed_share(record: StepRecord) -> float | None:
    """Share of a step in which the host waited for a collective, or None if it is not on record."""
    if record.exposed_seconds is None or not record.seconds > 0:
        return None
    return record.exposed_seconds / record.seconds


def hidden_share(trace: TraceRecord) -> float | None:
    """Share of the communication of a timeline that was hidden, over all ranks; None if there was none."""
    total = sum(rank.communication_s for rank in trace.ranks)
    return sum(rank.hidden_s for rank in trace.ranks) / total if total > 0 else None


def load_runs(run_dir: Path, others: Sequence[Path] = ()) -> list[RunView]:
    """Read a run and those to compare it with.

    Args:
        run_dir: directory of the run.
        others: directories of further runs; one named twice counts once.

    Returns:
        The runs with labels that differ.

    Raises:
        DataError: a directory holds no readable metrics.
    """
    paths = list({Path(path).resolve(): Path(path) for path in (run_dir, *others)}.values())
    runs: list[RunView] = []
    for path in paths:
        metrics = read_metrics(path)
        name = plain(metrics.run.name if metrics.run else path.resolve().name)
        taken = [run.label for run in runs]
        label, count = name, 2
        while label in taken:
            label, count = f"{name} ({count})", count + 1
        runs.append(RunView(label, metrics))
    return runs


def plain(name: str) -> str:
    """A label of one printable line and at most 40 characters."""
    name = "".join(c if c.isprintable() else "?" for c in name).strip() or "unnamed"
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 3] + "..."


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def typical(values: Sequence[float | None]) -> float | None:
    """The median of the finite values, or None if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return median(finite) if finite else None
