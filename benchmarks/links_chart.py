"""The picture of the link benchmark: step time against link speed, and how far the prediction is off."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from distmuon.benchmarks.figure_style import FAINT, INK, plain
from distmuon.benchmarks.links_report import TOLERANCE
from distmuon.benchmarks.links_sweep import label

# Okabe and Ito's colours, made for colour-blind readers; shapes tell contenders apart without them.
_STYLES = (("#0072B2", "o"), ("#56B4E9", "s"), ("#E69F00", "^"), ("#D55E00", "v"), ("#009E73", "D"))
# Points of one speed stand side by side.
_STEP = 1.05
# How far to the right of the fastest link the point without a limit stands.
_BEYOND = 3.0


def draw(results: dict[str, Any]) -> Figure:
    """Draw the times and the errors of the prediction.

    Args:
        results: what benchmarks/results/links.json holds.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(11.5, 5), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.09, rect=(0, 0.09, 1, 0.91)))
    times, errors = figure.subplots(1, 2, width_ratios=(1.7, 1))
    rates = sorted(entry["rate"] for entry in results["goodput"] if entry["rate"] is not None)
    places = {rate: rate for rate in rates} | {None: rates[-1] * _BEYOND if rates else 1e9}
    for number, one in enumerate(results["contenders"]):
        style = _STYLES[number % len(_STYLES)]
        shift = _STEP ** (number - (len(results["contenders"]) - 1) / 2)
        _draw_times(times, one["rows"], places, style, shift)
        _draw_errors(errors, one["rows"], style, shift)
    ticks = list(places.items())
    _speeds(times, [place for _, place in ticks], [label(rate) for rate, _ in ticks])
    _speeds(errors, rates, [label(rate) for rate in rates])
    times.set_yscale("log")
    times.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    times.yaxis.set_minor_locator(NullLocator())
    times.set_title("Seconds a step: measured, with quartiles, and predicted", loc="left", color=INK, fontsize=10.5)
    errors.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color=FAINT, alpha=0.15, linewidth=0)
    errors.axhline(0, color=FAINT, linewidth=1)
    errors.set_title("Prediction / measured median - 1, %", loc="left", color=INK, fontsize=10.5)
    _explain(figure, times, results)
    return figure


def _draw_times(axes: Axes, rows: list[dict[str, Any]], places: dict[Any, float], style: Any, shift: float) -> None:
    colour, marker = style
    limited = sorted((row for row in rows if row["rate"] is not None), key=lambda row: row["rate"])
    axes.plot(
        [places[row["rate"]] * shift for row in limited],
        [row["predicted"] for row in limited],
        color=colour,
        linewidth=1.3,
    )
    for row in rows:
        place = places[row["rate"]] * shift
        axes.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=3.2, alpha=0.4)
        # The prediction starts from the point without a limit.
        face = colour if row["rate"] is not None else "white"
        axes.plot(place, row["median"], marker, color=colour, markerfacecolor=face, markersize=5.5)


def _draw_errors(axes: Axes, rows: list[dict[str, Any]], style: Any, shift: float) -> None:
    colour, marker = style
    for row in rows:
        if row["rate"] is not None:
            axes.plot(row["rate"] * shift, 100 * row["error"], marker, color=colour, markersize=5.5)


def _speeds(axes: Axes, places: list[float], labels: list[str]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("link of each rank, bit/s in each direction", color=INK, fontsize=9)
    plain(axes)


def _explain(figure: Figure, times: Axes, results: dict[str, Any]) -> None:
    names = [one["name"] for one in results["contenders"]]
    sent = [one["planned_bytes"] / 1e6 for one in results["contenders"]]
    handles = [
        Line2D([], [], color=_STYLES[i % len(_STYLES)][0], marker=_STYLES[i % len(_STYLES)][1], linewidth=1.3)
        for i in range(len(names))
    ]
    labels = [f"{name}: {size:.1f} MB a rank" for name, size in zip(names, sent, strict=True)]
    times.legend(handles, labels, loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(
        f"{results['ranks']} ranks, each in a network namespace with a link of its own",
        x=0.012,
        ha="left",
        color=INK,
        fontsize=13,
        fontweight="bold",
    )
    machine = results["machine"]
    figure.text(
        0.012,
        0.02,
        f"{results['model']}; median and quartiles of {results['rounds']} steps; float32, gloo, all ranks on "
        f"{machine['device']}, torch {machine['versions']['torch']}.\n"
        "Open points have no limit: predictions (lines) know them, the planned bytes, and what plain sockets get.",
        color=FAINT,
        fontsize=8.5,
    )
