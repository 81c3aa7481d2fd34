"""Names and order of checkpoint directories; every change on disk is durable before the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distmuon.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from distmuon.errors import CheckpointError

log = logging.getLogger(__name__)

LATEST = "LATEST"
_UNFINISHED = ".tmp-"
_REPLACED = ".tmp-replaced-by-"
_PRUNED = ".tmp-pruned"
# What saves that were killed may leave; other files in the directory are not ours to remove.
_DEBRIS = re.compile(r"LATEST\.tmp-\d+|.+\.tmp-(replaced-by-)?[0-9a-f]{12}|.+\.tmp-pruned")
# Longest name of a file in bytes, on the file systems of Linux.
_LONGEST_NAME = 255


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step_{step:08d}"


def check_name(name: str, step: int) -> None:
    """Make sure that a checkpoint may have a name.

    Args:
        name: of its directory; that of one about to be replaced counts as its own.
        step: of the checkpoint.

    Raises:
        CheckpointError: it is no plain file name, or that of another step.
    """
    name = name.partition(_REPLACED)[0]
    if not _is_name(name) or name == LATEST or _UNFINISHED in name:
        raise CheckpointError(f"a checkpoint cannot be called {name!r}; give it a plain directory name.")
    if re.fullmatch(r"step_\d{8,}", name) and name != step_name(step):
        raise CheckpointError(f"{name} cannot hold step {step}, whose name is {step_name(step)}.")


def begin(directory: Path, name: str, run: str, step: int, replace: bool) -> Path:
    """Make a fresh directory to write into, and remove what saves that were killed left.

    Args:
        directory: of all checkpoints.
        name: that the checkpoint will have.
        run: random name of this save.
        step: of this save.
        replace: whether a checkpoint of this name may be there.

    Returns:
        The fresh directory.

    Raises:
        CheckpointError: there is a checkpoint of this name that training went on from.
    """
    _clear(directory)
    if not replace:
        _check_new(directory, name, step)
    temporary = unfinished(directory, name, run)
    temporary.mkdir()
    return temporary


def unfinished(directory: Path, name: str, run: str) -> Path:
    """Where a checkpoint is while it is written.

    Args:
        directory: of all checkpoints.
        name: that the checkpoint will have.
        run: random name of the save.

    Returns:
        The path.
    """
    return directory / f"{name}{_UNFINISHED}{run}"


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other saves out of a directory; the lock goes away with the process.

    Args:
        directory: of all checkpoints; made if it is missing.

    Raises:
        CheckpointError: another save is writing there.
    """
    _make(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"another save is writing into {directory}; give each run its own directory.") from None
    except OSError as error:
        log.warning("%s cannot be locked against other saves: %s", directory, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Closing alone would leave the lock to processes that were forked in the meantime.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk.

    Args:
        path: the file.
        data: its content.
    """
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until a file or a directory is on disk.

    Args:
        path: what was written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, name: str) -> Path:
    """Give a complete directory its name.

    Args:
        temporary: the directory; everything in it is on disk.
        name: of the checkpoint.

    Returns:
        The checkpoint.
    """
    final = temporary.parent / name
    replaced = temporary.parent / f"{name}{_REPLACED}{temporary.name.rpartition('-')[2]}"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def point_at(checkpoint: Path) -> None:
    """Make a checkpoint the one that is loaded by default.

    Args:
        checkpoint: a published directory.
    """
    temporary = checkpoint.parent / f"{LATEST}{_UNFINISHED}{os.getpid()}"
    write_file(temporary, f"{checkpoint.name}\n".encode())
    temporary.replace(checkpoint.parent / LATEST)
    sync(checkpoint.parent)


def latest(directory: Path) -> Path | None:
    """The checkpoint to go on from.

    Args:
        directory: of all checkpoints.

    Returns:
        What LATEST names; if it names nothing that is there, the newest one; None if there is none.
    """
    pointer = directory / LATEST
    if pointer.is_symlink() or not pointer.is_file():
        newest = _newest(directory)
        if newest is not None:
            log.warning("%s is missing; taking %s, the newest checkpoint", pointer, newest.name)
        return newest
    with pointer.open("rb") as stream:
        name = stream.read(_LONGEST_NAME + 1).decode(errors="replace").strip()
    if _is_name(name):
        found = [directory / name, *directory.glob(f"{glob.escape(name)}{_REPLACED}*")]
        for path in found:
            # A save that was killed while it replaced this checkpoint has left it under another name.
            if path.is_dir():
                return path
    log.warning("%s names %.40r, which is not there; taking the newest checkpoint", pointer, name)
    return _newest(directory)


def prune(checkpoint: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the newest ones.

    Args:
        checkpoint: the one just written.
        step: of it; those of later steps are left alone.
        keep: how many whole ones to keep, this one among them.
    """
    directory = checkpoint.parent
    older = sorted((found for found in _readable(directory) if found[0].step < step), key=_step)
    whole = [path for manifest, path in older if _has_its_files(path, manifest)]
    kept = {*whole[max(0, len(whole) - keep + 1) :], latest(directory)}
    for path in whole:
        if path in kept:
            continue
        try:
            # Under another name first, so that half of it is never taken for a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f"{path.name}{_PRUNED}")))
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error)


def _make(directory: Path) -> None:
    """Make a directory that is still there after a power failure, and those above it."""
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)


def _clear(directory: Path) -> None:
    """Remove what killed saves left, and give a checkpoint back its name that one was about to replace."""
    for debris in sorted(directory.iterdir()):
        if not _DEBRIS.fullmatch(debris.name):
            continue
        name, replaced, _ = debris.name.rpartition(_REPLACED)
        if replaced and not (directory / name).exists():
            debris.rename(directory / name)
            continue
        log.warning("removing %s, which a save that did not end has left", debris)
        if debris.is_dir() and not debris.is_symlink():
            shutil.rmtree(debris)
        else:
            debris.unlink()


def _newest(directory: Path) -> Path | None:
    found = max(_readable(directory), default=None, key=_step)
    return None if found is None else found[1]


def _step(found: tuple[Manifest, Path]) -> int:
    return found[0].step


def _has_its_files(path: Path, manifest: Manifest) -> bool:
    """Whether every file of a checkpoint is there in its size."""
    files = manifest.files.items()
    return all((path / name).is_file() and (path / name).stat().st_size == file.bytes for name, file in files)


def _check_new(directory: Path, name: str, step: int) -> None:
    final = directory / name
    if not final.exists() and not final.is_symlink():
        return
    newest = latest(directory)
    # A save that was killed after its rename, or was rolled back behind, left it: nothing goes on from there.
    if newest is not None and newest != final and not final.is_symlink():
        try:
            if read_manifest(newest).step < step:
                return
        except CheckpointError:
            pass
    raise CheckpointError(f"{final} is there already; save under another step or directory, or remove it.")


def _readable(directory: Path) -> Iterator[tuple[Manifest, Path]]:
    """Manifest and path of each checkpoint whose manifest is whole."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if _UNFINISHED not in path.name and _is_checkpoint(path):
            try:
                manifest = read_manifest(path)
            except CheckpointError as error:
                log.warning("%s", error)
                continue
            yield manifest, path


def _is_name(name: str) -> bool:
    """Whether a text is the name of a file, and no path."""
    plain = bool(name) and Path(name).name == name and name not in (".", "..") and name.isprintable()
    return plain and len(name.encode()) <= _LONGEST_NAME


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / MANIFEST).exists()
