"""From samples to rows: medians, the prediction beside each, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from distmuon.benchmarks.links_ranks import Ranks
from distmuon.benchmarks.links_sweep import Rate, Sample, Sweep, label
from distmuon.predict import Link

# The prediction's aim.
TOLERANCE = 0.2


def group(name: str, rates: Sequence[Rate], sweep: Sweep, links: Sequence[Link], ranks: Ranks) -> dict[str, Any]:
    """Summarize a contender and let the ranks predict it.

    Args:
        name: the contender.
        rates: link speeds, without a limit first.
        sweep: what was measured.
        links: the link at each of them.
        ranks: they know what the contender sends.

    Returns:
        A record, with one row a link speed.
    """
    free = sweep.samples[name, None]
    wall = statistics.median(sample.seconds for sample in free)
    rest = (
        statistics.median(sample.newton_schulz for sample in free),
        statistics.median(sample.update for sample in free),
    )
    described = [{"bandwidth": link.bandwidth, "latency": link.latency} for link in links]
    predicted = ranks.all(do="predict", name=name, wall=wall, rest=rest, links=described)[0]
    rows = [
        row(rate, sweep.samples[name, rate], seconds) for rate, seconds in zip(rates, predicted["seconds"], strict=True)
    ]
    return {"planned_bytes": predicted["planned_bytes"], "rows": rows}


def row(rate: Rate, samples: Sequence[Sample], predicted: float) -> dict[str, Any]:
    """Summarize a contender at one speed.

    Args:
        rate: the speed.
        samples: its steps.
        predicted: seconds.

    Returns:
        A record.
    """
    seconds = [sample.seconds for sample in samples]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "rate": rate,
        "median": median,
        "low": low,
        "high": high,
        "predicted": predicted,
        "error": predicted / median - 1,
        "sent_bytes": statistics.median(sample.sent for sample in samples),
        "seconds": [round(value, 6) for value in seconds],
    }


def table(results: dict[str, Any]) -> str:
    """Format the results as Markdown.

    Args:
        results: what benchmarks/results/links.json holds.

    Returns:
        The table, and a sentence on the prediction.
    """
    rates = [entry["rate"] for entry in results["goodput"]]
    heads = " | ".join(label(rate) for rate in rates)
    sockets = " | ".join(f"{entry['bits'] / 1e6:.0f}" for entry in results["goodput"])
    lines = [
        f"| seconds a step, {results['ranks']} ranks | MB sent: planned / left | {heads} |",
        "|---|---|" + "---|" * len(rates),
        f"| plain sockets get, Mbit/s | | {sockets} |",
    ]
    for one in results["contenders"]:
        rows = one["rows"]
        sent = statistics.median(row["sent_bytes"] for row in rows)
        cells = [f"{row['median']:.3f}" for row in rows]
        lines.append(f"| {one['name']} | {one['planned_bytes'] / 1e6:.3f} / {sent / 1e6:.3f} | {' | '.join(cells)} |")
        cells = ["" if row["rate"] is None else f"{row['predicted']:.3f} ({row['error']:+.1%})" for row in rows]
        lines.append(f"| ... predicted | | {' | '.join(cells)} |")
    limited = [row for one in results["contenders"] for row in one["rows"] if row["rate"] is not None]
    if limited:
        worst = max(abs(row["error"]) for row in limited)
        within = sum(abs(row["error"]) <= TOLERANCE for row in limited)
        lines.append("")
        lines.append(
            f"{within} of {len(limited)} predictions lie within {TOLERANCE:.0%} of the measured median; "
            f"the worst is off by {worst:.1%}."
        )
    return "\n".join(lines)
