"""The command line; every flag of ``train`` is derived from the configuration models."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distmuon.errors import CollectiveError, DistMuonError

_USAGE = """usage: distmuon COMMAND ...

commands:
  train RUN.toml [--FLAG VALUE ...]   train as the run file says; flags override it (--help lists them)
  plan --model FILE --world N,...     show what a model's placement costs before it is trained (--help lists flags)
  report RUN_DIR [OTHER_DIR ...]      draw a run's report again, with the curves of others beside it
  verify CHECKPOINT                   check that a checkpoint, or a directory's latest, is whole; show what is in it
  export CHECKPOINT OUT.safetensors   write its weights to one file that plain torch and safetensors can load
  bench [NAME] [--FLAG VALUE ...]     run a benchmark; without a name, list them
  doctor                              show versions and what of this machine can be used

train runs alone, under `torchrun --standalone --nproc-per-node N -m distmuon train ...`, and under `deepspeed`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: command-line arguments; None takes the process's.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher passes --local_rank as its first argument.
    given = [argument for argument in given if not argument.startswith(("--local_rank", "--local-rank"))]
    commands: dict[str, Callable[[list[str]], int]] = {
        **{"train": _train, "plan": _plan, "report": _report, "verify": _verify, "export": _export},
        **{"bench": _bench, "doctor": _doctor},
    }
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if given else 2
    if given[0] not in commands:
        print(f'distmuon: unknown command "{given[0]}"; use one of {", ".join(commands)}.', file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO if _first() else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return commands[given[0]](given[1:])
    except DistMuonError as error:
        if _first():
            print(f"distmuon {given[0]}: {error}", file=sys.stderr)
        return 1
    except CollectiveError as error:
        # Every rank that is left says so: the first one may be the one that is gone.
        print(f"distmuon {given[0]}: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads has enough, as `head` has; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        import tyro

        from distmuon.train.config import RunConfig

        tyro.cli(RunConfig, args=["--help"], prog="distmuon train RUN.toml")
    if not arguments or arguments[0].startswith("-"):
        print("distmuon train: name a run file first, e.g. configs/runs/moe_mini.toml.", file=sys.stderr)
        return 2
    from distmuon.errors import ConfigError
    from distmuon.train.config import load_run
    from distmuon.train.overrides import override

    run = load_run(Path(arguments[0]))
    try:
        run = override(run, arguments[1:])
    except ConfigError as error:
        if _first():
            print(f"distmuon train: {error}", file=sys.stderr)
        return 2
    import torch.distributed as dist

    from distmuon.train.report import summary_lines
    from distmuon.train.run import train

    local_rank, world = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    directory = train(run, local_rank, world)
    if _first():
        print("\n".join([*summary_lines(directory), f"report: {directory / 'report.html'}"]))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _plan(arguments: list[str]) -> int:
    from distmuon.planning.command import plan_text

    print(plan_text(arguments))
    return 0


def _report(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: distmuon report RUN_DIR [OTHER_DIR ...]")
        return 0 if arguments else 2
    from distmuon.train.report import summary_lines, write_report

    directory, *others = (Path(argument) for argument in arguments)
    path = write_report(directory, others)
    print("\n".join([*summary_lines(directory, others), f"report: {path}"]))
    return 0


def _verify(arguments: list[str]) -> int:
    quick = "--size" in arguments
    paths = [argument for argument in arguments if argument != "--size"]
    if len(paths) != 1 or paths[0].startswith("-"):
        print("usage: distmuon verify CHECKPOINT [--size]\n  --size   compare sizes and headers only, not every hash")
        return 0 if paths[:1] in (["-h"], ["--help"]) else 2
    from distmuon.checkpoint.describe import describe
    from distmuon.checkpoint.verify import verify

    print("\n".join(describe(verify(paths[0], "size" if quick else "full"))))
    return 0


def _export(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print("usage: distmuon export CHECKPOINT OUT.safetensors")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    from distmuon.checkpoint.verify import export

    path = export(*arguments)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _bench(arguments: list[str]) -> int:
    from distmuon.benchmarks.command import run

    return run(arguments)


def _doctor(arguments: list[str]) -> int:
    from distmuon.doctor import examine

    print("\n".join(examine()))
    return 0


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"
