from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from distmuon.errors import ConfigError, DataError
from distmuon.train.metrics import (
    ErrorRecord,
    EvalRecord,
    FinalRecord,
    MetricsWriter,
    OptimizerInfo,
    RankOverlap,
    RunRecord,
    StepRecord,
    TraceRecord,
    read_metrics,
)
from distmuon.train.progress import Progress


def run_record(name: str = "tiny") -> RunRecord:
    return RunRecord(
        name=name,
        started="2026-01-02T03:04:05+00:00",
        config={"lr": 0.02},
        environment={"world_size": 2},
        data={"source": "text"},
        optimizer=OptimizerInfo(name="distmuon"),
        state_bytes_per_rank=[8, 8],
    )


def step_record(step: int, loss: float = 1.0, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens": 10 * step,
        "tokens_per_s": 5.0,
        "seconds": 2.0,
        "split": {"reduce": 0.5},
        **changes,
    }
    return StepRecord.model_validate({"step": step, "loss": loss, **values})


def final_record(step: int) -> FinalRecord:
    return FinalRecord(
        step=step, val_loss=1.0, val_accuracy=0.5, tokens=10, wall_seconds=3.0, state_bytes_per_rank=[8, 8]
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    evaluation = EvalRecord(step=1, loss=1.5, accuracy=0.25, bits_per_byte=2.0, sequences=4)
    with MetricsWriter(tmp_path / "runs" / "tiny") as writer:
        for record in (run_record(), step_record(1), evaluation, final_record(1)):
            writer.write(record)
    metrics = read_metrics(tmp_path / "runs" / "tiny")
    assert metrics.run == run_record()
    assert metrics.steps == {1: step_record(1)}
    assert metrics.evals == {1: evaluation}
    assert metrics.final == final_record(1)
    assert (metrics.starts, metrics.truncated, metrics.failure) == (1, False, None)


def test_lines_follow_the_schema_and_are_flushed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(run_record())
    writer.write(step_record(3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["type"], lines[0]["schema"], lines[0]["name"]) == ("run", 1, "tiny")
    assert (lines[1]["type"], lines[1]["step"], lines[1]["split"]) == ("step", 3, {"reduce": 0.5})
    assert "nonfinite" not in lines[1]
    writer.close()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    record = step_record(1, math.nan, update_rms=math.inf, aux_loss=None, split={"reduce": math.nan})
    with MetricsWriter(tmp_path) as writer:
        writer.write(record)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["update_rms"], line["split"]) == (None, None, {"reduce": None})
    assert line["nonfinite"] == ["loss", "split.reduce", "update_rms"]
    read = read_metrics(tmp_path).steps[1]
    assert math.isnan(read.loss)
    assert math.isnan(read.split["reduce"])
    assert read.update_rms is not None
    assert math.isnan(read.update_rms)
    assert read.aux_loss is None, "not measured is not the same as not finite"


def test_an_existing_file_is_not_mixed_with_another_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(run_record())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl already holds .* resume that run"):
        MetricsWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with MetricsWriter(tmp_path) as writer:
        writer.write(run_record())
    assert read_metrics(tmp_path).run == run_record()


def test_after_a_resumption_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for record in (run_record(), step_record(1, 5.0), step_record(2, 4.0), step_record(3, 3.0)):
            writer.write(record)
        writer.write(ErrorRecord(step=3, message="killed"))
    assert read_metrics(tmp_path).failure == ErrorRecord(step=3, message="killed")
    with MetricsWriter(tmp_path, append=True) as writer:
        for record in (
            run_record("again"),
            step_record(3, 3.5),
            step_record(9, 2.5),
            step_record(2, 4.5),
            step_record(4, 3.0),
        ):
            writer.write(record)
    metrics = read_metrics(tmp_path)
    losses = [(step, record.loss) for step, record in metrics.steps.items()]
    assert losses == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 3.0), (9, 2.5)], "in the order of the steps"
    assert metrics.failure is None
    assert metrics.starts == 2
    assert metrics.run == run_record("again")


