"""The sections of the report, each from the runs to one HTML fragment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from distmuon.train.report.compare import differing
from distmuon.train.report.markup import (
    Markup,
    details,
    duration,
    join,
    number,
    percent,
    size,
    table,
    tag,
    text,
)
from distmuon.train.report.read import RunView, flatten, typical

PART_COLOURS = (
    *("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00"),
    *("#0072B2", "#9467BD", "#8C6D31", "#7F8C8D"),
)


def key(index: int) -> Markup:
    """The colour of a run's curves as a dot."""
    return tag("span", "", class_=f"dot run{index % 6}")


def names(runs: Sequence[RunView]) -> list[Markup]:
    """The labels of the runs with their colours."""
    return [tag("span", key(index), run.label, class_="who") for index, run in enumerate(runs)]


def headline(runs: Sequence[RunView]) -> Markup:
    """The validation loss of every run in large figures."""
    cards = []
    for name, run in zip(names(runs), runs, strict=True):
        result = run.validation
        what = "final validation loss" if run.status == "finished" else f"last validation loss, {run.status}"
        value = number(result.loss) if result else "not measured"
        at = f"step {result.step:,}" if result else f"step {run.last_step:,}"
        cards.append(
            tag(
                "div",
                name,
                tag("div", value, class_="big"),
                f"{what}, {at}",
                class_="card",
            )
        )
    return tag("div", *cards, class_="cards")


def results(runs: Sequence[RunView]) -> Markup:
    """The final figures of the runs beside each other."""
    rows: list[tuple[str, Callable[[RunView], str]]] = [
        ("status", lambda run: run.status),
        (
            "validation loss (nats per token)",
            lambda run: number(run.validation.loss if run.validation else None),
        ),
        ("validation accuracy", lambda run: percent(run.validation.accuracy if run.validation else None)),
        ("bits per byte", lambda run: number(run.validation.bits_per_byte if run.validation else None)),
        ("steps", lambda run: f"{run.last_step:,}"),
        ("tokens", lambda run: number(run.tokens, 0)),
        ("wall time", lambda run: duration(run.metrics.final.wall_seconds if run.metrics.final else None)),
        (
            "tokens per second (median)",
            lambda run: number(typical([r.tokens_per_s for r in run.timed()[0]]), 0),
        ),
        ("update RMS (median)", lambda run: number(typical([r.update_rms for r in run.timed()[0]]))),
        ("expert load, max / mean (median)", lambda run: number(_expert_load(run), 2)),
        ("skipped steps", lambda run: f"{len(run.skipped):,}"),
        ("starts (1 = never resumed)", lambda run: f"{run.metrics.starts:,}"),
    ]
    filled = [[label, *[value(run) for run in runs]] for label, value in rows]
    return table(["", *names(runs)], [row for row in filled if set(row[1:]) != {"-"}])


def _expert_load(run: RunView) -> float | None:
    return typical([record.expert_load_max_over_mean for record in run.timed()[0]])


def step_time(runs: Sequence[RunView]) -> Markup:
    """Where the time of a step went: one bar per run on a common scale, and the figures."""
    times = [run.step_time() for run in runs]
    parts = list(dict.fromkeys(name for time in times if time for name in time.parts))
    # A part that takes no time anywhere would only be a colour without a bar.
    parts = [name for name in parts if any(time and time.parts.get(name) for time in times)]
    longest = max((max(time.seconds, sum(time.parts.values())) for time in times if time), default=0.0)
    if not longest:
        return tag("p", "No steps on record.")
    bars, cells = [], []
    for name, time in zip(names(runs), times, strict=True):
        if time is None:
            continue
        rest = time.seconds - sum(time.parts.values())
        shown = {**{part: time.parts.get(part, 0.0) for part in parts}, "not split": max(rest, 0.0)}
        bars += [tag("div", name), _bar(shown, longest)]
        cells.append((name, time.seconds, shown))
    colours = [*[_part_colour(index) for index in range(len(parts))], "none"]
    rows: list[list[object]] = []
    for part, colour in zip([*parts, "not split"], colours, strict=True):
        dot = tag("span", "", class_="dot", style=f"background:{colour}")
        row: list[object] = [tag("span", dot, part, class_="who")]
        for _, seconds, shown in cells:
            row += [duration(shown[part]), percent(shown[part] / seconds if seconds else None)]
        rows.append(row)
    rows.append(["whole step", *[cell for _, seconds, _ in cells for cell in (duration(seconds), percent(1.0))]])
    head = ["median per step", *[cell for name, _, _ in cells for cell in (name, "share")]]
    counted = "; ".join(
        f"{run.label}: {time.steps:,} steps, the first {time.warmup:,} left out"
        for run, time in zip(runs, times, strict=True)
        if time
    )
    note = f"Medians of wall time ({counted}). Medians of parts need not add up to the median of the whole step."
    return join([tag("div", *bars, class_="bars"), table(head, rows), tag("p", note, class_="note")])


def _part_colour(index: int) -> str:
    return PART_COLOURS[min(index, len(PART_COLOURS) - 1)]


