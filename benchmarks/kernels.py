"""Compile every Triton kernel for five GPUs without a GPU and check registers, spills and loads: ``make kernels``.

    distmuon bench kernels [--target sm_90,gfx942] [--kernel symmetric] [--json OUT] [--quick]

A full run writes benchmarks/results/kernels.json and the tables of docs/kernels.md. Everything is compiled, never run.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

from distmuon.benchmarks import places
from distmuon.benchmarks.compiled import budgets, table
from distmuon.benchmarks.compiled.targets import TARGETS

RESULTS = places.RESULTS / "kernels.json"
RIVALS = places.RESULTS / "rivals.json"
DOCUMENT = places.DOCS / "kernels.md"
KERNELS = ("symmetric", "polynomial", "momentum")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write results; 1 if a budget is broken."""
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set, and an interpreter compiles nothing; unset it.", file=sys.stderr)
        return 2
    if options.rivals is not None:
        write(RIVALS, compile_rivals(options.rivals))
    records = compile_kernels(options.target, options.kernel, quick=options.quick, jobs=options.jobs)
    results = {"note": "compiled, never run", "tools": tools(), "kernels": records, "work": table.work()}
    print(table.compiled(records))
    full = not options.quick and options.target == list(TARGETS) and options.kernel == list(KERNELS)
    if options.json is not None or full:
        write(options.json or RESULTS, results)
    if full and options.json is None and DOCUMENT.is_file() and RIVALS.is_file():
        DOCUMENT.write_text(table.document(DOCUMENT.read_text(), results, json.loads(RIVALS.read_text())))
    broken = [sentence for record in records for sentence in budgets.breaches(record)]
    for sentence in broken:
        print(sentence, file=sys.stderr)
    print(f"{len(records)} kernels compiled, never run; {len(broken)} budgets broken")
    return 1 if broken else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="distmuon bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in (("target", list(TARGETS)), ("kernel", list(KERNELS))):
        known = functools.partial(listed, choices=choices)
        parser.add_argument(
            f"--{name}", type=known, default=choices, help=f"{name}s, comma-separated: {', '.join(choices)}"
        )
    parser.add_argument("--json", type=Path, help="write the results to this file alone")
    parser.add_argument("--quick", action="store_true", help="one form and tile of each kernel and variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--rivals", type=Path, help="also compile public kernels, from clones in this folder")
    return parser.parse_args(arguments)


def listed(text: str, choices: Sequence[str]) -> list[str]:
    """Read a comma-separated list of known names."""
    names = text.split(",")
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(choices)}")
    return names


def compile_kernels(targets: list[str], kernels: list[str], *, quick: bool, jobs: int) -> list[dict[str, Any]]:
    """Compile all cases, in processes of their own, and show progress."""
    from distmuon.benchmarks.compiled import catalog

    cases = list(catalog.cases(targets, kernels, quick=quick))
    with multiprocessing.get_context("spawn").Pool(max(1, min(jobs, len(cases)))) as pool:
        done = pool.imap(catalog.compile_case, cases)
        return list(tqdm.tqdm(done, total=len(cases), desc="compiling", unit="kernel", mininterval=1.0))


def compile_rivals(clones: Path) -> dict[str, Any]:
    """Compile public kernels."""
    from distmuon.benchmarks.compiled import rivals

    records = rivals.compile_rivals(clones, lambda line: print(f"compiling {line} ...", flush=True))
    targets = list(dict.fromkeys(record["target"] for record in records))
    commits = {record["repository"]: record.pop("commit") for record in records}
    note = "compiled by us from their public sources, never run"
    return {"note": note, "tools": tools(), "commits": commits, "targets": targets, "kernels": records}


def tools() -> dict[str, str]:
    """Versions of the compilers."""
    import triton

    versions = {"Triton": triton.__version__}
    for name in ("ptxas", "ptxas_blackwell"):
        tool = getattr(triton.knobs.nvidia, name)
        said = subprocess.run([tool.path, "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
        versions[name.replace("_", "-")] = said.split("release ")[1].split(",")[0]
    return versions


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results with one record per line."""
    lines = []
    for name, value in results.items():
        body = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]"
        lines.append(f"{json.dumps(name)}: {body}")
    places.write(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
