"""Bytes and collectives of a step: DistMuon, AdamW, torch.optim.Muon, DeepSpeed's Muon and owners that all-gather.

    distmuon bench comm [--worlds 2,4,8] [--models dense,moe] [--quick]

Every contender trains the same model on the same tokens, and must first agree with one process that trains on the mean
gradient. Collectives are counted where they enter torch's communication library; their bytes are those of the ring
model, summed over the ranks and divided by their number. "Sent" is what left through the loopback device, with TCP's
headers. Both are given relative to AdamW with ZeRO-1 in the ring model: one reduce-scatter of the gradients, one
all-gather of the parameters, both in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from distmuon.benchmarks import flags, places, targets
from distmuon.benchmarks.launch import Row, account
from distmuon.benchmarks.models import show
from distmuon.benchmarks.targets import Target, place

RESULTS = places.RESULTS / "comm.json"
PICTURE = places.DOCS / "comm.png"
README = places.ROOT / "README.md"
MARKS = ("<!-- bytes -->\n", "<!-- /bytes -->\n")
WORLDS = (2, 4, 8)
# What the README shows; the other rows are in the results.
SHOWN = "moe"


def main(arguments: Sequence[str] | None = None) -> int:
    """Count for all contenders and print the tables; a full run writes results, picture and the README's table."""
    options = flags.read(flags.parser("comm", __doc__, WORLDS), arguments)
    rows = account("comm", options.worlds, options.models)
    judged = judge(rows)
    show(rows, options.models, table)
    print(targets.table(judged))
    if options.full:
        results = {"rows": rows, "targets": targets.records(judged)}
        places.write(RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
        draw(rows)
        if README.is_file():
            README.write_text(with_table(README.read_text(), rows))
    return 0


def draw(rows: Sequence[Row]) -> None:
    """Draw docs/comm.png.

    Args:
        rows: of a full run.
    """
    from distmuon.benchmarks import step_chart

    PICTURE.parent.mkdir(exist_ok=True)
    step_chart.draw_comm(rows).savefig(PICTURE, dpi=150)


def with_table(readme: str, rows: list[dict[str, Any]]) -> str:
    """Put the table of one model between the marks of the README.

    Args:
        readme: its text.
        rows: all rows of the results.

    Returns:
        The new text.
    """
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    chosen = [row for row in rows if row["model"] == SHOWN]
    return f"{before}{MARKS[0]}{table(chosen)}\n{MARKS[1]}{after}"


def judge(rows: Sequence[Row]) -> list[Target]:
    """Compare what was counted with the targets.

    Args:
        rows: of the results.

    Returns:
        The targets.
    """
    ours = [row for row in rows if row["plan"]]
    balanced = [row for row in ours if row["name"].startswith("DistMuon balanced")]
    found = targets.worst(
        "bytes of balanced / AdamW-ZeRO-1, ring model", 1.0, [(row["ratio"], place(row)) for row in balanced], digits=3
    )
    found += targets.worst(
        "collectives of balanced - (2 x buckets + 1)",
        0,
        [(row["own_calls"] - 2 * row["plan"]["buckets"] - 1, place(row)) for row in balanced],
        digits=0,
    )
    found += targets.worst(
        "reductions of gradients inside step()", 0, [(row["late_reductions"], place(row)) for row in ours], digits=0
    )
    return found + targets.equal("bytes planned and measured, all ranks", planned(ours))


def planned(ours: Sequence[Row]) -> Iterator[tuple[float, float, str]]:
    """Pair what DistMuon planned to send with what it sent, without the guard's norms and flags.

    Args:
        ours: its rows.

    Yields:
        Bytes of all ranks, planned and measured, and what it was measured on.
    """
    for row in ours:
        sent = sum(row["wire_by_rank"]) - row["world"] * row["guard_bytes"]
        yield sum(row["plan"]["wire_by_rank"]), sent, place(row)


def table(rows: Sequence[Row]) -> str:
    """Format the rows of a model, with the numbers of ranks side by side.

    Args:
        rows: of one model.

    Returns:
        A Markdown table.
    """
    worlds = sorted({row["world"] for row in rows})
    ranks, last = ", ".join(map(str, worlds)), worlds[-1]
    lines = [
        f"| contender | ring bytes / AdamW-ZeRO-1 at {ranks} ranks | sent / the same | ring MB per rank, {last} ranks "
        f"| collectives, {last} ranks |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["world"]: row for row in rows if row["name"] == name}
        most = own[last]
        ratios = ", ".join(f"{own[world]['ratio']:.3f}" for world in worlds)
        sent = ", ".join(f"{own[world]['sent_ratio']:.3f}" for world in worlds)
        calls = ", ".join(f"{count} {kind}" for kind, count in sorted(most["calls"].items()))
        grouped = f"{most['own_calls']}: " if most["plan"] else ""
        lines.append(f"| {name} | {ratios} | {sent} | {most['wire_bytes'] / 1e6:.2f} | {grouped}{calls} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
