"""Pictures and the table of the Newton-Schulz presets: ``python -m distmuon.benchmarks.ns_pictures``; needs matplotlib.

Writes docs/ns_maps.png and the table in docs/newton-schulz.md from the coefficients, and docs/ns_error_cost.png from
results/ns_accuracy.json.
"""

from __future__ import annotations

import json

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from distmuon.benchmarks import places
from distmuon.benchmarks.figure_style import FAINT, INK, colour_of, plain
from distmuon.benchmarks.ns_curves import (
    COLUMNS,
    INPUTS,
    NAMES,
    NORMS,
    ROWS,
    apply,
    digits,
    gaussian_values,
    reach,
    table,
)
from distmuon.benchmarks.ns_errors import error_cost
from distmuon.coefficients import PresetName, preset

RESULTS = places.RESULTS / "ns_accuracy.json"
DOCS = places.DOCS
MARKS = ("<!-- presets -->\n", "<!-- /presets -->\n")


def main() -> None:
    """Draw what can be drawn."""
    page = DOCS / "newton-schulz.md"
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])
    maps().savefig(DOCS / "ns_maps.png", dpi=150)
    print(f"wrote {DOCS / 'ns_maps.png'}")
    if RESULTS.exists():
        error_cost(json.loads(RESULTS.read_text())).savefig(DOCS / "ns_error_cost.png", dpi=150)
        print(f"wrote {DOCS / 'ns_error_cost.png'}")


def maps() -> Figure:
    """One panel per preset: output over input singular value.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10.0, 8.4), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, NAMES, strict=True):
        draw_map(axes, name)
    for axes in panels[:, 0]:
        axes.set_ylabel("output", color=INK)
    for axes in panels[-1, :]:
        axes.set_xlabel("input: singular value / norm", color=INK)
    figure.suptitle(
        f"Shaded: where the singular values of a {ROWS} x {COLUMNS} matrix of independent normal entries lie "
        "after division by the norm",
        fontsize=10,
        color=INK,
    )
    return figure


def draw_map(axes: Axes, name: PresetName) -> None:
    """Draw one preset into one panel.

    Args:
        axes: the panel.
        name: the preset.
    """
    found = preset(name)
    colour = colour_of(name)
    axes.axvspan(*gaussian_values(found), color=colour, alpha=0.13, linewidth=0)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.plot(INPUTS, apply(found.quintics, INPUTS), color=colour, linewidth=1.4)
    half, low, high = reach(found)
    axes.set_title(f"{name}", loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_title(f"{len(found.quintics)} steps, {NORMS[found.start]}", loc="right", color=FAINT, fontsize=9)
    axes.text(
        0.97,
        0.06,
        f"above 0.5 from {half:.2g} up\n{digits(low, high)} from 0.01 up",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        color=INK,
        fontsize=8.5,
    )
    axes.set(xscale="log", yscale="log", xlim=(1e-5, 1), ylim=(0.02, 2))
    axes.yaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1.0]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    plain(axes)


if __name__ == "__main__":
    main()
