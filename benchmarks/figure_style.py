"""The look of this folder's figures."""

from __future__ import annotations

from typing import get_args

from matplotlib.axes import Axes

from distmuon.coefficients import PresetName

INK, FAINT, GRID = "#24292f", "#8a929b", "#e4e8ec"
# Okabe and Ito's colours, made for colour-blind readers: lists for the Frobenius norm, and for the Schatten-8 norm.
PUBLISHED, GENERATED = "#0072B2", "#D55E00"


def colour_of(name: str) -> str:
    """Pick a method's colour.

    Args:
        name: a preset, or another function's name.

    Returns:
        Of a published list, of a generated one, or of what is no preset.
    """
    if name not in get_args(PresetName):
        return FAINT
    return GENERATED if name.startswith("opt") else PUBLISHED


def plain(axes: Axes) -> None:
    """Take away what distracts from the data.

    Args:
        axes: the panel.
    """
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
