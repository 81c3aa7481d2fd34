"""Seconds of a step: DistMuon, AdamW, torch.optim.Muon, DeepSpeed's Muon and owners that all-gather.

    distmuon bench step [--worlds 2,4] [--models dense,moe,wide] [--rounds 25] [--quick]

All contenders live in the same processes, are verified as for ``comm``, and take turns step by step. The optimizer's
CPU time is that of a whole training step (all threads of a rank, those that communicate as well; mean of the ranks)
less that of forward and backward of the same model without an optimizer in the same round: everything from the first
gradient hook to the last gathered parameter, wherever a contender does it. Waiting takes no CPU time, nor do other
ranks on the same cores; the wall time of a step means something only with a core for every rank. DistMuon and
DeepSpeed run in DeepSpeed's engine, the others in loops of their own. DeepSpeed's Muon runs its bfloat16 method,
eagerly as all others: compiling it takes minutes on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch

from distmuon.benchmarks import flags, ns_machine, places, targets
from distmuon.benchmarks.contenders import BALANCED, OPT4, RIVAL
from distmuon.benchmarks.launch import Row, launch
from distmuon.benchmarks.models import CASES, show
from distmuon.benchmarks.targets import Target, place

RESULTS = places.RESULTS / "step.json"
PICTURE = places.DOCS / "step.png"
WORLDS = (2, 4)
ROUNDS = 25
QUICK_ROUNDS = 5
# Contender -> share of the rival's CPU time that it may take at 2 ranks.
AIMS = {BALANCED: 0.6, OPT4: 0.45}


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all contenders, print the tables, and after a full run write results and picture."""
    parser = flags.parser("step", __doc__, WORLDS, list(CASES))
    parser.add_argument("--rounds", type=flags.at_least(2), help=f"turns of each, default {ROUNDS}")
    options = flags.read(parser, arguments)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    machine = ns_machine.describe(torch.device("cpu"), 1, "CPU time of all threads of a rank")
    print(ns_machine.sentence(machine), flush=True)
    rows: list[Row] = []
    for world in options.worlds:
        print(f"timing at {world} ranks ...", flush=True)
        for case in (CASES[model] for model in options.models):
            if world <= case.most_ranks:
                turns = str(max(2, round(rounds * case.turns)))
                rows += launch("stopwatch", world, ["--models", case.name, "--rounds", turns])
    judged = judge(rows)
    show(rows, options.models, table)
    cores = os.cpu_count() or 1
    if max(options.worlds) > cores:
        print(f"\nWith more ranks than the {cores} cores here, wall time and waiting say little; CPU time stands.")
    print(targets.table(judged))
    if options.full:
        results = {"machine": {**machine, "load_after": ns_machine.load()}, "rounds": rounds, "rows": rows}
        text = json.dumps({**results, "targets": targets.records(judged)}, indent=1, allow_nan=False)
        places.write(RESULTS, text + "\n")
        draw(rows)
    return 0


def draw(rows: Sequence[Row]) -> None:
    """Draw docs/step.png.

    Args:
        rows: of a full run.
    """
    from distmuon.benchmarks import step_chart

    PICTURE.parent.mkdir(exist_ok=True)
    step_chart.draw_step([row for row in rows if row["world"] == WORLDS[0]]).savefig(PICTURE, dpi=150)


def judge(rows: Sequence[Row]) -> list[Target]:
    """Compare the times at 2 ranks with the targets.

    Args:
        rows: of the results.

    Returns:
        The targets.
    """
    found: list[Target] = []
    for name, aim in AIMS.items():
        for row in rows:
            if (row["name"], row["world"]) == (name, 2):
                what = f"CPU time of the optimizer, {name} / {RIVAL}"
                found += targets.worst(what, aim, [(row["over_rival"]["median"], place(row))])
    return found


def table(rows: Sequence[Row]) -> str:
    """Format the rows of a model.

    Args:
        rows: of one model.

    Returns:
        A Markdown table.
    """
    lines = [
        f"| ranks | contender | optimizer, CPU ms per rank | quartiles | / {RIVAL} | quartiles | step, wall ms "
        "| of it Newton-Schulz | waiting for others | model alone, CPU ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu, over, wall, split = row["optimizer_cpu_ms"], row["over_rival"], row["wall_ms"], row["phases_ms"]
        known = f"{split['newton_schulz']:.1f} | {split['waited']:.1f}" if split else "- | -"
        lines.append(
            f"| {row['world']} | {row['name']} | {cpu['median']:.1f} | {cpu['low']:.1f} - {cpu['high']:.1f} "
            f"| {over['median']:.2f} | {over['low']:.2f} - {over['high']:.2f} | {wall['median']:.1f} "
            f"| {known} | {row['model_cpu_ms']['median']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
