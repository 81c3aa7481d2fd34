"""The protocol of a save: a fresh directory, hashed, agreed on by all ranks, renamed, then pointed at."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distmuon.checkpoint import directory as directories
from distmuon.checkpoint.manifest import (
    MANIFEST,
    SCHEMA,
    STATE,
    Manifest,
    ParameterState,
    State,
    StoredFile,
    StoredTensor,
    canonical,
    describe_file,
    encode,
)
from distmuon.checkpoint.snapshot import Snapshot
from distmuon.checkpoint.store import own_files, write_tensors
from distmuon.checkpoint.together import together
from distmuon.comm import Group
from distmuon.errors import CheckpointError


class Target(NamedTuple):
    """Where and as what to save."""

    directory: Path
    name: str
    step: int
    extra: Mapping[str, Any]
    keep: int | None
    point: bool
    replace: bool


class Written(NamedTuple):
    """What one rank tells the one that writes the manifest."""

    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    parameters: dict[str, ParameterState]


def make_target(
    directory: Path | str,
    step: int,
    extra: Mapping[str, Any] | None,
    name: str | None,
    keep: int | None,
    point: bool = True,
    replace: bool = False,
) -> Target:
    """Check what the caller asks for.

    Args:
        directory, step, extra, name, keep, point, replace: as for ``save``.

    Returns:
        The target.

    Raises:
        CheckpointError: a value is out of range, or ``extra`` would not come back as it is.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step = {step!r} is not legal: it must be an integer of at least 0.")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise CheckpointError(f"keep = {keep!r} is not legal: it must be None or an integer of at least 1.")
    try:
        plain = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f'"extra" (client_state) must be JSON, with null for infinity: {error}.') from None
    if plain != _as_lists(extra or {}):
        raise CheckpointError('"extra" (client_state) must be JSON with text as keys; this would come back changed.')
    name = directories.step_name(step) if name is None else name
    directories.check_name(name, step)
    return Target(Path(directory), name, step, plain, keep, point, replace)


def _as_lists(value: Any) -> Any:
    """The value with lists in place of tuples, which JSON turns into lists."""
    if isinstance(value, Mapping):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write(target: Target, snapshot: Snapshot, group: Group) -> Path:
    """Write a snapshot; every rank calls it.

    Args:
        target: where to.
        snapshot: this rank's.
        group: all ranks, for tensors of the host.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: a rank failed; raised on every rank, and nothing of the save is left.
    """
    clock = group.traffic.clock
    clock.step = target.step
    with contextlib.ExitStack() as stack, clock("save"):
        first = group.rank == 0
        lock = directories.alone(target.directory)
        together(group, f"lock {target.directory}", lambda: stack.enter_context(lock) if first else None)
        return _write_alone(target, snapshot, group)


def _write_alone(target: Target, snapshot: Snapshot, group: Group) -> Path:
    """The steps of a save, each finished on all ranks before the next one begins."""
    first = group.rank == 0
    run = group.all_gather_text(uuid.uuid4().hex[:12])[0]
    final = target.directory / target.name
    temporary = directories.unfinished(target.directory, target.name, run)

    def on_first(what: str, action: Callable[[], object]) -> None:
        together(group, what, lambda: action() if first else None)

    try:
        on_first(
            f"begin {final}", lambda: directories.begin(target.directory, target.name, run, target.step, target.replace)
        )
        parts = snapshot.complete(group)
        tensors = together(group, "write its tensors", lambda: write_tensors(temporary, parts, group))
        written = together(group, "hash its files", lambda: _hash(temporary, tensors, snapshot, group.rank))
        everything = [json.loads(text) for text in group.all_gather_text(_to_json(written))]
        on_first("write the manifest", lambda: _describe(target, temporary, snapshot, run, everything))
        on_first("rename the checkpoint", lambda: directories.publish(temporary, target.name))
    except CheckpointError:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    on_first("finish the checkpoint", lambda: _finish(final, target))
    return final


def _hash(temporary: Path, tensors: dict[str, StoredTensor], snapshot: Snapshot, rank: int) -> Written:
    """Make what this rank wrote durable, and describe it."""
    files = {}
    for path in own_files(temporary, rank):
        directories.sync(path)
        files[path.name] = describe_file(path)
    directories.sync(temporary)
    return Written(tensors, files, snapshot.parameters)


def _to_json(written: Written) -> str:
    return json.dumps([{key: value.model_dump(mode="json") for key, value in table.items()} for table in written])


def _describe(target: Target, temporary: Path, snapshot: Snapshot, run: str, everything: list[Any]) -> None:
    """Write ``state.json`` and the manifest; rank 0 does."""
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, StoredFile] = {}
    parameters: dict[str, ParameterState] = {}
    for own_tensors, own_files_, own_parameters in everything:
        files |= {key: StoredFile.model_validate(table) for key, table in own_files_.items()}
        for name, table in own_parameters.items():
            parameters[name] = ParameterState.model_validate(table)
        for key, table in own_tensors.items():
            _merge(tensors, key, StoredTensor.model_validate(table))
    state = State(step=target.step, groups=tuple(snapshot.groups), parameters=parameters, extra=dict(target.extra))
    directories.write_file(temporary / STATE, canonical(state.model_dump(mode="json")))
    files[STATE] = describe_file(temporary / STATE)
    present = {path.name for path in temporary.iterdir()}
    if present != files.keys():
        raise CheckpointError(f"{temporary} has {sorted(present)} and should have {sorted(files)}.")
    manifest = Manifest(
        schema_number=SCHEMA, step=target.step, run=run, world_size=len(everything), tensors=tensors, files=files
    )
    directories.write_file(temporary / MANIFEST, encode(manifest))
    directories.sync(temporary)


def _merge(tensors: dict[str, StoredTensor], key: str, tensor: StoredTensor) -> None:
    """Add one rank's chunk of a tensor to those of the ranks before."""
    before = tensors.get(key)
    chunks = [*(before.chunks if before else ()), *tensor.chunks]
    tensors[key] = tensor.model_copy(update={"chunks": tuple(sorted(chunks, key=lambda chunk: chunk.offsets))})


def _finish(final: Path, target: Target) -> None:
    if target.point:
        directories.point_at(final)
    if target.keep is not None:
        directories.prune(final, target.step, target.keep)
