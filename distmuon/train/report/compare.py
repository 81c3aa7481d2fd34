"""Runs beside each other: differences in result, settings and data, and the summary for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmuon.train.metrics import TRACE_NAME
from distmuon.train.report.markup import duration, percent
from distmuon.train.report.read import RunView, flatten, hidden_share, load_runs


def comparisons(runs: Sequence[RunView]) -> list[str]:
    """Compare the first run with each of the others.

    Args:
        runs: the run of the report, then the others.

    Returns:
        Plain sentences: relative difference of the final losses, and when one reached the other's.
    """
    lines: list[str] = []
    for other in runs[1:]:
        lines += _compare(runs[0], other)
    return lines


def _compare(run: RunView, other: RunView) -> list[str]:
    mine, theirs = run.validation, other.validation
    unfinished = [r.label for r in (run, other) if r.status != "finished"]
    if unfinished:
        return [f"No comparison of {run.label} with {other.label}: {' and '.join(unfinished)} did not finish."]
    if mine is None or theirs is None or not (math.isfinite(mine.loss) and math.isfinite(theirs.loss)):
        return [f"No comparison of {run.label} with {other.label}: a final validation loss is not finite."]
    lines = []
    if theirs.loss > 0:
        change = (mine.loss - theirs.loss) / theirs.loss
        word = "lower" if change < 0 else "higher"
        lines.append(f"Final validation loss of {run.label} is {abs(change):.2%} {word} than that of {other.label}.")
    ahead, behind = (run, other) if mine.loss <= theirs.loss else (other, run)
    return [*lines, _reached(ahead, behind, max(mine.loss, theirs.loss))]


def _reached(ahead: RunView, behind: RunView, goal: float) -> str:
    sentence = f"{ahead.label} reached the final loss of {behind.label}"
    hits = [record.step for record in ahead.metrics.evals.values() if record.loss <= goal]
    step = hits[0] if hits else ahead.last_step
    if step == 0:
        return f"{sentence} before its first step."
    mine, theirs = _tokens_at(ahead, step), behind.tokens
    last = behind.last_step
    speedup, unit, where = last / step, "steps", f"step {step:,} of {last:,}"
    # Where the batches differ, steps say nothing: compare the tokens.
    if mine and theirs and abs(theirs / mine / speedup - 1) > 0.01:
        speedup, unit, where = theirs / mine, "tokens", f"step {step:,}, after {mine:,} tokens of {theirs:,}"
    return f"{sentence} by {where}: a speed-up of at least {speedup:.2f} in {unit}."


def _tokens_at(run: RunView, step: int) -> int | None:
    record = run.metrics.steps.get(step)
    if record is None:
        return run.tokens if step == run.last_step else None
    return record.tokens


def differing(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all the (flat) tables, a missing key counting as a value."""
    keys = dict.fromkeys(key for table in tables for key in table)
    absent = object()
    return [key for key in keys if any(t.get(key, absent) != tables[0].get(key, absent) for t in tables[1:])]


def cautions(runs: Sequence[RunView]) -> list[str]:
    """Sentences about what makes losses of these runs hard to compare."""
    known = [run for run in runs if run.metrics.run]
    lines = []
    keys = differing([flatten(run.metrics.run.data) for run in known if run.metrics.run])
    if keys:
        lines.append(f"The runs differ in their data ({', '.join(keys)}): compare their losses with care.")
    evaluated = [frozenset(record.sequences for record in run.metrics.evals.values()) for run in runs]
    if len({sizes for sizes in evaluated if sizes}) > 1:
        lines.append("The runs were not evaluated on the same number of sequences: compare their losses with care.")
    return lines


def failures(run: RunView) -> list[str]:
    """Sentences about everything that went wrong in a run."""
    lines = []
    failure = run.metrics.failure
    if failure:
        lines.append(f"{run.label} failed at step {failure.step:,}: {failure.message}")
    elif run.status == "not finished":
        lines.append(
            f"{run.label} has not finished: it is still running or was stopped; "
            f"its last step on record is {run.last_step:,}."
        )
    if run.skipped:
        lines.append(f"{run.label} skipped the update of {_steps(run.skipped)}.")
    if run.nonfinite:
        lines.append(f"The training loss of {run.label} was not finite in {_steps(run.nonfinite)}.")
    if run.metrics.truncated:
        lines.append(f"The last line of the metrics of {run.label} was cut off and is left out.")
    return lines


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    return f"{len(steps):,} step{'s' if len(steps) > 1 else ''} ({shown})"


def summary_lines(run_dir: Path, others: Sequence[Path] = ()) -> list[str]:
    """The result for the terminal.

    Args:
        run_dir: directory of the run.
        others: directories of runs to compare it with.

    Returns:
        Lines: the final validation losses beside each other, how long a step waits for communication, comparisons,
        what went wrong, and where the timeline is.

    Raises:
        DataError: a directory holds no readable metrics.
    """
    runs = load_runs(run_dir, others)
    width = max(len(run.label) for run in runs)
    lines = []
    for run in runs:
        result = run.validation
        title = "final" if run.status == "finished" else "last"
        value = f"{result.loss:.4f}  at step {result.step:,}" if result else "not measured"
        lines.append(f"{title + ' validation loss':<21}  {run.label:<{width}}  {value}")
    lines += [f"{'exposed communication':<21}  {run.label:<{width}}  {text}" for run in runs for text in _exposed(run)]
    lines += comparisons(runs) + cautions(runs)
    for run in runs:
        lines += failures(run)
    if runs[0].metrics.trace:
        lines.append(f"timeline: {Path(run_dir) / TRACE_NAME}")
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines]


def _exposed(run: RunView) -> list[str]:
    exposed, trace = run.exposed(), run.metrics.trace
    if exposed is None:
        return []
    hidden = hidden_share(trace) if trace else None
    rest = f"; {percent(hidden)} of communication hidden" if hidden is not None else ""
    return [f"{duration(exposed.seconds)} a step, {percent(exposed.share)} of it{rest}"]
