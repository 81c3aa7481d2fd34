"""Whether a checkpoint is whole, and its weights as one plain file; neither needs a model or other ranks."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmuon.checkpoint.directory import check_name, latest, step_name, sync
from distmuon.checkpoint.manifest import (
    MANIFEST,
    STATE,
    SUFFIX,
    Manifest,
    State,
    describe_file,
    file_size,
    read_manifest,
    read_state,
)
from distmuon.checkpoint.store import Request, read_tensors
from distmuon.errors import CheckpointError

Check = Literal["full", "size"]

_REMEDY = "load an older checkpoint with step=N, or remove this one"

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
}


class Contents(NamedTuple):
    """What a checkpoint has."""

    path: Path
    manifest: Manifest
    state: State

    @property
    def step(self) -> int:
        """Number of the optimizer step."""
        return self.manifest.step

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return self.manifest.world_size

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.manifest.tensors.items()}


def verify(path: Path | str, check: Check = "full") -> Contents:
    """Make sure that a checkpoint is whole.

    Args:
        path: of a checkpoint, or of a directory of checkpoints, of which the latest is taken.
        check: "full" reads and hashes every file, "size" looks at sizes and headers only.

    Returns:
        What it has.

    Raises:
        CheckpointError: names the file that is missing, changed or not ours.
    """
    found = resolve(Path(path))
    manifest = read_manifest(found)
    check_files(found, manifest, check)
    state = read_state(found)
    contents = Contents(found, manifest, state)
    check_state(contents)
    return contents


def resolve(path: Path, step: int | None = None, name: str | None = None) -> Path:
    """Find the checkpoint that a path means.

    Args:
        path: of a checkpoint or of a directory of checkpoints.
        step: which one of the directory; None means the latest.
        name: of the checkpoint in the directory, instead of a step.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: there is none.
    """
    if step is not None and name is not None:
        raise CheckpointError(f"step = {step} and name = {name!r} are both given; give one of them.")
    if step is not None or name is not None:
        found: Path | None = path / (step_name(step) if name is None and step is not None else str(name))
    else:
        found = path if (path / MANIFEST).exists() else latest(path)
    if found is None or found.is_symlink() or not found.is_dir() or not (found / MANIFEST).exists():
        raise CheckpointError(f"{found or path} holds no checkpoint; a checkpoint is a directory with a {MANIFEST}.")
    return found


def check_files(path: Path, manifest: Manifest, check: Check, share: tuple[int, int] = (0, 1)) -> None:
    """Compare files with the manifest.

    Args:
        path: of the checkpoint.
        manifest: what they must be.
        check: "full" or "size".
        share: this rank and the number of ranks, if they share the work.

    Raises:
        CheckpointError: names the first file that differs.
    """
    if check not in ("full", "size"):
        raise CheckpointError(f'check = {check!r} is not legal: it must be "full" or "size".')
    present = {entry.name for entry in path.iterdir()}
    for name in sorted(present - manifest.files.keys() - {MANIFEST}):
        raise CheckpointError(f"{path / name} does not belong to the checkpoint; remove it if you know what it is.")
    if STATE not in manifest.files:
        raise CheckpointError(f"{path / MANIFEST} does not list {STATE}.")
    rank, ranks = share
    for name, stored in sorted(manifest.files.items())[rank::ranks]:
        size = file_size(path / name)
        if size != stored.bytes:
            raise CheckpointError(
                f"{path / name} has {size} bytes and should have {stored.bytes}; load an older checkpoint."
            )
        if check == "full" and describe_file(path / name) != stored:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the manifest's; {_REMEDY}.")
        if name != STATE:
            _check_header(path / name, manifest)


def check_state(contents: Contents) -> None:
    """Make sure that name, settings and tensors belong together.

    Args:
        contents: of a checkpoint.

    Raises:
        CheckpointError: it does not.
    """
    path, manifest, state = contents
    check_name(path.name, manifest.step)
    if state.step != manifest.step:
        raise CheckpointError(f"{path / STATE} is of step {state.step} and the manifest of step {manifest.step}.")
    for name in state.parameters:
        if f"weight/{name}" not in manifest.tensors and f"first_moment/{name}" in manifest.tensors:
            raise CheckpointError(f'{path / STATE} has settings of "{name}", whose weights are missing.')


def export(path: Path | str, out: Path | str) -> Path:
    """Write the weights and buffers of a checkpoint to one safetensors file, under the model's own names.

    Args:
        path: of a checkpoint, or of a directory of checkpoints, of which the latest is taken.
        out: the file; must not exist.

    Returns:
        The file.

    Raises:
        CheckpointError: the checkpoint is not whole, or the file exists or cannot be written.
    """
    contents, out = verify(path), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} is there already; choose another name.")
    tensors: dict[str, Tensor] = {}
    requests = []
    for key, (dtype, shape) in contents.tensors.items():
        section, _, name = key.partition("/")
        if section in ("weight", "buffer"):
            if name in tensors:
                raise CheckpointError(f'a weight and a buffer are both called "{name}".')
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            requests.append(Request(key, (0,) * len(shape), tensors[name]))
    read_tensors(contents.path, contents.manifest, requests)
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        save_file(tensors, str(temporary), metadata={"format": "pt", "step": str(contents.step)})
        sync(temporary)
        temporary.replace(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{out} cannot be written: {error}.") from None
    return out


def _check_header(path: Path, manifest: Manifest) -> None:
    """Make sure that a file has the chunks that the manifest says, and nothing else."""
    wanted = {
        name: (tensor.dtype, list(chunk.sizes))
        for name, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == path.name
    }
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path} is not a {SUFFIX} file.")
    try:
        with safe_open(str(path), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            found = {
                name: (_DTYPES.get(part.get_dtype(), "?"), list(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a legal safetensors file: {error}.") from None
    if found != wanted:
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(f'{path} has another "{different[0]}" than the manifest says.')
