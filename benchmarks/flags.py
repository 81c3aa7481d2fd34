"""What the benchmarks of whole steps take on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from distmuon.benchmarks.models import CASES, SMALL


def parser(
    name: str, description: str, worlds: Sequence[int], models: Sequence[str] = SMALL
) -> argparse.ArgumentParser:
    """Make a parser with the flags that all have.

    Args:
        name: of the benchmark.
        description: its module's docstring.
        worlds: numbers of ranks of a full run.
        models: models of a full run.

    Returns:
        The parser.
    """
    made = argparse.ArgumentParser(
        prog=f"distmuon bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = ",".join(map(str, worlds))
    made.add_argument("--worlds", type=_numbers(2), default=list(worlds), help=f"numbers of ranks, default {shown}")
    made.add_argument("--models", type=_models, default=list(models), help=f"default {','.join(models)}")
    made.add_argument("--quick", action="store_true", help="2 ranks and the dense model; nothing is written")
    return made


def read(given: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        given: a parser that ``parser`` made.
        arguments: the words; None takes those of the process.

    Returns:
        The flags, with ``full`` saying whether results are to be written.
    """
    options = given.parse_args(arguments)
    everything = given.parse_args([])
    options.full = vars(options) == vars(everything)
    if options.quick:
        options.worlds, options.models = [2], ["dense"]
    return options


def at_least(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers.

    Args:
        least: the smallest legal one.

    Returns:
        The reader.
    """

    def read_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of {least} or more')
        return int(text)

    return read_number


def _numbers(least: int) -> Callable[[str], list[int]]:
    read_number = at_least(least)
    return lambda text: [read_number(item.strip()) for item in text.split(",")]


def _models(text: str) -> list[str]:
    names = [item.strip() for item in text.split(",")]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f'"{unknown[0]}" is not a model; use {" or ".join(CASES)}')
    return names
