"""One picture of a plan: what each rank holds, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distmuon.planning.holdings import Ranks
from distmuon.planning.layouts import CHOICES
from distmuon.planning.outcome import Outcome, ranks
from distmuon.planning.parameters import Part

# Okabe and Ito's colours, made for colour-blind readers.
_PARTS: dict[Part, tuple[str, str]] = {
    "attention": ("attention", "#0072B2"),
    "dense": ("dense MLP, shared experts, routers", "#56B4E9"),
    "expert": ("experts", "#E69F00"),
    "elementwise": ("elementwise: embedding, head, norms", "#009E73"),
}
_PADDING, _FLOPS, _INK, _GRID = "#b8bfc6", "#D55E00", "#24292f", "#d8dee4"
# Ranks that can still be told apart as bars.
_MOST_BARS = 64


def draw(outcome: Outcome, path: Path) -> None:
    """Draw the chosen layout.

    Args:
        outcome: a comparison.
        path: where the picture goes; its folder is made.
    """
    held, request = outcome.held, outcome.request
    bars = request.world <= _MOST_BARS
    order = np.arange(request.world) if bars else np.lexsort((-held.elements, -held.flops))
    figure = Figure(figsize=(9.0, 6.2), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    _draw_elements(top, outcome, order, bars)
    _draw_flops(bottom, held.flops[order], bars)
    figure.suptitle(_title(outcome), x=0.01, ha="left", color=_INK, fontsize=11, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _draw_elements(axes: Axes, outcome: Outcome, order: NDArray[np.intp], bars: bool) -> None:
    held = outcome.held
    scale, unit = _unit(float(held.elements.max()))
    x = np.arange(len(order))
    below = np.zeros(len(order))
    known = np.sum(list(held.by_part.values()), axis=0)
    layers = [(label, colour, held.by_part[part]) for part, (label, colour) in _PARTS.items()]
    layers.append(("padding", _PADDING, held.elements - known))
    for label, colour, elements in layers:
        height = elements[order] / scale
        # Padding of less than an element per rank and bucket cannot be seen.
        if height.sum() <= 1e-4 * below.sum():
            continue
        if bars:
            axes.bar(x, height, bottom=below, color=colour, label=label, width=0.8)
        else:
            axes.fill_between(x, below, below + height, color=colour, label=label, step="mid", linewidth=0)
        below = below + height
    axes.set_ylabel(f"{unit} elements of a rank's shard", color=_INK)
    axes.set_ylim(0, below.max() * 1.04)
    _plain(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(layers), frameon=False, fontsize=9)


def _draw_flops(axes: Axes, flops: Ranks, bars: bool) -> None:
    mean = float(flops.mean()) or 1.0
    x = np.arange(len(flops))
    if bars:
        axes.bar(x, flops / mean, color=_FLOPS, width=0.8)
        axes.set_xlabel("rank", color=_INK)
        axes.set_xlim(-0.6, len(flops) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.fill_between(x, flops / mean, color=_FLOPS, step="mid", linewidth=0)
        axes.set_xlabel("ranks, busiest first", color=_INK)
        axes.set_xlim(0, len(flops) - 1)
    axes.axhline(1.0, color=_INK, linewidth=1.0, linestyle="--")
    axes.set_ylabel("Newton-Schulz FLOPs\nrelative to the mean", color=_INK)
    largest = float(flops.max()) / mean
    axes.set_ylim(0, max(1.25, largest * 1.08))
    axes.set_title(f"busiest / mean: {largest:.3f}", loc="right", fontsize=9, color=_INK)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)


def _title(outcome: Outcome) -> str:
    request = outcome.request
    experts = f", experts on {request.ep} groups of {request.world // request.ep}" if request.ep > 1 else ""
    transport = f" ({CHOICES[outcome.chosen].title})" if request.policy == "balanced" else ""
    return f"{request.model} on {ranks(request.world)}{experts}: {request.policy}{transport}"


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "billion") if largest >= 1e9 else (1e6, "million") if largest >= 1e6 else (1e3, "thousand")
