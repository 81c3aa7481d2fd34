"""Tables of the speed benchmark, and the targets it is held to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distmuon.benchmarks.ns_candidates import DEEPSPEED, DEFAULT, STOCK

Group = dict[str, Any]
WIDE = "1024x4096"
# Candidate -> times as fast as the eager triple on a wide matrix.
SPEED = {"opt5 gram": 1.45, "opt4 gram": 2.0, DEFAULT: 1.5}
# Batch -> times as fast as its matrices one by one.
BATCHED = {"64x32x64": 12.0, "64x64x64": 5.0, "32x128x128": 2.0}
NEVER_BELOW = 0.95
FLOAT32_GAIN = 1.8


@dataclass(frozen=True)
class Target:
    """One figure that is to be reached."""

    name: str
    aim: float
    value: float | None
    """What was measured, the worst where several shapes or inputs count; None where nothing needs to be reached."""
    where: str
    """What the value was measured on."""
    passed: bool


def judge(groups: Sequence[Group], float32: dict[str, Any] | None) -> list[Target]:
    """Compare what was measured with the targets.

    Args:
        groups: what was measured on each shape with each input.
        float32: what ``ns_float32.probe`` returned, or None.

    Returns:
        The targets that the shapes allow to judge.
    """
    found = [worst(f"{name} over eager at {WIDE}", aim, of_eager(groups, name, WIDE)) for name, aim in SPEED.items()]
    found += [
        worst(f"{shape} in one batch over one by one", aim, of_twin(groups, DEFAULT, shape))
        for shape, aim in BATCHED.items()
    ]
    found.append(worst(f"{DEFAULT} over eager, any shape", NEVER_BELOW, of_eager(groups, DEFAULT)))
    for rival in (STOCK, DEEPSPEED, f"{DEEPSPEED}, its gram"):
        found.append(worst(f"{DEFAULT} over {rival}, any shape", 1.0, between(groups, DEFAULT, rival)))
    targets = [target for target in found if target is not None]
    if float32 is not None:
        targets.append(judge_float32(float32))
    return targets


def worst(name: str, aim: float, values: Iterable[tuple[float, str]]) -> Target | None:
    """Judge the smallest of several ratios.

    Args:
        name: of the target.
        aim: what is to be reached.
        values: ratios and what they were measured on.

    Returns:
        The target; None without values.
    """
    least = min(values, default=None)
    return None if least is None else Target(name, aim, *least, passed=least[0] >= aim)


def judge_float32(float32: dict[str, Any]) -> Target:
    """Judge oneDNN's float32 products: fast where they are exact, else not used.

    Args:
        float32: what ``ns_float32.probe`` returned.

    Returns:
        The target.
    """
    name = "float32 products through oneDNN over torch's"
    said = f"error {float32['error']:.1e}, legal {float32['legal']:.0e}"
    exact = float32["error"] <= float32["legal"]
    if not float32["accepted"]:
        return Target(name, FLOAT32_GAIN, None, f"rejected by the probe, {said}", passed=not exact)
    gain = float32["gain"]["of_best"]
    return Target(name, FLOAT32_GAIN, gain, said, passed=exact and gain >= FLOAT32_GAIN)


def of_eager(groups: Sequence[Group], name: str, shape: str | None = None) -> list[tuple[float, str]]:
    """Ratios to the eager triple.

    Args:
        groups: what was measured.
        name: the candidate.
        shape: the only shape to take; None takes all.

    Returns:
        Ratios of the shortest times and what they were measured on.
    """
    return [
        (row["over_eager"]["of_best"], title(group))
        for group in groups
        for row in group["rows"]
        if row["candidate"] == name and shape in (None, group["shape"])
    ]


def of_twin(groups: Sequence[Group], name: str, shape: str) -> list[tuple[float, str]]:
    """Ratios to the same without one measure; arguments and result as for ``of_eager``."""
    return [
        (row["over_twin"]["of_best"], title(group))
        for group in groups
        for row in group["rows"]
        if row["candidate"] == name and row["over_twin"] and shape == group["shape"]
    ]


def between(groups: Sequence[Group], name: str, rival: str) -> list[tuple[float, str]]:
    """Ratios of the shortest times of two candidates.

    Args:
        groups: what was measured.
        name: the candidate.
        rival: the one it is compared with.

    Returns:
        Ratios, above 1 where the candidate is faster, and what they were measured on.
    """
    found = []
    for group in groups:
        ms = {row["candidate"]: row["ms"] for row in group["rows"]}
        if name in ms and rival in ms:
            found.append((ms[rival] / ms[name], title(group)))
    return found


def title(group: Group) -> str:
    """Name a shape and its input.

    Args:
        group: what was measured on it.

    Returns:
        The name.
    """
    return f"{group['shape']} from {group['input']}"


def rows(group: Group) -> str:
    """Format what was measured on a shape.

    Args:
        group: the record.

    Returns:
        A Markdown table under a title.
    """
    lines = [
        f"{title(group)}:",
        "| candidate | form | error | ms | x eager (of best) | median | quartiles | x twin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in group["rows"]:
        over, twin = row["over_eager"], row["over_twin"]
        beside = f"{twin['of_best']:.2f} ({row['twin']})" if twin else ""
        lines.append(
            f"| {row['candidate']} | {row['form']} | {row['error']:.1e} | {row['ms']:.2f} | {over['of_best']:.2f} "
            f"| {over['median']:.2f} | {over['low']:.2f} - {over['high']:.2f} | {beside} |"
        )
    return "\n".join(lines)


def table(targets: Sequence[Target]) -> str:
    """Format the targets.

    Args:
        targets: what ``judge`` returned.

    Returns:
        A Markdown table; the first column says PASS or MISS.
    """
    lines = ["\n| | target | aim | measured | on |", "|---|---|---|---|---|"]
    for one in targets:
        measured = "-" if one.value is None else f"{one.value:.2f}"
        verdict = "PASS" if one.passed else "MISS"
        lines.append(f"| {verdict} | {one.name} | >= {one.aim:g} | {measured} | {one.where} |")
    return "\n".join(lines)
