"""The section of the report on how long the ranks waited for communication."""

from __future__ import annotations

from collections.abc import Sequence

from distmuon.train.report.markup import Markup, duration, join, percent, table, tag
from distmuon.train.report.read import RunView, hidden_share
from distmuon.train.report.sections import names


def overlap(runs: Sequence[RunView]) -> Markup:
    """Exposed communication per step, and from the timelines how much was hidden."""
    rows: list[list[object]] = []
    timelines: list[list[object]] = []
    for name, run in zip(names(runs), runs, strict=True):
        exposed, trace = run.exposed(), run.metrics.trace
        if exposed:
            rows.append([name, duration(exposed.seconds), percent(exposed.share)])
        if trace:
            steps = trace.last - trace.first + 1
            what = f"steps {trace.first:,} to {trace.last:,}"
            for number, rank in enumerate(trace.ranks):
                seconds = (rank.communication_s, rank.hidden_s, rank.exposed_s)
                share = rank.hidden_s / rank.communication_s if rank.communication_s > 0 else None
                timelines.append([name, what, f"{number}", *[duration(s / steps) for s in seconds], percent(share)])
            timelines.append([name, what, "all", "", "", "", percent(hidden_share(trace))])
    if not rows:
        return tag("p", "Not on record: a run on one rank and a stock optimizer have none.")
    note = (
        "Medians over the steps that count for speed, on rank 0. Exposed: the host waited for a collective of the "
        "optimizer that was not done, be it for the network or for a slower rank. "
        "On an accelerator the host rarely waits, so only a timeline of the device would show it."
    )
    parts = [table(["run", "exposed per step", "share of the step"], rows), tag("p", note, class_="note")]
    if timelines:
        head = ["run", "timeline", "rank", "communication", "hidden", "exposed", "hidden share"]
        note = (
            "Seconds per step with a collective under way, each instant counted once, "
            "split by whether the host waited meanwhile. The timeline is trace.json in the directory of the run."
        )
        parts += [table(head, timelines, numeric_from=2), tag("p", note, class_="note")]
    return join(parts)
