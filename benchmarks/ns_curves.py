"""What is to be known about a Newton-Schulz preset without a matrix: the curve of output over input singular value."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from distmuon.coefficients import Preset, PresetName, preset, valid_up_to

Array = NDArray[np.float64]

NAMES: tuple[PresetName, ...] = (
    *("papers", "you", "polar_express"),
    *("cans", "cubic5", "papers8+2"),
    *("opt4", "opt5", "opt6"),
)
NORMS = {"frobenius": "Frobenius", "schatten8": "Schatten-8"}
# Presets that have several numbers of steps.
STEPS = {"papers": "1 to 20, usually 5", "polar_express": "1 to 8, usually 5"}
# An example: a matrix of independent normal entries of this size.
ROWS, COLUMNS = 1024, 4096
INPUTS: Array = np.concatenate([np.geomspace(1e-6, 1e-2, 4000), np.linspace(1e-2, 1, 40000)])


def table() -> str:
    """The presets in Markdown.

    Returns:
        A table with a row per preset.
    """
    rows = [
        "| preset | steps | norm | above 0.5 from | inputs from 0.01 up end in | valid up to | source |",
        "|---" * 7 + "|",
    ]
    for name in NAMES:
        found = preset(name)
        half, low, high = reach(found)
        steps, end = STEPS.get(name, str(len(found.quintics))), valid_up_to(found.quintics)
        source = "generated; arXiv 2505.16932" if found.start == "schatten8" else found.source
        ends = f"{digits(low, high)} | {end:.3f}"
        rows.append(f"| `{name}` | {steps} | {NORMS[found.start]} | {half:.1e} | {ends} | {source} |")
    return "\n".join(rows) + "\n"


def digits(low: float, high: float) -> str:
    """Print a range with as many digits as tell it from 1.

    Args:
        low: one end.
        high: the other end.

    Returns:
        "low to high".
    """
    places = 3 if max(abs(low - 1), abs(high - 1)) > 1e-3 else 5
    return f"{low:.{places}f} to {high:.{places}f}"


def reach(found: Preset) -> tuple[float, float, float]:
    """Sum up the curve of a preset.

    Args:
        found: the preset.

    Returns:
        The input from which outputs exceed 0.5, and the least and the largest output of inputs in [0.01, 1].
    """
    y = apply(found.quintics, INPUTS)
    above = y[INPUTS >= 0.01]
    return float(INPUTS[np.argmax(y >= 0.5)]), float(above.min()), float(above.max())


def apply(quintics: tuple[tuple[float, float, float], ...], x: Array) -> Array:
    """Outputs of the composed quintics.

    Args:
        quintics: (a, b, c) per step.
        x: singular values.

    Returns:
        As many singular values.
    """
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


def gaussian_values(found: Preset) -> tuple[float, float]:
    """Least and largest singular value of a wide Gaussian matrix after the preset's normalization.

    Args:
        found: the preset.

    Returns:
        The ends of the spectrum in the limit of large matrices (V. Marchenko and L. Pastur, 1967).
    """
    low, high = math.sqrt(COLUMNS) - math.sqrt(ROWS), math.sqrt(COLUMNS) + math.sqrt(ROWS)
    if found.start == "frobenius":
        norm = math.sqrt(ROWS * COLUMNS)
    else:
        ratio = ROWS / COLUMNS
        # Fourth moment of the Marchenko-Pastur law of XX^T / N.
        moment = 1 + 6 * ratio + 6 * ratio**2 + ratio**3
        norm = 1.005 * math.sqrt(COLUMNS) * (ROWS * moment) ** (1 / 8)
    return low / norm, high / norm
