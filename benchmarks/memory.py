"""What each rank keeps and computes: optimizer state, and the FLOPs of Newton-Schulz beside every matrix once.

    distmuon bench memory [--worlds 2,4,8] [--models dense,moe] [--quick]

State is every tensor that a later step depends on: moments, master copies (DeepSpeed's ZeRO has them for float32
parameters, too) and momentum staged for a step; buffers that are only kept to be used again are none. FLOPs are those
of matrix products in a step, less those of the model alone; "once" is every matrix orthogonalized once by the same
method. Contenders are verified as for ``comm``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence

from distmuon.benchmarks import flags, places, targets
from distmuon.benchmarks.launch import Row, account
from distmuon.benchmarks.models import show
from distmuon.benchmarks.targets import Target, place

RESULTS = places.RESULTS / "memory.json"
WORLDS = (2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count for all contenders, print the tables, and write the results of a full run."""
    options = flags.read(flags.parser("memory", __doc__, WORLDS), arguments)
    rows = account("memory", options.worlds, options.models)
    judged = judge(rows)
    show(rows, options.models, table)
    print(targets.table(judged))
    if options.full:
        results = {"rows": rows, "targets": targets.records(judged)}
        places.write(RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return 0


def judge(rows: Sequence[Row]) -> list[Target]:
    """Compare what was counted with the targets.

    Args:
        rows: of the results.

    Returns:
        The targets.
    """
    ours = [row for row in rows if row["plan"][0] is not None]
    balanced = [row for row in ours if row["name"].startswith("DistMuon balanced")]
    found = targets.worst(
        "Newton-Schulz FLOPs of balanced, all ranks / once",
        1.0,
        [(sum(row["ns_flops"]) / row["ns_flops_once"], place(row)) for row in balanced],
    )
    for key, name in (("ns_flops", "Newton-Schulz FLOPs"), ("state_bytes", "state")):
        pairs = [
            (plan[key], measured, f"{place(row)}, rank {rank}")
            for row in ours
            for rank, (plan, measured) in enumerate(zip(row["plan"], row[key], strict=True))
        ]
        found += targets.equal(f"{name} planned and measured, every rank", pairs)
    return found


def table(rows: Sequence[Row]) -> str:
    """Format the rows of a model.

    Args:
        rows: of one model.

    Returns:
        A Markdown table.
    """
    lines = [
        "| ranks | contender | state of the busiest rank, MB | / mean | Newton-Schulz of the busiest rank, GFLOPs "
        "| / mean | all ranks / once |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        state, flops, once = row["state_bytes"], row["ns_flops"], row["ns_flops_once"]
        work = f"{max(flops) / 1e9:.2f} | {ratio(flops)} | {sum(flops) / once:.2f}" if once else "- | - | -"
        lines.append(f"| {row['world']} | {row['name']} | {max(state) / 1e6:.2f} | {ratio(state)} | {work} |")
    return "\n".join(lines)


def ratio(by_rank: Sequence[float]) -> str:
    """Format how far the busiest rank is above the mean.

    Args:
        by_rank: a figure of every rank, above zero.

    Returns:
        Largest over mean.
    """
    return f"{max(by_rank) / statistics.mean(by_rank):.2f}"


if __name__ == "__main__":
    sys.exit(main())
