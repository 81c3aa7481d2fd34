"""The command ``distmuon bench``: which benchmarks there are, and how they are called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

# Name on the command line -> (module with a ``main(arguments)``, what it measures).
BENCHMARKS = {
    "accuracy": ("ns_accuracy", "error of every Newton-Schulz preset on matrices that are hard to orthogonalize"),
    "comm": ("comm", "bytes and collectives per step of DistMuon, AdamW and other Muons at 2, 4 and 8 ranks"),
    "kernels": ("kernels", "registers, spills and loads of the Triton kernels, compiled for five GPUs without one"),
    "links": ("links", "seconds per step against link speed, one network namespace a rank, beside the prediction"),
    "memory": ("memory", "optimizer state per rank"),
    "ns": ("ns", "speed of Newton-Schulz beside the papers' triple, torch.optim.Muon and DeepSpeed"),
    "step": ("step", "CPU and wall seconds of a step, beside AdamW and other Muons at 2 and 4 ranks"),
}


def usage() -> str:
    """What ``distmuon bench`` prints.

    Returns:
        Usage and one line per benchmark.
    """
    lines = [f"  {name:10} {what}" for name, (_, what) in BENCHMARKS.items()]
    return "\n".join(
        ["usage: distmuon bench NAME [--FLAG VALUE ...]   (--help lists the flags)", "", "benchmarks:", *lines]
    )


def run(arguments: Sequence[str]) -> int:
    """Run a benchmark.

    Args:
        arguments: its name and flags.

    Returns:
        Exit status: 0 done, 1 failed or something it needs is not installed, 2 wrong usage.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *flags = arguments
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"use one of {', '.join(BENCHMARKS)}."
        print(f'distmuon bench: unknown benchmark "{name}"; {hint}', file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"distmuon.benchmarks.{BENCHMARKS[name][0]}")
        status: int = module.main(flags)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distmuon"):
            raise
        print(
            f"distmuon bench {name}: {error.name} is not installed; pip install 'distmuon[dev]' brings it.",
            file=sys.stderr,
        )
        return 1
    return status
