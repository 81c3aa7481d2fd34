"""Speed of Newton-Schulz beside the papers' triple in eager torch, torch.optim.Muon's function and DeepSpeed's.

    distmuon bench ns [--shapes 1024x4096,64x32x64] [--rounds 15] [--quick] [--thresholds]

Every candidate is checked against a float64 result before it is timed; then all take turns, round by round. "x eager"
is the time of the eager triple over that of the candidate. On one thread the CPU time of that thread is taken, which
other processes do not add to. A run over all shapes writes benchmarks/results/ns.json and docs/ns_speed.png, one with
--thresholds only benchmarks/results/ns_thresholds.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distmuon.benchmarks import ns_check, ns_float32, ns_machine, ns_targets, ns_thresholds, places
from distmuon.benchmarks.ns_candidates import Candidate, Shape, candidates
from distmuon.benchmarks.timing import Clock, interleave, make_clock, ratio

RESULTS = places.RESULTS / "ns.json"
THRESHOLDS = places.RESULTS / "ns_thresholds.json"
PICTURE = places.DOCS / "ns_speed.png"
SINGLE = (
    *(Shape(1, 256, 1024), Shape(1, 512, 512), Shape(1, 512, 2048)),
    *(Shape(1, 1024, 1024), Shape(1, 1024, 4096), Shape(1, 4096, 1024)),
)
BATCHES = (Shape(64, 32, 64), Shape(64, 64, 64), Shape(32, 128, 128))
QUICK = (Shape(1, 256, 1024), Shape(64, 32, 64))
ROUNDS, QUICK_ROUNDS = 15, 3
# Its multiples modulo 1 are all different and spread evenly.
GOLDEN = (5**0.5 - 1) / 2
# What gradients come in, and what the optimizer passes.
INPUTS = (torch.float32, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time all candidates on all shapes, print the tables, write the results."""
    options = parse(arguments)
    device = torch.device(options.device)
    words, clock = make_clock(device, options.threads)
    with threads(options.threads):
        before = ns_machine.describe(device, options.threads, words)
        print(ns_machine.sentence(before), flush=True)
        if options.thresholds:
            found = ns_thresholds.measure(clock, options.rounds, quick=options.quick)
            print(ns_thresholds.table(found))
            places.write(options.json or THRESHOLDS, json.dumps({"machine": before, **found}, indent=1) + "\n")
            return 0
        groups = measure(options.shapes, device, clock, options.rounds)
        float32 = ns_float32.probe(clock, options.rounds) if device.type == "cpu" else None
    targets = ns_targets.judge(groups, float32)
    print(ns_targets.table(targets))
    results = {
        "machine": {**before, "load_after": ns_machine.load()},
        "rounds": options.rounds,
        "groups": groups,
        "float32": float32,
        "targets": [asdict(target) for target in targets],
    }
    full = options.shapes == [*SINGLE, *BATCHES] and not options.quick
    if options.json is not None or full:
        places.write(options.json or RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if full and options.json is None:
        from distmuon.benchmarks import ns_chart

        PICTURE.parent.mkdir(exist_ok=True)
        ns_chart.draw(results).savefig(PICTURE, dpi=150)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="distmuon bench ns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join(map(str, [*SINGLE, *BATCHES]))
    parser.add_argument("--shapes", type=shapes, help=f"[BATCHx]ROWSxCOLS, comma-separated; default {every}")
    parser.add_argument("--rounds", type=at_least(2), help=f"turns of every candidate, default {ROUNDS}")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads, default 1; with more, wall time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file alone")
    parser.add_argument("--quick", action="store_true", help="two small shapes, three rounds")
    parser.add_argument("--thresholds", action="store_true", help="measure from which size row panels pay on a CPU")
    options = parser.parse_args(arguments)
    if options.thresholds and options.device != "cpu":
        parser.error("--thresholds are those of the CPU; add --device cpu")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.shapes = options.shapes or [*QUICK] if options.quick else options.shapes or [*SINGLE, *BATCHES]
    return options


def shapes(text: str) -> list[Shape]:
    """Read a comma-separated list of shapes."""
    found = []
    for item in text.split(","):
        sizes = item.strip().split("x")
        if not 2 <= len(sizes) <= 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise argparse.ArgumentTypeError(
                f'"{item}" is not a shape; write ROWSxCOLS or BATCHxROWSxCOLS, e.g. 64x32x64'
            )
        batch, rows, cols = map(int, sizes if len(sizes) == 3 else ["1", *sizes])
        found.append(Shape(batch, rows, cols))
    return found


def at_least(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of {least} or more')
        return int(text)

    return read


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with a number of threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(given: Sequence[Shape], device: torch.device, clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """Check and time the candidates of all shapes and input precisions; print a table for each."""
    groups = []
    with tqdm(total=len(given) * len(INPUTS) * rounds, unit="round", file=sys.stderr) as progress:
        for shape in given:
            for dtype in INPUTS:
                name = f"{shape} {str(dtype).removeprefix('torch.')}"
                progress.set_description(name)
                group = measure_group(shape, dtype, device, clock, rounds, progress.update)
                groups.append(group)
                progress.clear()
                print(f"\n{ns_targets.rows(group)}", flush=True)
    return groups


def measure_group(
    shape: Shape, dtype: torch.dtype, device: torch.device, clock: Clock, rounds: int, after_round: Callable[[], object]
) -> dict[str, Any]:
    """Check and time the candidates of one shape and input precision."""
    x_BMN = ns_check.graded(shape.batch, shape.rows, shape.cols, seed=INPUTS.index(dtype)).to(device)
    x = x_BMN[0] if shape.batch == 1 else x_BMN
    run = candidates(shape, device, dtype)
    errors = check(run, x.to(dtype), x_BMN.to(dtype))

    def make_input(turn: int) -> torch.Tensor:
        # No two of the same norm, as in training: oneDNN prepares a product anew for every new factor of its addend.
        return (x * (1 + turn * GOLDEN % 1)).to(dtype)

    seconds = interleave({one.name: one for one in run}, make_input, rounds, clock, after_round)
    baseline = seconds[run[0].name]
    rows = []
    for one in run:
        own = seconds[one.name]
        rows.append(
            {
                "candidate": one.name,
                "form": one.form,
                "error": errors[one.name],
                "ms": min(own) * 1e3,
                "median_ms": statistics.median(own) * 1e3,
                "over_eager": asdict(ratio(baseline, own)),
                "twin": one.twin,
                "over_twin": asdict(ratio(seconds[one.twin], own)) if one.twin else None,
            }
        )
    return {
        "shape": str(shape),
        "batch": shape.batch,
        "input": str(dtype).removeprefix("torch."),
        "rows": rows,
    }


def check(run: Sequence[Candidate], x: torch.Tensor, x_BMN: torch.Tensor) -> dict[str, float]:
    """Compare every candidate with the exact result; batches also, on a CPU, with their matrices one by one."""
    exact = {torch.float32: ns_check.Exact(x_BMN)}
    # Casting is part of what 16-bit candidates are timed for, not of the polynomial.
    exact[torch.bfloat16] = ns_check.Exact(x_BMN.bfloat16())
    exact[torch.float16] = exact[torch.float32]
    errors, results = {}, {}
    for one in run:
        found = one.result(x)
        results[one.name] = found
        expected = exact[one.dtype].polynomial(one.quintics, one.start)
        errors[one.name] = ns_check.verify(one.name, found.reshape(expected.shape), expected, one.dtype)
    for one in run:
        twin = next((other for other in run if other.name == one.twin), None)
        if twin is not None and twin.loop and x.device.type == "cpu":
            ns_check.verify_equal(one.name, results[one.name], results[twin.name])
    return errors


if __name__ == "__main__":
    sys.exit(main())
