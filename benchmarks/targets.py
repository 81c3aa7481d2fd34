"""Figures that a benchmark is held to, and the list of them that it prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One figure that is to be reached."""

    name: str
    aim: str
    value: str
    """What was measured, the worst where several models and numbers of ranks count."""
    where: str
    """What the value was measured on."""
    met: bool


def worst(name: str, limit: float, values: Iterable[tuple[float, str]], digits: int = 2) -> list[Target]:
    """Judge the largest of several figures.

    Args:
        name: of the target.
        limit: what it must not exceed, rounded to the digits that are printed.
        values: figures and what they were measured on.
        digits: decimals.

    Returns:
        The target; nothing without values.
    """
    largest = max(values, default=None)
    if largest is None:
        return []
    value, where = largest
    met = round(value, digits) <= limit
    return [Target(name, f"<= {limit:.{digits}f}", f"{value:.{digits}f}", where, met)]


def equal(name: str, pairs: Iterable[tuple[float, float, str]]) -> list[Target]:
    """Judge figures that must equal those that were planned, but for fractions of a byte.

    Args:
        name: of the target.
        pairs: planned, measured, and what it was measured on.

    Returns:
        The target; nothing without pairs.
    """
    listed = list(pairs)
    if not listed:
        return []
    wrong = [
        f"{where}: {measured:,.0f} for {planned:,.0f}"
        for planned, measured, where in listed
        if not _same(planned, measured)
    ]
    said = f"{len(listed) - len(wrong)} of {len(listed)}"
    return [Target(name, "equal", said, wrong[0] if wrong else "everywhere", not wrong)]


def _same(planned: float, measured: float) -> bool:
    # The ring model sends fractions of a byte where a payload does not divide by the ranks.
    return abs(planned - measured) <= max(1.0, 1e-6 * planned)


def records(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Make targets fit for JSON.

    Args:
        targets: the targets.

    Returns:
        One record each.
    """
    return [asdict(target) for target in targets]


def table(targets: Sequence[Target]) -> str:
    """Format targets.

    Args:
        targets: the targets.

    Returns:
        A Markdown table; the first column says met or MISSED.
    """
    lines = ["\n| | target | aim | measured | on |", "|---|---|---|---|---|"]
    for one in targets:
        verdict = "met" if one.met else "MISSED"
        lines.append(f"| {verdict} | {one.name} | {one.aim} | {one.value} | {one.where} |")
    return "\n".join(lines)


def place(row: dict[str, Any]) -> str:
    """Say what a row was measured on.

    Args:
        row: of the results.

    Returns:
        The contender, the model and the number of ranks.
    """
    return f"{row['name']}, {row['model']}, {row['world']} ranks"
