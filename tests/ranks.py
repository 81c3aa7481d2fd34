"""Ranks for tests: threads for logic, one long-lived gloo process pool for what threads cannot show."""

# mypy: disable-error-code="no-untyped-call, attr-defined, arg-type"

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

ROOT = Path(__file__).resolve().parent.parent


class RankError(AssertionError):
    """A rank raised or did not answer; the message holds its traceback."""


class ThreadGroup(threaded.ProcessLocalGroup):
    """Threaded process group that can be watched, and whose reduce-scatter may write into its own input.

    ``observer(collective, group, args)`` is called on the rank's thread before each collective it issues.
    """

    observer: Callable[[str, ThreadGroup, tuple[Any, ...]], None] | None = None
    _inside = threading.local()

    def reduce_scatter_single(self, output_tensor: Any, input_tensor: Any, opts: Any = None) -> Any:
        """Reduce-scatter from a copy of the input."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        return super().reduce_scatter_single(output_tensor, input_tensor.clone(), opts)


COLLECTIVES = (
    *("reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter"),
    *("all_gather_single", "all_gather_single_coalesced", "allgather", "allreduce", "allreduce_coalesced"),
    *("all_to_all_single", "alltoall", "broadcast", "scatter", "gather"),
)


def _watched(name: str) -> Callable[..., Any]:
    """The collective, announced to the observer unless another collective is built on it."""
    issue = getattr(ThreadGroup, name)

    def collective(self: ThreadGroup, *args: Any, **kwargs: Any) -> Any:
        outermost = not getattr(ThreadGroup._inside, "busy", False)
        if outermost and ThreadGroup.observer is not None:
            ThreadGroup.observer(name, self, args)
        ThreadGroup._inside.busy = True
        try:
            return issue(self, *args, **kwargs)
        finally:
            ThreadGroup._inside.busy = not outermost

    return collective


for _name in COLLECTIVES:
    setattr(ThreadGroup, _name, _watched(_name))


def _create(store: Any, rank: int, world: int, timeout: timedelta) -> ThreadGroup:
    group = ThreadGroup(rank, world)
    dist.distributed_c10d._store_based_barrier(rank, store, "", world, timeout)
    return group


dist.Backend.register_backend("threads", _create, devices=["cpu"])


def run_threads(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 40.0) -> list[Any]:
    """Run ``fn(rank, world, *args)`` on ``world`` threaded ranks and return their results in rank order.

    A rank that raises ends the others. To look at an error every rank should raise, catch it inside ``fn``.
    """
    results: list[Any] = [None] * world
    failures: list[tuple[int, str]] = []
    store = dist.HashStore()

    def body(rank: int) -> None:
        dist.init_process_group("threads", rank=rank, world_size=world, store=store)
        try:
            results[rank] = fn(rank, world, *args)
        except SystemExit:  # this rank was ended because another one failed
            pass
        except BaseException as error:
            failures.append((rank, traceback.format_exc()))
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world)]
    deadline = time.monotonic() + timeout
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late:
            threaded.ProcessLocalGroup.exception_handle(TimeoutError())
            for thread in threads:
                thread.join(2.0)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        raise RankError("\n".join(f"rank {rank} of {world}:\n{text}" for rank, text in failures))
    if late:
        raise RankError(f"ranks {late} of {world} did not finish within {timeout} s")
    return results


def _target(fn: Callable[..., Any]) -> str:
    """Import path of a module-level function, from its file, so that it is the same in every process."""
    path = Path(fn.__code__.co_filename).resolve().relative_to(ROOT).with_suffix("")
    return ".".join(path.parts) + ":" + fn.__qualname__


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Body of one pool process: answer calls until told to stop."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world)}
    groups[world] = dist.group.WORLD
    pipe.send((True, "ready"))
    while (call := pipe.recv()) is not None:
        target, size, args = call
        try:
            module, name = target.split(":")
            answer = (True, getattr(importlib.import_module(module), name)(rank, size, groups[size], *args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    pipe.send((True, "stopped"))
    dist.barrier()
    os._exit(0)


class RankPool:
    """``world`` gloo processes, started at the first call and used by all later ones.

    ``run(world, fn, *args)`` calls the module-level ``fn(rank, world, group, *args)`` on the first ``world``
    processes with a group of exactly those ranks. Arguments and results travel by pipe: keep them plain.
    After a rank failed to answer, or raised while another waited for it, the processes are replaced.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, world: int, fn: Callable[..., Any], *args: Any, timeout: float = 40.0) -> list[Any]:
        """Results of all ranks in rank order; RankError with the traceback of every rank that failed."""
        self._start()
        for pipe in self._pipes[:world]:
            pipe.send((_target(fn), world, args))
        answers = self._collect(self._pipes[:world], timeout)
        bad = {rank: text for rank, (ok, text) in answers.items() if not ok}
        late = [rank for rank in range(world) if rank not in answers]
        if bad or late:
            self._kill()
            texts = [f"rank {rank} of {world}:\n{text}" for rank, text in sorted(bad.items())]
            texts += [f"rank {rank} of {world} did not answer" for rank in late]
            raise RankError("\n".join(texts))
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        """Let the processes leave together; end the ones that do not."""
        with contextlib.suppress(OSError):
            for pipe in self._pipes:
                pipe.send(None)
            self._collect(self._pipes, 10.0)
        for process in self._processes:
            process.join(10.0)
        self._kill()

    def _start(self) -> None:
        if self._processes:
            return
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(mine)
            theirs.close()
        if len(self._collect(self._pipes, 120.0)) < self.world:
            self._kill()
            raise RankError("the process pool did not start within 120 s")

    def _collect(self, pipes: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
        """One answer per pipe; once a rank failed, the others get 5 s more."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, f"process exited with {self._processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 5.0)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(5.0)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
