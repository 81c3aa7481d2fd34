"""The ranks of the link benchmark as processes, and how the parent talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from distmuon.benchmarks.namespaces import INTERFACE, Network

_PORT = "29500"
WORKER = (sys.executable, "-m", "distmuon.benchmarks.links_worker")
_LAST_LINES = 15
_GRACE_SECONDS = 5


class Ranks:
    """Processes that answer JSON lines, all asked at once.

    Args:
        processes: one a rank.
        logs: where their standard errors go.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[str]], logs: Sequence[IO[str]]) -> None:
        self._processes = processes
        self._logs = logs

    def all(self, **message: Any) -> list[Any]:
        """Ask every rank the same.

        Args:
            **message: the first one is for the constructor of a Rank, later ones name its method ("do").

        Returns:
            The answers, by rank.

        Raises:
            RuntimeError: a rank has ended; the text holds the end of what it said.
        """
        with contextlib.suppress(BrokenPipeError):
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
        return [self._answer(rank) for rank in range(len(self._processes))]

    def _answer(self, rank: int) -> Any:
        output = self._processes[rank].stdout
        assert output is not None
        line = output.readline()
        if not line:
            self._logs[rank].seek(0)
            said = "".join(self._logs[rank].readlines()[-_LAST_LINES:])
            raise RuntimeError(f"rank {rank} has ended:\n{said}")
        return json.loads(line)


@contextlib.contextmanager
def started(network: Network, command: Sequence[str] = WORKER) -> Iterator[Ranks]:
    """Start a process in every namespace of a network, and end them all.

    Args:
        network: the network.
        command: what to start.

    Yields:
        The ranks, which wait for their first message.
    """
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        stack.callback(_end, processes)
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(network.ranks)]
        for rank, log in enumerate(logs):
            processes.append(
                subprocess.Popen(  # noqa: S603
                    network.inside(rank, command),
                    env={**os.environ, **environment(network, rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    # Ctrl-C is for the parent, which ends them.
                    start_new_session=True,
                )
            )
        yield Ranks(processes, logs)


def environment(network: Network, rank: int) -> dict[str, str]:
    """What a rank finds in its environment.

    Args:
        network: the network.
        rank: the rank.

    Returns:
        Variables.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(network.ranks),
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": _PORT,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # DeepSpeed compiles its Muon with inductor, which takes minutes on a CPU and moves no bytes.
        "TORCHDYNAMO_DISABLE": "1",
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    }


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
