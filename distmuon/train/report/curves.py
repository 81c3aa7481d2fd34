"""The curves of ``loss.png``: loss, learning rate, gradient norm and exposed communication by optimizer step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from distmuon.train.metrics import StepRecord
from distmuon.train.report.read import RunView, exposed_share

Array = npt.NDArray[np.float64]

MAX_POINTS = 1000
_MARKERS = "os^DvP"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; those of the runs are Okabe and Ito's, made for colour-blind readers."""

    background: str
    ink: str
    grid: str
    runs: tuple[str, ...]


LIGHT = Theme("#ffffff", "#24292f", "#d8dee4", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Theme("#15181c", "#d8dde3", "#363c44", ("#56B4E9", "#E0701A", "#1FB98F", "#CC79A7", "#E69F00", "#4A90D9"))


def thin(x: Array, y: Array, points: int = MAX_POINTS) -> tuple[Array, Array]:
    """Reduce a curve to at most ``points`` points, keeping the lowest and the highest of every stretch.

    Args:
        x: ascending positions, [n].
        y: values, [n]; NaN where there is none.
        points: most points to keep.

    Returns:
        Positions and values, both [<= points], in order; values that are not finite are left out.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    keep: set[int] = set()
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        keep |= {start + int(np.argmin(y[start:stop])), start + int(np.argmax(y[start:stop]))}
    index = sorted(keep)
    return x[index], y[index]


def smooth(y: Array, window: int) -> Array:
    """Centred mean over ``window`` values, narrower towards the start so that a falling curve is not cut.

    Args:
        y: values, [n]; those that are not finite do not count.
        window: number of values.

    Returns:
        Means, [n]; NaN where no value of the window is finite.
    """
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(y))
    half = np.minimum(window // 2, at)
    low, high = at - half, np.minimum(at + half + 1, len(y))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def smoothing_window(steps: int) -> int:
    """Steps that the smoothed curve of a run of ``steps`` steps averages over."""
    return max(1, steps // 50)


def draw(runs: Sequence[RunView], theme: Theme = LIGHT) -> bytes:
    """Draw the curves of all runs.

    Args:
        runs: the runs, in the order of their colours.
        theme: colours of the figure.

    Returns:
        A PNG of 1280 x 1200 pixels, 1280 x 1500 with exposed communication.
    """
    buffer = io.BytesIO()
    figure(runs, theme).savefig(buffer, format="png", facecolor=theme.background)
    return buffer.getvalue()


def figure(runs: Sequence[RunView], theme: Theme) -> Figure:
    """The curves of all runs as a matplotlib figure; exposed communication only if it is on record."""
    waits = any(run.exposed() for run in runs)
    canvas = Figure(figsize=(6.4, 7.5 if waits else 6.0), dpi=200, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(3 if waits else 2, 2, height_ratios=(2.1, 1.0, 0.8) if waits else (2.1, 1.0))
    loss = canvas.add_subplot(grid[0, :])
    rate, norm = canvas.add_subplot(grid[1, 0]), canvas.add_subplot(grid[1, 1])
    exposed = [canvas.add_subplot(grid[2, :])] if waits else []
    for axes in (loss, rate, norm, *exposed):
        _style(axes, theme)
    _draw_loss(loss, runs, theme)
    _legend(loss, runs, theme)
    _draw_small(rate, runs, theme, lambda record: record.lr, "learning rate", faint=False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rate.yaxis.get_offset_text().set_color(theme.ink)
    rate.set_ylim(bottom=0.0)
    _draw_small(norm, runs, theme, lambda record: record.grad_norm, "gradient norm", faint=True)
    norms = np.concatenate([_curve(run, lambda record: record.grad_norm)[1] for run in runs])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > 20 * np.median(norms):
        norm.set_yscale("log")
    for axes in exposed:
        _draw_small(axes, runs, theme, _exposed_percent, "exposed\ncomm. (%)", faint=True)
        axes.set_ylim(bottom=0.0)
    return canvas


def _exposed_percent(record: StepRecord) -> float | None:
    share = exposed_share(record)
    return None if share is None else 100 * share


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(True, color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    axes.set_xlabel("optimizer step", color=theme.ink, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _curve(run: RunView, value: Callable[[StepRecord], float | None]) -> tuple[Array, Array]:
    steps = run.metrics.steps
    values = [value(record) for record in steps.values()]
    return np.array(list(steps), dtype=float), np.array([math.nan if v is None else v for v in values], dtype=float)


def _draw_loss(axes: Axes, runs: Sequence[RunView], theme: Theme) -> None:
    shown: list[Array] = []
    for index, run in enumerate(runs):
        colour = theme.runs[index % len(theme.runs)]
        x, raw = _curve(run, lambda record: record.loss)
        mean = smooth(raw, smoothing_window(len(x)))
        axes.plot(*thin(x, raw), color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(*thin(x, mean), color=colour, linewidth=1.6, linestyle=_line(index, theme))
        evals = run.metrics.evals
        points = np.array([record.loss for record in evals.values()], dtype=float)
        at, points = thin(np.array(list(evals), dtype=float), points, 100)
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(
            at,
            points,
            marker,
            color=colour,
            markersize=4.5,
            markeredgecolor=theme.background,
            markeredgewidth=0.6,
        )
        shown += [mean[np.isfinite(mean)], points]
    axes.set_ylabel("loss (nats per token)", color=theme.ink, fontsize=10)
    values = np.concatenate(shown)
    if len(values):
        # The first steps fall so far that the rest would look flat: 5 % of the points may lie above the axes.
        low, high = float(values.min()), float(np.quantile(values, 0.95))
        margin = 0.06 * max(high - low, 0.01 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)


def _draw_small(
    axes: Axes,
    runs: Sequence[RunView],
    theme: Theme,
    value: Callable[[StepRecord], float | None],
    label: str,
    faint: bool,
) -> None:
    for index, run in enumerate(runs):
        colour, line = theme.runs[index % len(theme.runs)], _line(index, theme)
        x, y = _curve(run, value)
        if faint:
            axes.plot(*thin(x, y, 400), color=colour, linewidth=0.5, alpha=0.25)
            y = smooth(y, smoothing_window(len(x)))
        axes.plot(*thin(x, y), color=colour, linewidth=1.4, linestyle=line)
    axes.set_ylabel(label, color=theme.ink, fontsize=10)


def _line(index: int, theme: Theme) -> Literal["-", "--", ":"]:
    styles: tuple[Literal["-"], Literal["--"], Literal[":"]] = ("-", "--", ":")
    return styles[index // len(theme.runs) % 3]


def _legend(axes: Axes, runs: Sequence[RunView], theme: Theme) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=theme.runs[index % len(theme.runs)],
            linestyle=_line(index, theme),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
        )
        for index in range(len(runs))
    ]
    # matplotlib would leave out a label that starts with an underscore and typeset one with dollar signs.
    labels = [f" {run.label}" if run.label.startswith("_") else run.label for run in runs]
    handles += [
        Line2D([], [], color=theme.ink, linewidth=1.6),
        Line2D([], [], color=theme.ink, linewidth=0.6, alpha=0.5),
        Line2D([], [], color=theme.ink, linestyle="", marker="o", markersize=4.5),
    ]
    labels += ["training, smoothed", "training, every step", "validation"]
    legend = axes.legend(handles, labels, fontsize=9, frameon=False, labelcolor=theme.ink, loc="upper right")
    for entry in legend.get_texts():
        entry.set_parse_math(False)
