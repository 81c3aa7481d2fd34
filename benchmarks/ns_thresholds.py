"""From which sizes row panels, and one call per matrix, pay on a CPU: where the constants of kernels/cpu.py come from.

Shapes: B matrices, M rows, K the side that a product sums over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from distmuon.benchmarks.timing import Clock, interleave, ratio
from distmuon.kernels import cpu
from distmuon.kernels.products import TorchProducts

ROWS = (256, 384, 512, 640, 768, 1024, 1536, 2048)
INNER = (256, 512, 1024, 2048, 4096, 8192)
HEIGHTS = (64, 128, 256, 512)
HEIGHT_SHAPES = ((512, 2048), (1024, 1024), (1024, 4096), (2048, 2048), (2048, 8192))
ALONE_ROWS = (32, 64, 128, 256, 512, 1024)
BATCH = 4
CONSTANTS = ("PANEL", "PANEL_ROWS", "PANEL_INNER", "ALONE_ROWS")


def measure(clock: Clock, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Time panels against whole products, panels of several heights, and one call per matrix against a batch.

    Args:
        clock: how to time.
        rounds: turns of both.
        quick: only the two smallest sizes of each.

    Returns:
        Ratios of the shortest times, from where they are always above 1, and the constants.
    """
    most = 2 if quick else None
    whole = TorchProducts()
    found: dict[str, Any] = {name: getattr(cpu, name) for name in CONSTANTS}

    def over(calls: Mapping[str, Callable[[float], object]]) -> float:
        for call in calls.values():
            call(1.0)
        plain, fast = interleave(calls, lambda turn: 1 + turn / 64, rounds, clock).values()
        return ratio(plain, fast).of_best

    def gram(rows: int, inner: int) -> float:
        x = _random(1, rows, inner)
        return over({"whole": lambda _: whole.gram(x), "panels": lambda _: cpu._by_panels(x[0], x[0].mT)})

    def square(rows: int) -> float:
        p = _random(1, rows, rows)
        p = p + p.mT
        return over(
            {
                "whole": lambda _: whole.product(p, p),
                "panels": lambda _: cpu._by_panels(p[0], p[0]),
            }
        )

    def by_height(rows: int, inner: int, height: int) -> float:
        with mock.patch.object(cpu, "PANEL", height):
            return gram(rows, inner)

    def loop(rows: int) -> float:
        p, numbers = _random(BATCH, rows, rows), torch.linspace(1, 2, BATCH)
        with mock.patch.object(cpu, "ALONE_ROWS", 1):
            return over(
                {
                    "batch": lambda turn: whole.combine(p, p, numbers, numbers, numbers * turn),
                    "loop": lambda turn: cpu.CpuProducts().combine(p, p, numbers, numbers, numbers * turn),
                }
            )

    pairs = [(rows, inner) for rows in ROWS[:most] for inner in INNER[:most] if inner >= rows]
    found["gram"] = [[*pair, gram(*pair)] for pair in _shown(pairs, "XX^T")]
    found["square"] = [[rows, rows, square(rows)] for rows in _shown(ROWS[:most], "square")]
    cases = [(*shape, height) for shape in HEIGHT_SHAPES[:most] for height in HEIGHTS]
    found["heights"] = [[*case, by_height(*case)] for case in _shown(cases, "heights")]
    found["loop"] = [[rows, loop(rows)] for rows in _shown(ALONE_ROWS[:most], "one call per matrix")]
    found["pays_from"] = pays_from([*found["gram"], *found["square"]])
    found["loop_pays_from"] = pays_from([[rows, rows, gain] for rows, gain in found["loop"]])
    return found


def pays_from(cells: Sequence[Sequence[float]]) -> list[int] | None:
    """Find the sizes from which a path is never slower.

    Args:
        cells: rows, inner side and ratio of what was measured.

    Returns:
        Least rows and least inner side such that no larger cell is below 1, those that cover most cells; None if there
        are none.
    """

    def covered(corner: tuple[float, float]) -> list[float]:
        return [gain for rows, inner, gain in cells if rows >= corner[0] and inner >= corner[1]]

    corners = [(rows, inner) for rows, *_ in cells for _, inner, _ in cells]
    paying = [corner for corner in corners if covered(corner) and min(covered(corner)) >= 1]
    if not paying:
        return None
    rows, inner = max(paying, key=lambda corner: (len(covered(corner)), *corner))
    return [int(rows), int(inner)]


def table(found: dict[str, Any]) -> str:
    """Format what was measured, beside the constants.

    Args:
        found: what ``measure`` returned.

    Returns:
        Markdown.
    """
    inner = sorted({cell[1] for cell in found["gram"]})
    lines = ["Panels over the whole product, XX^T of [rows, inner], then the square of [rows, rows]:"]
    lines += [f"| rows | {' | '.join(map(str, inner))} | square |", "|---" * (len(inner) + 2) + "|"]
    grid = {(rows, side): gain for rows, side, gain in found["gram"]}
    for rows, _, gain in found["square"]:
        cells = [f"{grid[rows, side]:.2f}" if (rows, side) in grid else "" for side in inner]
        lines.append(f"| {rows} | {' | '.join(cells)} | {gain:.2f} |")
    lines += [
        "",
        "Panels of several heights over the whole product:",
        "| rows | inner | height | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {rows} | {side} | {height} | {gain:.2f} |" for rows, side, height, gain in found["heights"]]
    lines += ["", f"One call per matrix over an elementwise pass, {BATCH} matrices:", "| rows | |", "|---|---|"]
    lines += [f"| {rows} | {gain:.2f} |" for rows, gain in found["loop"]]
    best = max(found["heights"], key=lambda cell: cell[-1])
    lines += [
        "",
        f"panels pay from [rows, inner] {found['pays_from']}: "
        f"PANEL_ROWS = {found['PANEL_ROWS']}, PANEL_INNER = {found['PANEL_INNER']}",
        f"the largest gain is that of height {best[2]}: PANEL = {found['PANEL']}",
        f"one call per matrix pays from [rows, rows] {found['loop_pays_from']}: ALONE_ROWS = {found['ALONE_ROWS']}",
    ]
    return "\n".join(lines)


def _random(batch: int, rows: int, inner: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, rows, inner, generator=generator).bfloat16()


def _shown(cases: Sequence[Any], what: str) -> Any:
    return tqdm(cases, desc=what, file=sys.stderr)
