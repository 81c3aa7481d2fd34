"""What ``distmuon plan`` prints: tables, or JSON with the same and more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from distmuon.planning.compare import Row, Spread
from distmuon.planning.layouts import CHOICES
from distmuon.planning.model_file import Model
from distmuon.planning.outcome import Outcome, ranks
from distmuon.planning.parameters import PlannedParam

Table = Literal["routing", "placement", "all"] | None


def as_text(model: Model, outcomes: Sequence[Outcome], table: Table = None) -> str:
    """Format everything for a terminal.

    Args:
        model: the model.
        outcomes: one per number of ranks.
        table: whether to print long tables too.

    Returns:
        Lines.
    """
    lines = [*_model_lines(model, outcomes[0])]
    if table in ("routing", "all"):
        lines += ["", *_columns([["parameter", "shape", "rule", "reason"], *map(_route, _existing(outcomes[0]))])]
    for outcome in outcomes:
        lines += ["", *_world_lines(outcome)]
        if table in ("placement", "all"):
            lines += [
                "",
                *_columns([list(_PLACEMENT), *([str(v) for v in row.values()] for row in _placement(outcome))]),
            ]
    shown = {row.layout for outcome in outcomes for row in outcome.rows}
    lines += ["", *(f"  {choice.title:8} {choice.what}" for choice in CHOICES.values() if choice.name in shown)]
    return "\n".join(lines)


def as_json(model: Model, outcomes: Sequence[Outcome], table: Table = None) -> dict[str, Any]:
    """Everything as plain values.

    Args:
        model: the model.
        outcomes: one per number of ranks.
        table: whether to add long tables.

    Returns:
        Dict that json can write; sizes in bytes, times in seconds.
    """
    return {
        "format": "distmuon-plan-1",
        "model": model.name,
        "parameters": _numel(outcomes[0]),
        "routing": [dict(zip(_ROUTING, row, strict=True)) for row in _routing(outcomes[0])],
        "worlds": [_world_json(outcome, table) for outcome in outcomes],
    }


def _world_json(outcome: Outcome, table: Table) -> dict[str, Any]:
    request = outcome.request
    workload = asdict(request.workload)
    del workload["flops"]
    described: dict[str, Any] = {
        "world": request.world,
        "ep": request.ep,
        "bucket_mb": request.bucket_mb,
        "policy": request.policy,
        "transport": request.transport,
        "ns_preset": request.ns.preset,
        "machine": request.machine.model_dump(),
        "workload": workload,
        "chosen": outcome.chosen,
        "layouts": [{**asdict(row), "bytes": row.bytes} for row in outcome.rows],
    }
    if table in ("routing", "all"):
        described["parameters"] = [dict(zip(_ROUTE, _route(param), strict=True)) for param in _existing(outcome)]
    if table in ("placement", "all"):
        described["ranks"] = _placement(outcome)
    return described


_ROUTING = ("pattern", "shape", "count", "elements", "rule", "reason")
_ROUTE = ("parameter", "shape", "rule", "reason")
_PLACEMENT = ("rank", "bricks", "elements", "newton_schulz_flops", "relative_to_mean", "state_bytes")


def _model_lines(model: Model, outcome: Outcome) -> list[str]:
    request = outcome.request
    of_all = f", {request.ep}-way expert parallel" if request.ep > 1 else ""
    lines = [f"{model.name}: {_numel(outcome):,} parameters{of_all}", ""]
    return lines + _columns(
        [["parameters of a rank", *_ROUTING[1:]], *([str(v) for v in row] for row in _routing(outcome))]
    )


def _world_lines(outcome: Outcome) -> list[str]:
    request = outcome.request
    machine = request.machine
    groups = ranks(request.world)
    if request.ep > 1:
        groups += f" (experts: {request.ep} groups of {request.world // request.ep})"
    head = f"{groups}, {machine.ranks_per_node} a node, buckets of {request.bucket_mb:g} MB, {machine.name}"
    titles = ["", *(CHOICES[row.layout].title + ("*" if row.layout == outcome.chosen else "") for row in outcome.rows)]
    adamw = next(row.bytes for row in outcome.rows if row.layout == "adamw")
    table = [titles]
    for label, cell in _LINES:
        table.append([label, *(cell(row) for row in outcome.rows)])
    table.insert(_BYTES_AT, ["bytes / AdamW", *(f"{row.bytes / adamw:.3f}" if adamw else "-" for row in outcome.rows)])
    return [
        head,
        *_columns(table, numbers=True),
        '* what DistMuon takes with these settings; "auto" is decided for the default machine',
    ]


def _spread(value: Spread, form: Callable[[float], str]) -> str:
    """Least / mean / most, or one of them where they look the same."""
    least, mean, most = form(value.least), form(value.mean), form(value.most)
    if least == most:
        return most
    unit = most.partition(" ")[2]
    same = all(text.endswith(unit) for text in (least, mean))
    return " / ".join(
        [least.removesuffix(f" {unit}"), mean.removesuffix(f" {unit}"), most] if same else [least, mean, most]
    )


def _size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:.0f} {unit}"
    return f"{value:.0f} B"


def _ms(value: float) -> str:
    return f"{value * 1e3:.3g}" if value < 0.9995 else f"{value * 1e3:.0f}"


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: _ms(row.prediction[key])


_LINES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("buckets", lambda row: str(row.buckets)),
    ("largest bucket", lambda row: _size(row.largest_bucket_bytes)),
    ("collectives per step", lambda row: str(row.calls)),
    ("padding", lambda row: f"{row.padding:.2%}"),
    ("matrices, least / mean / most", lambda row: _spread(row.bricks, lambda value: f"{value:.4g}")),
    ("NS FLOPs, max / mean", lambda row: f"{row.newton_schulz_max_over_mean:.3f}" if row.bricks.most else "-"),
    ("NS FLOPs, sum / once", lambda row: f"{row.newton_schulz_sum_over_once:.3f}" if row.bricks.most else "-"),
    ("state, least / mean / most", lambda row: _spread(row.state_bytes, _size)),
    ("peak of buffers", lambda row: _size(row.prediction["peak_buffer_bytes"])),
    ("sent: reduce", lambda row: _size(row.reduce_bytes)),
    ("sent: gather", lambda row: _size(row.gather_bytes)),
    ("sent: cut matrices", lambda row: _size(row.complete_bytes)),
    ("sent to other nodes", lambda row: _size(row.prediction["inter_node_bytes"])),
    ("predicted ms: forward", _seconds("forward")),
    ("  backward", _seconds("backward")),
    ("  exposed reduce", _seconds("exposed_reduce")),
    ("  guard", _seconds("guard")),
    ("  cut matrices, teams", _seconds("complete")),
    ("  Newton-Schulz", _seconds("newton_schulz")),
    ("  update", _seconds("update")),
    ("  exposed gather", _seconds("exposed_gather")),
    ("optimizer, all of these", _seconds("optimizer")),
    ("step", _seconds("step")),
)
# After the title and the lines up to what is sent for cut matrices.
_BYTES_AT = 13


def _existing(outcome: Outcome) -> list[PlannedParam]:
    return [param for param in outcome.request.params if param.exists]


def _numel(outcome: Outcome) -> int:
    ep = outcome.request.ep
    return sum(param.spec.numel * (ep if param.expert else 1) for param in _existing(outcome))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _route(param: PlannedParam) -> list[str]:
    return [param.spec.name, _shape(param.spec.shape), param.spec.kind, param.reason]


def _routing(outcome: Outcome) -> list[tuple[str, str, int, int, str, str]]:
    """One line for parameters whose names differ in numbers only."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for param in _existing(outcome):
        name, shape, kind, reason = _route(param)
        found.setdefault((re.sub(r"\.\d+", ".*", name), shape, kind, reason), []).append(param.spec.numel)
    return [(n, shape, len(sizes), sum(sizes), kind, why) for (n, shape, kind, why), sizes in found.items()]


def _placement(outcome: Outcome) -> list[dict[str, float]]:
    held = outcome.held
    state = held.state_bytes(outcome.request.workload.param_itemsize)
    mean = float(held.flops.mean()) or 1.0
    rows = zip(held.bricks, held.elements, held.flops, state, strict=True)
    return [
        dict(
            zip(
                _PLACEMENT,
                (rank, int(bricks), int(elements), int(flops), round(float(flops) / mean, 6), int(size)),
                strict=True,
            )
        )
        for rank, (bricks, elements, flops, size) in enumerate(rows)
    ]


def _columns(rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """Align the cells; numbers to the right."""
    table = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(w) if numbers and i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
