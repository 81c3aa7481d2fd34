"""What tests do to a checkpoint's files, and manifests that stay consistent with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "LATEST"


def step_directory(folder: Path, step: int) -> Path:
    """Where a step is saved."""
    return folder / f"step_{step:08d}"


def shards(path: Path) -> list[Path]:
    """The files that hold tensors."""
    return sorted(path.glob("shard-*.safetensors"))


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def debris(folder: Path) -> list[str]:
    """Everything beside whole steps and LATEST."""
    legal = {LATEST, *(path.name for path in folder.glob("step_????????"))}
    return sorted(name for name in os.listdir(folder) if name not in legal)


def canonical(value: Any) -> bytes:
    """JSON as the format prescribes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def body(path: Path) -> dict[str, Any]:
    """The manifest's content."""
    found: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())["body"]
    return found


def reseal(path: Path, change: Callable[[dict[str, Any]], object] = lambda body: None) -> None:
    """Change the manifest and give it the right hash of itself, with the sizes and hashes of the files as they are."""
    content = body(path)
    for name, entry in content["files"].items():
        data = (path / name).read_bytes() if (path / name).is_file() else b""
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(content)
    sealed = {"body": content, "sha256": hashlib.sha256(canonical(content)).hexdigest()}
    (path / MANIFEST).write_bytes(canonical(sealed))


def flip(file: Path, bit: int) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found, data[8 + length :]


def write_header(file: Path, table: dict[str, Any], data: bytes) -> None:
    """A safetensors file with any header."""
    text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def stored(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(File, key, tensor) of every shard, read without distmuon."""
    for shard in shards(path):
        with safe_open(shard, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                yield shard.name, key, opened.get_tensor(key)
