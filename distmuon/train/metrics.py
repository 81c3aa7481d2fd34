"""What a run records: the lines of ``metrics.jsonl``, their writer and their reader."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from distmuon.errors import ConfigError, DataError

FILE_NAME = "metrics.jsonl"
TRACE_NAME = "trace.json"

# NaN and infinity are not JSON and are written as null, so null in a field that must be a number means NaN.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RoutedModule(_Record):
    """One module of the model and the optimizer that its parameters take."""

    module: str
    kind: str
    parameters: int
    tensors: int


class OptimizerInfo(_Record):
    """Name of the optimizer and where it routed every module."""

    name: str
    routing: list[RoutedModule] = []


class Collective(_Record):
    """Traffic of one kind of collective; bytes are per rank and step, wire bytes by the ring model."""

    collective: str
    group_size: int
    dtype: str
    calls_per_step: Number
    payload_bytes_per_step: Number
    wire_bytes_per_step: Number


class RunRecord(_Record):
    """Start or resumption of a run."""

    type: Literal["run"] = "run"
    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str
    started: str
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    optimizer: OptimizerInfo
    state_bytes_per_rank: list[int]


class StepRecord(_Record):
    """One optimizer step; ``tokens`` is cumulative, ``seconds`` and ``split`` are wall time of this step.

    ``exposed_seconds`` are those of ``seconds`` in which the host waited for a collective of the optimizer.
    """

    type: Literal["step"] = "step"
    step: int
    loss: Number
    aux_loss: float | None = None
    grad_norm: float | None
    lr: Number
    tokens: int
    tokens_per_s: Number
    seconds: Number
    split: dict[str, Number] = {}
    exposed_seconds: float | None = None
    update_rms: float | None = None
    skipped: bool = False
    expert_load_max_over_mean: float | None = None


class EvalRecord(_Record):
    """One evaluation; loss in nats per token, accuracy as a fraction."""

    type: Literal["eval"] = "eval"
    step: int
    loss: Number
    accuracy: Number
    bits_per_byte: float | None = None
    sequences: int


class RankOverlap(_Record):
    """Seconds of one rank's timeline with a collective under way, and how many of them were hidden or exposed."""

    communication_s: Number
    hidden_s: Number
    exposed_s: Number


class TraceRecord(_Record):
    """A timeline of the steps ``first`` to ``last`` was written; ``dropped`` spans did not fit in."""

    type: Literal["trace"] = "trace"
    first: int
    last: int
    ranks: list[RankOverlap]
    dropped: int = 0


class FinalRecord(_Record):
    """End of a run that went through all its steps."""

    type: Literal["final"] = "final"
    step: int
    val_loss: Number
    val_accuracy: Number
    bits_per_byte: float | None = None
    tokens: int
    wall_seconds: Number
    comm: list[Collective] = []
    state_bytes_per_rank: list[int]


class ErrorRecord(_Record):
    """The reason why a run stopped early."""

    type: Literal["error"] = "error"
    step: int
    message: str


Record = RunRecord | StepRecord | EvalRecord | TraceRecord | FinalRecord | ErrorRecord
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="type")])
_MALFORMED = (ValueError, TypeError)  # TypeError: "nonfinite" is not a list of names


@dataclass
class Metrics:
    """Content of one ``metrics.jsonl``; of records for the same step the last one written counts."""

    run: RunRecord | None = None
    steps: dict[int, StepRecord] = field(default_factory=dict)
    evals: dict[int, EvalRecord] = field(default_factory=dict)
    trace: TraceRecord | None = None
    """The newest timeline."""
    final: FinalRecord | None = None
    failure: ErrorRecord | None = None
    """The error that ended the run, unless it was resumed afterwards."""
    starts: int = 0
    truncated: bool = False

    def add(self, record: Record) -> None:
        """Take one more record, in the order of the file."""
        if isinstance(record, RunRecord):
            # A resumed run is neither finished nor failed until it says so again.
            self.run, self.final, self.failure = record, None, None
            self.starts += 1
        elif isinstance(record, StepRecord):
            self.steps[record.step] = record
        elif isinstance(record, EvalRecord):
            self.evals[record.step] = record
        elif isinstance(record, TraceRecord):
            self.trace = record
        elif isinstance(record, FinalRecord):
            self.final = record
        else:
            self.failure = record


class MetricsWriter:
    """Appends records to ``<run_dir>/metrics.jsonl``, one flushed line each; for one rank only.

    Args:
        run_dir: directory of the run; created if missing.
        append: continue the file of an interrupted run; without it a non-empty file is refused.

    Raises:
        ConfigError: the file already holds records and ``append`` is false.
    """

    def __init__(self, run_dir: Path, append: bool = False) -> None:
        self.path = Path(run_dir) / FILE_NAME
        if self.path.exists() and self.path.stat().st_size:
            if not append:
                raise ConfigError(
                    f"{self.path} already holds the records of a run; resume that run, "
                    "choose another run name, or move the directory away."
                )
            _mend(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Write one record; non-finite numbers become null and are named in the line's ``nonfinite`` list."""
        nonfinite: list[str] = []
        line = _finite(record.model_dump(by_alias=True), "", nonfinite)
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> Metrics:
    """Read the records of a run.

    Args:
        path: a ``metrics.jsonl`` or the run directory that holds it.

    Returns:
        The records; a last line that was cut off while being written is left out and sets ``truncated``.

    Raises:
        DataError: the file is missing, or a line of it (named as file:line) is not a record.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    metrics = Metrics()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    metrics.add(_parse(line))
                except _MALFORMED as error:
                    if not line.endswith(b"\n"):
                        metrics.truncated = True
                        break
                    raise DataError(
                        f"{path}:{number}: not a metrics record ({_reason(error)}); "
                        "remove this line or restore the file."
                    ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name the directory of a run.") from None
    metrics.steps = dict(sorted(metrics.steps.items()))
    metrics.evals = dict(sorted(metrics.evals.items()))
    return metrics


def _parse(line: bytes) -> Record:
    table = json.loads(line)
    if isinstance(table, dict):
        for name in table.pop("nonfinite", []):
            # Nested numbers need no help: there a null can only be NaN.
            if table.get(name, 0) is None:
                table[name] = math.nan
    return _RECORD.validate_python(table)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ".".join(str(part) for part in first["loc"]) + f": {first['msg']}" if first["loc"] else first["msg"]
    return str(error)


def _finite(value: Any, path: str, nonfinite: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(path)
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item, f"{path}.{key}".lstrip("."), nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{index}", nonfinite) for index, item in enumerate(value)]
    return value


def _mend(path: Path) -> None:
    """Complete or drop a last line that was cut off, so that the next record starts on a line of its own."""
    head, newline, tail = path.read_bytes().rpartition(b"\n")
    if not tail:
        return
    with path.open("r+b") as file:
        try:
            _parse(tail)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except _MALFORMED:
            file.truncate(len(head) + len(newline))
