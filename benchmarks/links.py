"""Step time against link speed, each rank in a network namespace of its own, beside the prediction of the plan.

    distmuon bench links [--ranks 4] [--rates 100M,1G,unlimited] [--rounds 12] [--quick]

Every rank's link is limited in both directions (iproute2: veth, bridge, tbf); needs root on Linux and is skipped where
that is not permitted. All contenders train the same model on the same tokens in the same processes, in turn; before
that their ranks must hold equal parameters, bit for bit, and agree with one process. The prediction knows the step
without a limit, the bytes of the plan and what a plain socket gets. A run with all defaults writes
benchmarks/results/links.json and docs/links.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmuon.benchmarks import links_report, places
from distmuon.benchmarks.links_model import find_links
from distmuon.benchmarks.links_ranks import started
from distmuon.benchmarks.links_sweep import Rate, Sweep
from distmuon.benchmarks.models import CASES
from distmuon.benchmarks.namespaces import NotPermittedError, isolated

RESULTS = places.RESULTS / "links.json"
PICTURE = places.DOCS / "links.png"
RANKS, ROUNDS, QUICK_ROUNDS = 4, 12, 2
RATES: tuple[Rate, ...] = (None, 10e9, 3e9, 1e9, 300e6, 100e6)
QUICK: tuple[Rate, ...] = (None, 1e9, 300e6)
MODEL = "moe"
_UNITS = {"M": 1e6, "G": 1e9}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all contenders at all speeds, print the table, write the results."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    try:
        results = {"command": " ".join(["distmuon bench links", *given]), **measure(options)}
    except NotPermittedError as error:
        print(f"distmuon bench links: skipped, {error}; it needs Linux, iproute2 and root (CAP_SYS_ADMIN).")
        return 0
    print(links_report.table(results))
    if options.json is not None or not given:
        places.write(options.json or RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if not given:
        from distmuon.benchmarks import links_chart

        PICTURE.parent.mkdir(exist_ok=True)
        links_chart.draw(results).savefig(PICTURE, dpi=150)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="distmuon bench links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=at_least(2), default=RANKS, help=f"number of ranks, default {RANKS}")
    parser.add_argument("--rates", type=rates, help="bits per second, e.g. 100M,2.5G; unlimited is always measured")
    parser.add_argument("--rounds", type=at_least(2), help=f"steps of each contender at each speed, default {ROUNDS}")
    parser.add_argument("--model", choices=CASES, default=MODEL, help=f"model, default {MODEL}")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="1G and 300M, two rounds")
    options = parser.parse_args(arguments)
    options.rates = options.rates or (QUICK if options.quick else RATES)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


def rates(text: str) -> tuple[Rate, ...]:
    """Read a comma-separated list of speeds; returns them from the fastest to the slowest."""
    found: set[float] = set()
    for item in text.split(","):
        if item.strip() == "unlimited":
            continue
        number, unit = item.strip()[:-1], item.strip()[-1:].upper()
        try:
            bits = float(number) * _UNITS[unit]
        except (KeyError, ValueError):
            bits = 0.0
        # Below that a step takes minutes; above, tc takes other units.
        if not 1e6 <= bits <= 1e12:
            raise argparse.ArgumentTypeError(
                f'"{item}" is not a speed from 1M to 1000G; write e.g. 100M, 2.5G or unlimited'
            )
        found.add(bits)
    return (None, *sorted(found, reverse=True))


def at_least(least: int) -> Any:
    """Make a reader of whole numbers."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of {least} or more')
        return int(text)

    return read


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks, measure, predict."""
    import torch

    from distmuon.benchmarks import ns_machine

    machine = ns_machine.describe(torch.device("cpu"), 1, "wall time")
    with isolated(options.ranks) as network, started(network) as ranks:
        print(f"{options.ranks} ranks, each in a network namespace, make and check the contenders ...", flush=True)
        ranks.all(model=options.model, addresses=[network.address(rank) for rank in range(options.ranks)])
        made = ranks.all(do="make")[0]
        sweep = Sweep(network, ranks, [one["name"] for one in made])
        host = sweep.collectives()
        sweep.run(options.rates, options.rounds, lambda begun: print(begun, flush=True))
        goodputs = [sweep.goodput(rate) for rate in options.rates]
        links = find_links(goodputs, host, options.ranks)
        for one in made:
            one.update(links_report.group(one["name"], options.rates, sweep, links, ranks))
    return {
        "machine": {**machine, "load_after": ns_machine.load()},
        "model": CASES[options.model].title,
        "ranks": options.ranks,
        "rounds": options.rounds,
        "gloo_seconds_unlimited": host,
        "goodput": [{"rate": rate, "bits": goodput} for rate, goodput in zip(options.rates, goodputs, strict=True)],
        "contenders": made,
    }


if __name__ == "__main__":
    sys.exit(main())
