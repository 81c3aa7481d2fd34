"""Processes that may die: forks of one prepared process, as one rank or as gloo ranks of their own."""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import _target

PRELOAD = ["tests.checkpoint.preloaded"]
"""What the prepared process has imported: a fork of it starts in milliseconds."""


@dataclass
class Answer:
    """How one process ended."""

    exitcode: int | None
    value: Any = None
    error: str = ""


def _body(target: str, rank: int, world: int, store: str, pipe: Connection, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if store:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        group_store = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=group_store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    module, name = target.split(":")
    try:
        answer = Answer(0, getattr(importlib.import_module(module), name)(rank, world, *args))
    except BaseException:
        answer = Answer(1, error=traceback.format_exc())
    pipe.send(answer)
    os._exit(answer.exitcode or 0)


def start(fn: Callable[..., Any], world: int, folder: str, *args: Any) -> list[tuple[BaseProcess, Connection]]:
    """Start ``fn(rank, world, *args)`` on ``world`` processes; more than one form a gloo group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = str(Path(folder) / "store") if world > 1 else ""
    started: list[tuple[BaseProcess, Connection]] = []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_body, args=(_target(fn), rank, world, store, theirs, args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, mine))
    return started


def collect(started: list[tuple[BaseProcess, Connection]], timeout: float = 60.0) -> list[Answer]:
    """Wait for all processes and end what is late; the exit code of a killed one is minus the signal."""
    deadline = time.monotonic() + timeout
    answers = []
    for process, pipe in started:
        answer = Answer(None)
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            try:
                answer = pipe.recv()
            except EOFError:
                answer = Answer(None)
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            answer = Answer(None, error="did not end in time")
        elif answer.exitcode is None:
            answer.exitcode = process.exitcode
        pipe.close()
        answers.append(answer)
    return answers


def run_forked(fn: Callable[..., Any], *args: Any, world: int = 1, timeout: float = 60.0) -> list[Answer]:
    """``start`` and ``collect``."""
    with tempfile.TemporaryDirectory() as folder:
        return collect(start(fn, world, folder, *args), timeout)


def values(answers: list[Answer]) -> list[Any]:
    """Results of processes that all ended well."""
    for answer in answers:
        assert answer.exitcode == 0, answer.error or f"exit code {answer.exitcode}"
    return [answer.value for answer in answers]
