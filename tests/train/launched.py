"""Runs of configs/runs/debug.toml started as users start them, all in one directory and each once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distmuon.train.config import load_run
from distmuon.train.data import prepare
from distmuon.train.metrics import Metrics, read_metrics

REPO = Path(__file__).resolve().parents[2]
DEBUG = REPO / "configs" / "runs" / "debug.toml"
UPDATES = 12
SHORT = f"--schedule.updates {UPDATES} --evaluation.every 6 --evaluation.sequences 15"
SHORT += " --checkpoint.every 4"

# The command line with a fault in the seventh update, on the rank that is to fail.
FAULT = """
import os, sys
from distmuon.cli import main
from distmuon.train.loop import Trainer

def update(self, *args):
    if self.done == 6 and self.rank == int(os.environ["FAILS"]):
        raise RuntimeError("the disk is full")
    return original(self, *args)

original, Trainer._update = Trainer._update, update
sys.exit(main())
"""
# Several runs on one rank, one after the other, since starting Python and DeepSpeed takes longer than a run.
SEVERAL = """
import os, signal, sys
import tyro
from pathlib import Path
from distmuon.train.config import RunConfig, load_run
from distmuon.train.loop import Trainer
from distmuon.train.run import train

def update(self, *args):
    if self.done == 5 and self.run.name == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)

original, Trainer._update = Trainer._update, update
for line in sys.stdin.read().splitlines():
    try:
        train(tyro.cli(RunConfig, default=load_run(Path(sys.argv[1])), args=line.split()))
    except ValueError as error:
        print("refused:", error)
"""


@dataclass(frozen=True)
class Done:
    """A finished process."""

    returncode: int
    out: str
    err: str


class Site:
    """Directory in which all runs of this file are started, each when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, Done] = {}
        self.common = f"{SHORT} --data.cache-dir {path / 'cache'}"
        run = load_run(DEBUG)
        prepare(run.data.model_copy(update={"cache_dir": str(path / "cache")}), progress=False)

    def start(self, command: list[str], lines: str = "", **environment: str) -> Done:
        """Run a command here; it and all its ranks end with the test."""
        own = os.environ | {"PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            own.pop(name, None)
        own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=self.path, env=own, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        try:
            out, err = process.communicate(lines, timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Done(process.returncode, out, err)

    def once(self, name: str, start: Callable[[], Done]) -> Done:
        if name not in self.finished:
            self.finished[name] = start()
        return self.finished[name]

    def train(self, name: str, launcher: list[str], flags: str = "", **environment: str) -> Done:
        command = [*launcher, "train", str(DEBUG), "--name", name, *self.common.split(), *flags.split()]
        return self.once(f"{name} {flags}", lambda: self.start(command, **environment))

    def metrics(self, name: str) -> Metrics:
        return read_metrics(self.path / "runs" / name)

    def losses(self, name: str) -> list[float]:
        steps = self.metrics(name).steps
        assert list(steps) == list(range(1, len(steps) + 1))
        return [record.loss for record in steps.values()]
