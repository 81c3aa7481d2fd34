"""The pictures of the benchmarks of whole steps: bars, a panel per model; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from distmuon.benchmarks.contenders import RIVAL
from distmuon.benchmarks.figure_style import FAINT, GENERATED, INK, PUBLISHED, plain
from distmuon.benchmarks.models import CASES

Row = dict[str, Any]
_COLOURS = {"DistMuon": GENERATED, "others' Muon": PUBLISHED, "AdamW": FAINT}
# From few to many ranks.
_STRENGTH = (0.45, 0.7, 1.0)


def draw_comm(rows: Sequence[Row]) -> Figure:
    """Draw the bytes of a step.

    Args:
        rows: of ``distmuon bench comm``.

    Returns:
        The figure.
    """
    figure, panels = _frame(rows, "Bytes that a rank sends per step, over those of AdamW with ZeRO-1")
    worlds = sorted({row["world"] for row in rows})
    for axes, (model, names) in zip(panels, _by_model(rows).items(), strict=True):
        height = 0.8 / len(worlds)
        for number, world in enumerate(worlds):
            own = {row["name"]: row for row in rows if (row["model"], row["world"]) == (model, world)}
            places = [place + height * (number - (len(worlds) - 1) / 2) for place in range(len(names))]
            axes.barh(
                places,
                [own[name]["ratio"] for name in names],
                0.9 * height,
                color=[_colour(name) for name in names],
                alpha=_STRENGTH[-len(worlds) :][number] if len(worlds) <= len(_STRENGTH) else 1.0,
            )
            axes.plot([own[name]["sent_ratio"] for name in names], places, "|", color=INK, markersize=5)
        widest = {
            name: max(row["ratio"] for row in rows if (row["model"], row["name"]) == (model, name)) for name in names
        }
        _label(axes, names, [(widest[name], f"{widest[name]:.3f}") for name in names])
    ranks = ", ".join(map(str, worlds))
    figure.supxlabel(
        f"Bars: ring model, {ranks} ranks from pale to full. Ticks: what left through the loopback device.",
        color=FAINT,
        fontsize=9,
    )
    return figure


def draw_step(rows: Sequence[Row]) -> Figure:
    """Draw the optimizer's CPU time.

    Args:
        rows: of ``distmuon bench step``, at one number of ranks.

    Returns:
        The figure.
    """
    figure, panels = _frame(rows, f"CPU time of the optimizer, over that of {RIVAL}")
    for axes, (model, names) in zip(panels, _by_model(rows).items(), strict=True):
        own = {row["name"]: row for row in rows if row["model"] == model}
        over = [own[name]["over_rival"] for name in names]
        axes.barh(range(len(names)), [one["median"] for one in over], 0.7, color=[_colour(name) for name in names])
        for place, one in enumerate(over):
            axes.plot([one["low"], one["high"]], [place, place], color=INK, linewidth=1.2)
        texts = [
            f"{one['median']:.2f}  ({own[name]['optimizer_cpu_ms']['median']:.0f} ms)"
            for name, one in zip(names, over, strict=True)
        ]
        _label(axes, names, [(one["high"], text) for one, text in zip(over, texts, strict=True)])
    figure.supxlabel(
        f"Medians and quartiles of steps taken in turn; {rows[0]['world']} ranks; mean of the ranks",
        color=FAINT,
        fontsize=9,
    )
    return figure


def _frame(rows: Sequence[Row], title: str) -> tuple[Figure, list[Axes]]:
    models = _by_model(rows)
    longest = max(len(names) for names in models.values())
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.09)
    figure = Figure(figsize=(6.4 * len(models), 1.3 + 0.42 * longest), layout=layout)
    figure.suptitle(title, x=0.012, y=0.99, ha="left", va="top", color=INK, fontsize=13, fontweight="bold")
    marks = [Patch(color=colour, label=label) for label, colour in _COLOURS.items()]
    figure.legend(handles=marks, loc="outside upper right", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    panels = list(figure.subplots(1, len(models), squeeze=False).flat)
    for axes, model in zip(panels, models, strict=True):
        axes.set_title(CASES[model].title, loc="left", color=INK, fontsize=10.5)
    return figure, panels


def _by_model(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Names of the contenders on each model, in the order measured."""
    models: dict[str, list[str]] = {}
    for row in rows:
        names = models.setdefault(row["model"], [])
        if row["name"] not in names:
            names.append(row["name"])
    return models


def _colour(name: str) -> str:
    kind = "DistMuon" if name.startswith("DistMuon") else "AdamW" if "AdamW" in name else "others' Muon"
    return _COLOURS[kind]


def _label(axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, str]]) -> None:
    for place, (end, text) in enumerate(ends):
        axes.annotate(
            text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=8.5
        )
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * max(end for end, _ in ends))
    plain(axes)
    axes.grid(visible=False, axis="y")