def test_a_resumed_run_is_no_longer_finished(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(run_record())
        writer.write(final_record(1))
    with MetricsWriter(tmp_path, append=True) as writer:
        writer.write(run_record())
    assert read_metrics(tmp_path).final is None


@pytest.mark.parametrize(("cut", "kept"), [(20, [1]), (1, [1, 2])])
def test_appending_after_a_cut_line(tmp_path: Path, cut: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
        writer.write(step_record(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_metrics(path).truncated == (cut == 20)
    with MetricsWriter(tmp_path, append=True) as writer:
        writer.write(step_record(9))
    metrics = read_metrics(path)
    assert list(metrics.steps) == [*kept, 9]
    assert not metrics.truncated


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "\udcff",
        '{"type": "stop"}',
        '{"type": "error", "step": 1, "message": "m", "nonfinite": 5}',
        '{"type": "eval", "step": 2, "loss": 1.0, "sequences": 3}',
        '{"type": "run", "schema": 2}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = step_record(1).model_dump_json() + "\n"
    path.write_bytes((good + line + "\n" + good).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_a_bad_line_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"type": "error", "step": 1}\n')
    with pytest.raises(DataError, match=r":1: .*message: Field required"):
        read_metrics(tmp_path)


def test_a_bad_last_line_with_its_newline_is_not_a_cut_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"type": "st\n')
    with pytest.raises(DataError, match=":1:"):
        read_metrics(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read \(No such file"):
        read_metrics(tmp_path)


def test_a_misspelt_or_mistyped_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="los"):
        step_record(1, los=1.0)
    with pytest.raises(ValidationError, match="tokens"):
        step_record(1, tokens=1.5)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_writes_few_whole_lines() -> None:
    stream = io.StringIO()
    with Progress(200, initial=100, stream=stream, interval=1e9) as progress:
        for step in range(101, 201):
            progress.update(step, 2.5, 12345.0)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert len(lines) == 10
    assert lines[0].startswith(" 55% step 110/200 [")
    assert "loss 2.5000, 12,345 tokens/s" in lines[0]
    assert lines[-1].startswith("100% step 200/200")


def test_progress_without_a_terminal_writes_by_time_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = Progress(1000, stream=stream, interval=0.0)
    progress.update(1, 2.5, 1.0)
    assert "step 1/1000" in stream.getvalue()
    quiet = io.StringIO()
    progress = Progress(1000, initial=990, stream=quiet, interval=1e9)
    progress.update(991, 2.5, 1.0)
    assert quiet.getvalue() == ""
    progress.update(1000, 2.5, 1.0)
    assert "100% step 1000/1000" in quiet.getvalue()


def test_progress_on_a_terminal_is_one_bar() -> None:
    stream = _Terminal()
    with Progress(4, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, 2.5, 100.0)
        progress.note("validation loss 2.0")
    assert "4/4" in stream.getvalue()
    assert "loss 2.5000, 100 tokens/s" in stream.getvalue()
    assert "validation loss 2.0\n" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_progress_of_the_other_ranks_is_silent(stream: io.StringIO) -> None:
    with Progress(2, enabled=False, stream=stream, interval=0.0) as progress:
        progress.update(2, 2.5, 100.0)
        progress.note("validation")
    assert stream.getvalue() == ""


def test_timelines_and_waits_are_read_back_and_may_be_missing(tmp_path: Path) -> None:
    ranks = [RankOverlap(communication_s=2.0, hidden_s=1.5, exposed_s=0.5)]
    traces = [TraceRecord(first=first, last=first + 2, ranks=ranks) for first in (2, 9)]
    with MetricsWriter(tmp_path) as writer:
        for record in (run_record(), step_record(1), traces[0], step_record(2, exposed_seconds=0.25), traces[1]):
            writer.write(record)
    metrics = read_metrics(tmp_path)
    assert [record.exposed_seconds for record in metrics.steps.values()] == [None, 0.25]
    assert metrics.trace == traces[1]
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace(', "exposed_seconds": null', ""))
    assert read_metrics(tmp_path).steps == metrics.steps
