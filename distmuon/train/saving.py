"""Checkpoints of a run: DistMuon's own, or DeepSpeed's where the optimizer is one of DeepSpeed's."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from distmuon.checkpoint import Saver
from distmuon.dist_muon import DistMuon
from distmuon.ds.checkpoints import engine_state, expert_names
from distmuon.errors import CheckpointError
from distmuon.train.config import CheckpointConfig

log = logging.getLogger(__name__)


class Checkpoints(Protocol):
    """Where a run is saved to."""

    def save(self, updates: int, last: bool) -> None:
        """Save the engine after a number of updates.

        Args:
            updates: finished so far.
            last: whether training ends with it: it is waited for then, and a failure is an error.
        """


def checkpoints_of(engine: Any, directory: Path, config: CheckpointConfig) -> Checkpoints:
    """Choose how a run is saved; every rank calls it.

    Args:
        engine: the DeepSpeed engine.
        directory: of the checkpoints.
        config: how often and how.

    Returns:
        The checkpoints.
    """
    if isinstance(engine.optimizer, DistMuon):
        return OwnCheckpoints(engine, directory, config)
    return StockCheckpoints(engine, directory, config.keep)


def resume(engine: Any, directory: Path) -> int:
    """Continue from the newest checkpoint, if there is one.

    Args:
        engine: the DeepSpeed engine.
        directory: of the checkpoints.

    Returns:
        Number of updates that it was saved after.
    """
    path, state = engine.load_checkpoint(str(directory))
    return 0 if path is None else int(state["updates"])


class OwnCheckpoints:
    """Checkpoints of DistMuon, written while training goes on.

    Args:
        engine: with a DistMuon optimizer.
        directory: of the checkpoints.
        config: how often and how.
    """

    def __init__(self, engine: Any, directory: Path, config: CheckpointConfig) -> None:
        self._engine, self._background = engine, config.background
        names = expert_names(engine.module)
        self._saver = Saver(directory, engine.module, engine.optimizer, keep=config.keep, rename=names)

    def save(self, updates: int, last: bool) -> None:
        """Save; unless it is the last one, a failure is logged, since the checkpoint before is still whole.

        Args:
            updates: finished so far.
            last: whether training ends with it.

        Raises:
            CheckpointError: the last checkpoint could not be saved.
        """
        self._wait()
        try:
            state = engine_state(self._engine, {"updates": updates})
            self._saver.save(updates, state, background=self._background and not last)
        except CheckpointError as error:
            if last:
                raise
            _report(error)

    def _wait(self) -> None:
        """Learn how the save before went; the one to come makes up for it."""
        try:
            self._saver.wait()
        except CheckpointError as error:
            _report(error)


class StockCheckpoints:
    """Checkpoints of an optimizer of DeepSpeed's, in DeepSpeed's own format.

    Args:
        engine: the DeepSpeed engine.
        directory: of the checkpoints.
        keep: number of newest checkpoints that are kept.
    """

    def __init__(self, engine: Any, directory: Path, keep: int) -> None:
        self._engine, self._directory, self._keep = engine, directory, keep

    def save(self, updates: int, last: bool) -> None:
        """Save, then drop the oldest beyond those to keep.

        Args:
            updates: finished so far.
            last: without meaning here.
        """
        tag = f"update{updates:07d}"
        self._engine.save_checkpoint(str(self._directory), tag=tag, client_state={"updates": updates})
        dist.barrier()
        if dist.get_rank() == 0:
            for old in sorted(self._directory.glob("update*"))[: -self._keep]:
                shutil.rmtree(old)


def _report(error: CheckpointError) -> None:
    log.error("training goes on without a new checkpoint: %s", error)