def _bar(parts: dict[str, float], longest: float) -> Markup:
    pieces = []
    for index, (name, seconds) in enumerate(parts.items()):
        colour = "transparent" if name == "not split" else _part_colour(index)
        width = f"width:{100 * seconds / longest:.3f}%;background:{colour}"
        pieces.append(tag("span", "", style=width, title=f"{name}: {duration(seconds)}"))
    return tag("div", *pieces, class_="bar")


def traffic(runs: Sequence[RunView]) -> Markup:
    """Bytes per rank and step by collective, and their sum against the other runs."""
    rows: list[list[object]] = []
    totals: list[list[object]] = []
    first = sum(line.wire_bytes_per_step for line in runs[0].comm)
    for name, run in zip(names(runs), runs, strict=True):
        for line in run.comm:
            sizes = (size(line.payload_bytes_per_step), size(line.wire_bytes_per_step))
            what = (line.collective, line.dtype, f"{line.group_size:,}")
            rows.append([name, *what, number(line.calls_per_step, 1), *sizes])
        if run.comm:
            wire = sum(line.wire_bytes_per_step for line in run.comm)
            against = f"{first / wire:.3f}" if wire and runs[0].comm else "-"
            totals.append([name, size(wire), against])
    if not rows:
        return tag("p", "Not on record: the traffic is written at the end of a run.")
    head = ["run", "collective", "dtype", "ranks", "calls", "payload", "on the wire"]
    note = "Per rank and step. On the wire: the size of each collective times its ring factor (ring model)."
    return join(
        [
            table(head, rows, numeric_from=3),
            table(["run", "sum on the wire", f"{runs[0].label} / this run"], totals),
            tag("p", note, class_="note"),
        ]
    )


def state(runs: Sequence[RunView]) -> Markup:
    """Optimizer state per rank and its balance."""
    rows: list[list[object]] = []
    for name, run in zip(names(runs), runs, strict=True):
        ranks = run.state_bytes
        if ranks:
            mean = sum(ranks) / len(ranks)
            balance = f"{max(ranks) / mean:.3f}" if mean else "-"
            rows.append([name, f"{len(ranks):,}", size(mean), size(max(ranks)), balance, size(sum(ranks))])
    if not rows:
        return tag("p", "Not on record.")
    each = [[name, *[f"{b:,}" for b in run.state_bytes]] for name, run in zip(names(runs), runs, strict=True)]
    widest = max(len(run.state_bytes) for run in runs)
    head = ["run", "ranks", "mean per rank", "largest", "max / mean", "all ranks"]
    full = table(["run", *[f"rank {rank}" for rank in range(widest)]], each)
    return join([table(head, rows), details("Bytes of every rank", full)])


def routing(runs: Sequence[RunView]) -> Markup:
    """Which parameters went to which kind of optimizer."""
    parts = []
    for name, run in zip(names(runs), runs, strict=True):
        if not run.metrics.run:
            continue
        optimizer = run.metrics.run.optimizer
        total = sum(row.parameters for row in optimizer.routing)
        kinds = dict.fromkeys(row.kind for row in optimizer.routing)
        sums: list[list[object]] = []
        for kind in kinds:
            mine = [row for row in optimizer.routing if row.kind == kind]
            count = sum(row.parameters for row in mine)
            tensors = sum(row.tensors for row in mine)
            sums.append([kind, f"{tensors:,}", f"{count:,}", percent(count / total if total else None)])
        modules = [[row.module, row.kind, f"{row.tensors:,}", f"{row.parameters:,}"] for row in optimizer.routing]
        parts.append(tag("p", name, ": optimizer ", tag("b", optimizer.name)))
        if modules:
            full = table(["module", "kind", "tensors", "parameters"], modules, numeric_from=2)
            parts.append(table(["kind", "tensors", "parameters", "share"], sums))
            parts.append(details(f"All {len(modules):,} modules", full))
    return join(parts) or tag("p", "Not on record.")


def settings(runs: Sequence[RunView]) -> Markup:
    """The settings that differ between the runs, then all of them."""
    every = _side_by_side(runs, [run.settings for run in runs])
    if len(runs) == 1:
        return details("All settings", every)
    different = differing([run.settings for run in runs])
    first = _side_by_side(runs, [run.settings for run in runs], different)
    shown = first if different else tag("p", "The settings of the runs are the same.")
    return join([shown, details("All settings", every)])


def provenance(runs: Sequence[RunView]) -> Markup:
    """Data and environment of the runs."""
    records = [run.metrics.run for run in runs]
    data = [flatten(record.data) if record else {} for record in records]
    where = [{"started": record.started, **flatten(record.environment)} if record else {} for record in records]
    return join(
        [
            tag("h3", "Data"),
            _side_by_side(runs, data),
            tag("h3", "Environment"),
            _side_by_side(runs, where),
        ]
    )


def _side_by_side(
    runs: Sequence[RunView], tables: Sequence[dict[str, Any]], keys: Sequence[str] | None = None
) -> Markup:
    keys = keys if keys is not None else list(dict.fromkeys(key for table in tables for key in table))
    rows = [[name, *[_value(table[name]) if name in table else "-" for table in tables]] for name in keys]
    return table(["", *names(runs)], rows, numeric_from=len(runs) + 1)


def _value(value: Any) -> Markup:
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
