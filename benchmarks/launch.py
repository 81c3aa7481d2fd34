"""Starts a benchmark's ranks under torchrun, on a loopback device of their own where that is permitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

Row = dict[str, Any]
# Of this process's network namespace, unlike /sys.
_DEVICES = Path("/proc/self/net/dev")
_SENT_FIELD = 8


def launch(module: str, world: int, arguments: Sequence[str]) -> list[Row]:
    """Run a worker module on every rank and read what rank 0 wrote.

    Args:
        module: of this package; ``python -m`` on it takes ``arguments`` and ``--worker FILE``.
        world: number of ranks.
        arguments: flags.

    Returns:
        Rows.

    Raises:
        RuntimeError: the worker wrote nothing.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += ["-m", f"distmuon.benchmarks.{module}", *arguments, "--worker", str(result)]
        # DeepSpeed compiles its Muon with inductor, which takes minutes on a CPU.
        env = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        env |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
        status = subprocess.run([*own_loopback(), *command], env=env, check=False).returncode  # noqa: S603
        # A rank may still be aborted by gloo after all is done: what counts is the result.
        if not result.is_file():
            raise RuntimeError(f"the benchmark's ranks ended with status {status} and no result; see above.")
        rows: list[Row] = json.loads(result.read_text())
        return rows


def account(part: str, worlds: Sequence[int], models: Sequence[str]) -> list[Row]:
    """Let all contenders be accounted for.

    Args:
        part: what to count, "comm" or "memory".
        worlds: numbers of ranks.
        models: names of cases.

    Returns:
        Rows.
    """
    rows: list[Row] = []
    for world in worlds:
        print(f"counting at {world} ranks ...", flush=True)
        rows += launch("account", world, ["--part", part, "--models", ",".join(models)])
    return rows


def own_loopback() -> list[str]:
    """Say how to run a command in a network namespace where nobody else sends.

    Returns:
        What to put before the command; empty where that is not permitted, so that others' traffic counts as well.
    """
    inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    tried = subprocess.run([*inside, "true"], capture_output=True, check=False)  # noqa: S603
    return inside if tried.returncode == 0 else []


def join() -> None:
    """Make this process a rank."""
    from distmuon.train import engine as engines

    engines.quiet_deepspeed()
    engines.join_ranks()


def leave(result: Path, rows: list[Row]) -> None:
    """Write the result and end this process.

    Args:
        result: the file; rank 0 writes it.
        rows: what it shall hold.
    """
    if dist.get_rank() == 0:
        result.write_text(json.dumps(rows))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # DeepSpeed on gloo sometimes aborts while the interpreter shuts down.
    os._exit(0)


def say(text: str) -> None:
    """Print on rank 0.

    Args:
        text: a line.
    """
    if dist.get_rank() == 0:
        print(text, flush=True)


def gathered(value: Any) -> list[Any]:
    """Collect a value of every rank; every rank must call it.

    Args:
        value: this rank's.

    Returns:
        By rank.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sent_bytes(work: Callable[[], object]) -> int:
    """Count what leaves through the loopback device; every rank must call it.

    Args:
        work: what to do meanwhile.

    Returns:
        Bytes of all ranks, with TCP's headers and acknowledgements; 0 where the system does not say.
    """
    dist.barrier()
    before = _sent()
    dist.barrier()
    work()
    dist.barrier()
    after = _sent()
    dist.barrier()
    return after - before


def _sent() -> int:
    lines = _DEVICES.read_text().splitlines() if _DEVICES.is_file() else []
    fields = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(fields[0][_SENT_FIELD]) if fields else 0
