"""Saving a checkpoint, now or behind the training that goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distmuon.checkpoint.names import Rename
from distmuon.checkpoint.snapshot import Optimizer, Snapshot, take
from distmuon.checkpoint.together import host_group, new_group, ranks_of, same, settle, together
from distmuon.checkpoint.write import Target, make_target, write
from distmuon.comm import Group

log = logging.getLogger(__name__)


def save(
    directory: Path | str,
    model: nn.Module,
    optimizer: Optimizer | None,
    step: int,
    extra: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    keep: int | None = None,
    rename: Rename = None,
    rng: bool = True,
    point: bool = True,
    frozen: bool = True,
    replace: bool = False,
) -> Path:
    """Save model, optimizer and random state; every rank of the optimizer's group calls it.

    Args:
        directory: of all checkpoints of the run, on a file system that all ranks share.
        model: its parameters and persistent buffers are saved, whatever the optimizer.
        optimizer: DistMuon, Muon or None.
        step: number of the optimizer step, at least 0.
        extra: what else to keep, as JSON values: epoch, position in the data, the scheduler's state. That of the first
            rank is kept.
        name: of the checkpoint's directory; None means ``step_%08d``.
        keep: remove all but this many of the newest whole checkpoints; None keeps all.
        rename: from names in this rank's model to names that are the same tensor's on all ranks; needed where
            expert-parallel ranks give different experts one name.
        rng: whether to keep the random number generators of torch, CUDA, Python and NumPy.
        point: whether ``load`` takes this checkpoint by default.
        frozen: whether to keep parameters that do not require a gradient.
        replace: whether a checkpoint of this name may be there, which is given up when the new one is whole.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: a rank could not write; raised on every rank, and the checkpoint before stays the latest.
    """
    group = host_group(ranks_of(optimizer))
    target = together(group, "save", lambda: make_target(directory, step, extra, name, keep, point, replace))
    return write(target, _take(target, group, model, optimizer, rename, rng, frozen), group)


class Saver:
    """Saves in the background, on a process group of its own; every rank makes one.

    Args:
        directory: as for ``save``.
        model: the model.
        optimizer: its optimizer.
        keep: as for ``save``.
        rename: as for ``save``.
    """

    def __init__(
        self,
        directory: Path | str,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        keep: int | None = None,
        rename: Rename = None,
    ) -> None:
        self._where = Path(directory)
        self._model, self._optimizer, self._keep, self._rename = model, optimizer, keep, rename
        self._group = new_group(ranks_of(optimizer))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, extra: Mapping[str, Any] | None = None, *, name: str | None = None, background: bool = True
    ) -> None:
        """Copy the state to the host and write it behind the training that goes on.

        Args:
            step, extra, name: as for the function ``save``.
            background: False waits until it is written.

        Raises:
            CheckpointError: this save could not be begun, or the one before failed.
        """
        together(self._group, "write the checkpoint before", self.wait)
        target = together(self._group, "save", lambda: make_target(self._where, step, extra, name, self._keep))
        snapshot = _take(target, self._group, self._model, self._optimizer, self._rename)
        # No daemon: an interpreter that ends still finishes what it began to save.
        self._thread = threading.Thread(target=self._write, args=(target, snapshot), name="distmuon-checkpoint")
        self._thread.start()
        if not background:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is written.

        Raises:
            CheckpointError: it failed; the checkpoint before is still the latest.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # Whatever ends the block says more than a failure that may follow from it.
            self._thread.join()

    def _write(self, target: Target, snapshot: Snapshot) -> None:
        try:
            write(target, snapshot, self._group)
        except BaseException as error:
            # Also logged, since nobody may come to ask.
            log.error("a checkpoint could not be saved: %s", error)
            self._error = error


def _take(
    target: Target,
    group: Group,
    model: nn.Module,
    optimizer: Optimizer | None,
    rename: Rename,
    rng: bool = True,
    frozen: bool = True,
) -> Snapshot:
    """Agree on what to save, and copy it."""
    same(group, "what to save", (target.name, target.step, target.keep, target.point, target.replace, rng, frozen))
    settle(optimizer)
    return together(group, "copy its state", lambda: take(model, optimizer, group, rename, rng, frozen))
