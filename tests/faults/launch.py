"""Ranks that may die: gloo processes or a torchrun command, watched from outside and never left behind.

A rank says what it saw with ``tell(value)``, or by returning it; a later word replaces an earlier one.
``strike`` makes a rank do something at a chosen call of a product function, ``die`` and ``freeze`` are what it may do.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.ranks import ROOT, _target

_VERDICTS = "DISTMUON_TEST_VERDICTS"
_PR_SET_PDEATHSIG = 1


class StuckError(AssertionError):
    """Ranks were still running when their time was up; they were killed."""


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    ``verdict`` is what it told last, None if nothing; ``exit_code`` is -9 after a SIGKILL, also of a rank that was
    killed in the end because it was stopped; ``seconds`` is its life; ``ended`` is a time.monotonic() of its end.
    """

    verdict: Any
    exit_code: int | None
    seconds: float
    ended: float


@dataclass(frozen=True)
class Launched:
    """How a torchrun command ended; ``verdicts`` by rank, of the last restart that told one."""

    exit_code: int
    seconds: float
    verdicts: dict[int, Any]
    output: str


def tell(value: Any) -> None:
    """Write this rank's verdict, plain JSON, where the launcher finds it whatever happens next."""
    path = Path(os.environ[_VERDICTS]) / f"rank-{os.environ['RANK']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def die() -> None:
    """SIGKILL for this process: nothing is flushed, no connection is closed with a word."""
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal may be delivered a moment after kill returns.
    time.sleep(60)


def freeze() -> None:
    """SIGSTOP for this process: connections stay open and silent."""
    os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def strike(target: str, action: Callable[[], None], call: int = 1, after: bool = False) -> Iterator[None]:
    """Do something at the ``call``-th call of a function, named as for ``mock.patch``, before or after it runs."""
    owner, _, name = target.rpartition(".")
    try:
        holder: Any = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, outer = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), outer)
    original = getattr(holder, name)
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call
        if now and not after:
            action()
        result = original(*args, **kwargs)
        if now and after:
            action()
        return result

    with mock.patch.object(holder, name, struck):
        yield


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, group_timeout: float = 20.0
) -> list[Ending]:
    """Run a module-level ``fn(rank, world, group, *args)`` in ``world`` fresh gloo processes, in rank order.

    A stopped rank is killed once all others have ended. An error of ``fn`` becomes the verdict {"error": traceback}
    with exit code 1. StuckError after ``timeout`` seconds; whatever happens, every process is gone then.
    """
    folder = tempfile.mkdtemp(prefix="ranks-")
    context = multiprocessing.get_context("forkserver")
    # The first optimizer of a process imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload(["torch._dynamo", "torch._inductor", "distmuon.dist_muon", "tests.faults.launch"])
    # The first process waits for these imports; that is nobody's time.
    warm = context.Process(target=int)
    warm.start()
    warm.join(60.0)
    call = folder, world, group_timeout, _target(fn), args
    ranks = [context.Process(target=_body, args=(rank, *call), daemon=True) for rank in range(world)]
    ended: dict[int, float] = {}
    try:
        begun = time.monotonic()
        for process in ranks:
            process.start()
        while len(ended) < world and time.monotonic() < begun + timeout:
            running = {process.sentinel: rank for rank, process in enumerate(ranks) if rank not in ended}
            for sentinel in wait(list(running), 0.05):
                ended[running[sentinel]] = time.monotonic()  # type: ignore[index]
            left = [rank for rank in range(world) if rank not in ended]
            if left and len(ended) + sum(_stopped(ranks[rank].pid) for rank in left) == world and ended:
                for rank in left:
                    ranks[rank].kill()
        late = [rank for rank in range(world) if rank not in ended]
        verdicts = _read(Path(folder))
        if late:
            raise StuckError(f"ranks {late} of {world} still ran after {timeout} s; verdicts: {verdicts}")
        for process in ranks:
            process.join(5.0)
        codes = [process.exitcode for process in ranks]
        return [Ending(verdicts.get(r), codes[r], ended[r] - begun, ended[r]) for r in range(world)]
    finally:
        for process in ranks:
            if process.pid is not None and process.is_alive():
                process.kill()
                process.join(5.0)
        shutil.rmtree(folder, ignore_errors=True)


def run_torchrun(arguments: Sequence[str], timeout: float = 120.0, env: Mapping[str, str] | None = None) -> Launched:
    """Run ``torchrun ARGUMENTS`` from the repository; ``rank_command`` makes the end of such a command line.

    StuckError after ``timeout`` seconds; whatever happens, the agent and all workers are gone then.
    """
    folder = tempfile.mkdtemp(prefix="torchrun-")
    extra = {_VERDICTS: folder, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    log = Path(folder) / "output.txt"
    begun = time.monotonic()
    with log.open("w") as output:
        agent = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **extra, **(env or {})}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        code = agent.wait(timeout)
        return Launched(code, time.monotonic() - begun, _read(Path(folder)), log.read_text())
    except subprocess.TimeoutExpired:
        raise StuckError(f"torchrun still ran after {timeout} s: {log.read_text()[-4000:]}") from None
    finally:
        for pid in [agent.pid, *_processes_with(f"{_VERDICTS}={folder}")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()
        shutil.rmtree(folder, ignore_errors=True)


def rank_command(fn: Callable[..., Any], *args: Any) -> list[str]:
    """What torchrun is to run so that every rank calls ``fn(rank, world, group, *args)``; args are plain JSON."""
    return ["-m", "tests.faults.launch", _target(fn), json.dumps(args)]


def _body(rank: int, folder: str, world: int, group_timeout: float, target: str, args: Sequence[Any]) -> None:
    """A rank that ends with its launcher, whichever way that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update({_VERDICTS: folder, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"})
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    limit = timedelta(seconds=group_timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    _call(target, rank, world, args)


def _call(target: str, rank: int, world: int, args: Sequence[Any]) -> None:
    module, name = target.split(":")
    try:
        verdict = getattr(importlib.import_module(module), name)(rank, world, dist.group.WORLD, *args)
    except Exception:
        tell({"error": traceback.format_exc()})
        sys.exit(1)
    if verdict is not None:
        tell(verdict)


def _read(folder: Path) -> dict[int, Any]:
    return {int(path.stem.removeprefix("rank-")): json.loads(path.read_text()) for path in folder.glob("rank-*.json")}


def _stopped(pid: int | None) -> bool:
    """Whether a process was stopped by a signal."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _processes_with(setting: str) -> list[int]:
    """Processes with an environment entry, which nothing but what this launcher started has."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def main() -> None:
    """A rank under torchrun: join the group, call what the command line names."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _call(sys.argv[1], dist.get_rank(), dist.get_world_size(), json.loads(sys.argv[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
