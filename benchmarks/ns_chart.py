"""The picture of the speed benchmark: one panel per shape, a line per candidate; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from distmuon.benchmarks.figure_style import FAINT, INK, colour_of, plain
from distmuon.benchmarks.ns_candidates import DEEPSPEED, ONE_BY_ONE, STOCK

COLUMNS = 3
# Candidates that are drawn, from the top; settings other than a preset's own are in the table only.
SHOWN = (STOCK, DEEPSPEED, f"{DEEPSPEED}, its gram", ONE_BY_ONE, "papers", "opt4", "opt5", "opt6")
FORMS = {"plain": "", "gram": " (Gram)"}


def draw(results: dict[str, Any]) -> Figure:
    """Draw all shapes.

    Args:
        results: what benchmarks/results/ns.json holds.

    Returns:
        The figure.
    """
    groups: list[dict[str, Any]] = results["groups"]
    shapes = list(dict.fromkeys(group["shape"] for group in groups))
    rows = -(-len(shapes) // COLUMNS)
    figure = Figure(figsize=(11.5, 0.9 + 2.75 * rows), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.09))
    panels = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, shape in zip_longest(panels.flat, shapes):
        if shape is None:
            axes.set_visible(False)
        else:
            draw_shape(axes, [group for group in groups if group["shape"] == shape])
    machine = results["machine"]
    figure.suptitle(
        "Newton-Schulz: times as fast as the papers' triple in eager torch",
        x=0.012,
        y=0.992,
        ha="left",
        va="top",
        color=INK,
        fontsize=13,
        fontweight="bold",
    )
    figure.supxlabel(
        f"Median and quartiles of {results['rounds']} rounds; {machine['clock']}, {machine['device']} "
        f"({', '.join(machine['bfloat16_units'])}), torch {machine['versions']['torch']}\n"
        "The eager triple takes the matrices of a batch one by one",
        color=FAINT,
        fontsize=9,
    )
    marks = [
        Line2D([], [], color=INK, marker="o", linestyle="", label="from float32 gradients"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label="from bfloat16"),
    ]
    figure.legend(handles=marks, loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def draw_shape(axes: Axes, groups: Sequence[dict[str, Any]]) -> None:
    """Draw one shape into one panel.

    Args:
        axes: the panel.
        groups: what was measured on it, float32 input first.
    """
    names = [name for name in SHOWN if any(row["candidate"] == name for row in groups[0]["rows"])]
    labels = []
    for place, name in enumerate(names):
        colour = colour_of(name.split(",")[0])
        for offset, group in enumerate(groups):
            row = next(row for row in group["rows"] if row["candidate"] == name)
            over, y = row["over_eager"], place + 0.3 * offset - 0.15 * (len(groups) - 1)
            axes.plot([over["low"], over["high"]], [y, y], color=colour, linewidth=2.2, alpha=0.45)
            face = colour if offset == 0 else "white"
            axes.plot(over["median"], y, "o", color=colour, markerfacecolor=face, markersize=5.5)
        own = next(row for row in groups[0]["rows"] if row["candidate"] == name)
        right = max(g["over_eager"]["high"] for group in groups for g in group["rows"] if g["candidate"] == name)
        median = own["over_eager"]["median"]
        axes.annotate(
            f"{median:.2f}" if median < 10 else f"{median:.1f}",
            (right, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=8.5,
        )
        labels.append(name + FORMS[own["form"].split()[0]] if name in ("papers", "opt4", "opt5", "opt6") else name)
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlim(0, 1.18 * max(axes.get_xlim()[1], 1.3))
    axes.set_ylim(len(names) - 0.5, -0.5)
    first = groups[0]
    batch, sizes = first["batch"], first["shape"].split("x", 1)[1]
    eager = first["rows"][0]["ms"]
    axes.set_title(
        first["shape"] if batch == 1 else f"{batch} of {sizes}", loc="left", color=INK, fontsize=10.5, fontweight="bold"
    )
    axes.set_title(f"eager {eager:.3g} ms", loc="right", color=FAINT, fontsize=8.5)
    plain(axes)
    axes.grid(visible=False, axis="y")
