"""The manifest of a checkpoint: what is in it and what every file must hash to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from distmuon.errors import CheckpointError
from distmuon.strict import Strict

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
# JSON of a model with 100,000 tensors is tens of MB; a larger file is not one of ours.
_LARGEST_JSON = 2**28
_READ_BYTES = 2**20

AnyDType = Literal["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
Setting = bool | int | float | str | None
Plain = TypeVar("Plain", bound=Strict)


class Chunk(Strict):
    """A rectangle of a tensor and the file that has it, under the tensor's name."""

    file: str
    offsets: tuple[int, ...] = Field(strict=False)
    sizes: tuple[int, ...] = Field(strict=False)


class StoredTensor(Strict):
    """A tensor, in one or more chunks."""

    shape: tuple[int, ...] = Field(strict=False)
    dtype: AnyDType
    chunks: tuple[Chunk, ...] = Field(strict=False)


class StoredFile(Strict):
    """What a file must be."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Strict):
    """Everything a checkpoint consists of."""

    schema_number: int
    step: int = Field(ge=0)
    run: str
    """Random name of the save, equal on all ranks."""
    world_size: int = Field(ge=1)
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]


class ParameterState(Strict):
    """What of a parameter is not a tensor."""

    group: int = Field(ge=0)
    updates: int = Field(ge=0)


class State(Strict):
    """What of the training state is not a tensor."""

    step: int = Field(ge=0)
    groups: tuple[dict[str, Setting | list[Setting]], ...] = Field(strict=False)
    """Settings of each param group."""
    parameters: dict[str, ParameterState]
    """Param group and number of updates by name."""
    extra: dict[str, Any]
    """What the caller keeps in the checkpoint."""


def encode(manifest: Manifest) -> bytes:
    """Write a manifest in its one canonical form.

    Args:
        manifest: the manifest.

    Returns:
        JSON of the manifest and of the SHA-256 of its JSON.
    """
    return _sealed(manifest.model_dump(mode="json"))


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and make sure that not one bit of it changed.

    Args:
        directory: of the checkpoint.

    Returns:
        The manifest, every name, size and chunk of it plausible.

    Raises:
        CheckpointError: there is none, it was changed, or it is of a newer schema.
    """
    path = directory / MANIFEST
    data = read_bytes(path)
    table = parse_json(path, data)
    body = table.get("body") if isinstance(table, dict) else None
    if not isinstance(body, dict) or not _is_sealed(data, body):
        raise CheckpointError(f"{path} is damaged: its content does not have the hash that it names.")
    schema = body.get("schema_number")
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema!r} and this release reads schema {SCHEMA}; upgrade distmuon.")
    manifest = _validated(Manifest, body, path)
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, ".", ".."):
            raise CheckpointError(f"{path} lists {name!r}, which is not a plain file name.")
    for name, tensor in manifest.tensors.items():
        _check_chunks(path, name, tensor, manifest)
    return manifest


def read_state(directory: Path) -> State:
    """Read what is not a tensor.

    Args:
        directory: of a checkpoint whose files were checked.

    Returns:
        The state.

    Raises:
        CheckpointError: it is not what this release writes.
    """
    path = directory / STATE
    return _validated(State, parse_json(path, read_bytes(path)), path)


def file_size(path: Path) -> int:
    """Bytes of a file.

    Args:
        path: a regular file, not a link.

    Returns:
        Its size.

    Raises:
        CheckpointError: it is missing, or not a regular file.
    """
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{path} is missing or not a regular file; the checkpoint is not whole, load an older one."
        )
    return path.stat().st_size


def describe_file(path: Path) -> StoredFile:
    """Measure and hash a file without holding it in memory.

    Args:
        path: a regular file, not a link.

    Returns:
        Its size and SHA-256.

    Raises:
        CheckpointError: it is missing, or not a regular file.
    """
    size, digest = file_size(path), hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return StoredFile(bytes=size, sha256=digest.hexdigest())


def read_bytes(path: Path) -> bytes:
    """Read a small file.

    Args:
        path: a regular file, not a link.

    Returns:
        Its content.

    Raises:
        CheckpointError: it is missing, not a regular file, or too large to be ours.
    """
    size = file_size(path)
    if size > _LARGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes; at most {_LARGEST_JSON} are legal.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def parse_json(path: Path, data: bytes) -> Any:
    """Parse JSON that anybody may have written.

    Args:
        path: to name in the error.
        data: the text.

    Returns:
        What it says.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        # A number that is not finite is no JSON, and would not be written again as it was read.
        return json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} ({error}).") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number


def canonical(value: Any) -> bytes:
    """The one form in which JSON is written here: sorted, without spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _is_sealed(data: bytes, body: Mapping[str, Any]) -> bool:
    try:
        return data == _sealed(body)
    except (ValueError, RecursionError):
        return False


def _sealed(body: Mapping[str, Any]) -> bytes:
    return canonical({"body": body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def _validated(model: type[Plain], table: Any, path: Path) -> Plain:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f'{path} is not legal at "{place}": {problem["msg"]}.') from None


def _check_chunks(path: Path, name: str, tensor: StoredTensor, manifest: Manifest) -> None:
    """Make sure that chunks are consecutive rows that make up the whole tensor."""
    width = math.prod(tensor.shape[1:])
    if any(size < 0 for size in tensor.shape) or math.prod(max(1, size) for size in tensor.shape) >= 2**48:
        raise CheckpointError(f'{path} gives "{name}" the shape {tensor.shape}.')
    end = 0
    for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets):
        if chunk.file not in manifest.files:
            raise CheckpointError(f'{path} has "{name}" in {chunk.file!r}, which it does not list.')
        if not tensor.shape:
            fits = chunk.offsets == chunk.sizes == () and end == 0
            end = 1
        else:
            fits = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) and chunk.sizes[0] > 0
            fits = fits and chunk.offsets == (end, *(0,) * (len(tensor.shape) - 1))
            fits = fits and chunk.sizes[1:] == tensor.shape[1:]
            end += chunk.sizes[0] if fits else 0
        if not fits:
            raise CheckpointError(f'{path} has chunks of "{name}" that do not make up its shape {tensor.shape}.')
    if end != (tensor.shape[0] if tensor.shape else 1) and (width or not tensor.shape):
        raise CheckpointError(f'{path} lacks rows of "{name}", whose shape is {tensor.shape}.')
