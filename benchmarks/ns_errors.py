"""Error over cost of the Newton-Schulz presets, from the records of ``distmuon.benchmarks.ns_accuracy``."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from distmuon.benchmarks.figure_style import FAINT, GENERATED, INK, PUBLISHED, colour_of, plain
from distmuon.benchmarks.ns_curves import COLUMNS, ROWS

# Height of a panel, and of a line of labels in it.
PANEL_POINTS, LABEL_POINTS = 300, 12
SMALLEST, LARGEST = 5e-5, 1.0
LEGEND = (
    ("published list, Frobenius norm", PUBLISHED, PUBLISHED),
    ("generated, Schatten-8 norm", GENERATED, GENERATED),
    ("others' implementations", FAINT, FAINT),
    ("Gram form", INK, "white"),
)


def error_cost(records: list[dict[str, Any]]) -> Figure:
    """Error over operations of every preset in bfloat16, in both forms, on hard matrices and on a Gaussian one.

    Args:
        records: what ``distmuon.benchmarks.ns_accuracy`` wrote.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10.0, 5.0), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    chosen = [r for r in records if r["dtype"] == "bfloat16" or colour_of(r["preset"]) == FAINT]
    draw_errors(left, [(r, r["set72"]["worst_rms"]) for r in chosen])
    left.set_title("worst of 72 hard matrices", loc="left", color=INK, fontsize=11, pad=12)
    left.set_ylabel("root mean square of u'Ov - 1 over resolved directions", color=INK)
    draw_errors(right, [(r, r["gaussian"][f"{ROWS}x{COLUMNS}"]["rms_resolved"]) for r in chosen])
    right.set_title(f"Gaussian {ROWS} x {COLUMNS}", loc="left", color=INK, fontsize=11, pad=12)
    for axes in (left, right):
        axes.set_xlabel(f"operations / those of papers, plain, at {ROWS} x {COLUMNS}", color=INK)
    handles = [
        Line2D([], [], marker="o", linestyle="", markeredgecolor=edge, markerfacecolor=face, label=label)
        for label, edge, face in LEGEND
    ]
    right.legend(handles=handles, frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    return figure


def draw_errors(axes: Axes, points: list[tuple[dict[str, Any], float | None]]) -> None:
    """Draw one panel: a preset's forms are joined by a line.

    Args:
        axes: the panel.
        points: records and their errors; None where an answer was not finite. What exceeds the panel is at its edge.
    """
    finite = [(record, error) for record, error in points if error is not None]
    labels = []
    for name in dict.fromkeys(record["preset"] for record, _ in finite):
        own = [(record["flops_ratio"], error, record["form"]) for record, error in finite if record["preset"] == name]
        colour = colour_of(name)
        # Others' answers nearly are those of "papers": rings around its points.
        size, order = (11, 2) if colour == FAINT else (7, 3)
        xs, ys = [x for x, _, _ in own], [y for _, y, _ in own]
        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.5, zorder=order)
        for x, y, form in own:
            face = colour if form == "plain" else "white"
            shape, shown = ("^", LARGEST) if y > LARGEST else ("o", y)
            style: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": colour, "clip_on": shape == "o"}
            axes.plot(x, shown, shape, markersize=size, zorder=order, **style)
        x, y = own[0][:2]
        labels.append((x, min(y, LARGEST), f"{name}: {y:.3g}" if y > LARGEST else name, colour))
    axes.set(yscale="log", xlim=(0.5, 2.5), ylim=(SMALLEST, LARGEST))
    plain(axes)
    write_labels(axes, labels)


def write_labels(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write names to the right of points, downwards of each other where points are close, or below a point.

    Args:
        axes: the panel, with its limits set.
        labels: (x, y, name, colour) of every point.
    """
    points_per_decade = PANEL_POINTS / math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    free: dict[float, float] = {}
    for x, y, name, colour in sorted(labels, key=lambda label: -label[1]):
        # Only the lists of five plain steps are crowded.
        if round(x, 1) != 1:
            axes.annotate(name, (x, y), (0, -9), textcoords="offset points", color=colour, ha="center", va="top")
            continue
        column, height = round(x, 1), math.log10(y) * points_per_decade
        placed = min(height, free.get(column, math.inf))
        free[column] = placed - LABEL_POINTS
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0}
        axes.annotate(
            name,
            (x, y),
            (14, placed - height),
            textcoords="offset points",
            color=colour,
            va="center",
            arrowprops=line if placed < height else None,
        )
