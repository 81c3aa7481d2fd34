"""One run from its configuration to its report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from distmuon.errors import ConfigError
from distmuon.train import engine as engines
from distmuon.train.config import RunConfig
from distmuon.train.data import TokenData, prepare, validation_ids
from distmuon.train.loop import Trainer
from distmuon.train.metrics import ErrorRecord, MetricsWriter
from distmuon.train.model import MoETransformer
from distmuon.train.preemption import StopRequest
from distmuon.train.previous import Previous, find_previous
from distmuon.train.report import write_report

log = logging.getLogger(__name__)


def train(run: RunConfig, local_rank: int = 0, world: int = 1) -> Path:
    """Train as configured; every rank calls it.

    Everything that can be wrong is checked before ranks wait for each other and before anything is written.

    Args:
        run: the configuration.
        local_rank: this process's number on its machine; only number 0 shows progress of the preparation.
        world: number of ranks.

    Returns:
        The run's directory with ``metrics.jsonl``, ``loss.png``, ``report.html`` and ``checkpoints``.

    Raises:
        DistMuonError: a setting or source is not usable, or training cannot go on.
    """
    run.accumulation(world)
    before = find_previous(run)
    if before.complete:
        log.info("%s is complete; nothing is left to do", run.directory)
        return run.directory
    # From here on, so that a job stopped while it starts stops after its first update.
    with StopRequest() as stop:
        _train(run, before, local_rank, stop)
    return run.directory


def _train(run: RunConfig, before: Previous, local_rank: int, stop: StopRequest) -> None:
    data = prepare(run.data, progress=local_rank == 0)
    _check_data(run, data)
    engines.quiet_deepspeed()
    engines.join_ranks(run.timeout_s)
    _check_shared(run, before)
    metrics = MetricsWriter(run.directory, append=before.started) if dist.get_rank() == 0 else None
    trainer: Trainer | None = None
    try:
        autocast = torch.bfloat16 if run.precision.autocast == "bfloat16" else None
        model = MoETransformer(run.model, data.vocab_size, run.seed, autocast)
        engine = engines.build_engine(run, model)
        trainer = Trainer(run, data, engine, metrics)
        if before.started:
            trainer.resume()
        with _matmul_precision(run.precision.matmul):
            trainer.fit(stop)
        if dist.get_rank() == 0:
            write_report(run.directory)
        dist.barrier()
    except Exception as error:
        # The rank that failed may not be the one that records, so it appends a line of its own.
        with MetricsWriter(run.directory, append=True) as writer:
            message = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
            writer.write(ErrorRecord(step=trainer.done if trainer else 0, message=message))
        raise
    finally:
        if metrics:
            metrics.close()


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products for the length of a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_shared(run: RunConfig, before: Previous) -> None:
    """Make sure that all ranks see the same directory."""
    started = torch.tensor([float(before.started)], device=engines.device())
    dist.all_reduce(started)
    if started.item() not in (0, dist.get_world_size()):
        raise ConfigError(
            f"out = {run.out!r} holds this run on {int(started)} of {dist.get_world_size()} ranks; "
            "use a directory that all nodes share."
        )


def _check_data(run: RunConfig, data: TokenData) -> None:
    validation_ids(data.val.size, run.model.context, run.evaluation.sequences)
