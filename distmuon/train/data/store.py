"""The cache of prepared tokens: one directory per recipe, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
from filelock import FileLock

from distmuon.errors import DataError
from distmuon.train.data.tokenizer import TextTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1
META = "meta.json"
Tokens = np.memmap[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TokenData:
    """Prepared tokens of both splits, memory-mapped read-only, and what is known about them."""

    root: Path
    """Directory that holds train.bin, val.bin, tokenizer.json and meta.json."""
    meta: dict[str, Any]
    """Source, tokenizer, split rule, hashes; documents, tokens, bytes, bytes per token of each split."""
    train: Tokens
    """Training token ids, uint16 or uint32 [tokens]."""
    val: Tokens
    """Held-out token ids, uint16 or uint32 [tokens]."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.meta["vocab_size"])

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per held-out token, to turn nats per token into bits per byte; None if unknown."""
        value = self.meta["val"]["bytes_per_token"]
        return None if value is None else float(value)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Turn token ids into text.

        Args:
            ids: token ids, e.g. a list, array or one-dimensional tensor.

        Returns:
            The text, end-of-document tokens included.

        Raises:
            DataError: the data came without a tokenizer.
        """
        return self._tokenizer.decode([int(i) for i in ids])

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        path = self.root / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{self.meta['source'][0]} has no tokenizer; put a tokenizer.json next to train.bin.")
        return load_tokenizer(path.read_text(encoding="utf-8"), self.meta["eos_token"], str(path))


def cached(root: Path, recipe: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> TokenData:
    """Open the entry of a recipe, building it first if it is missing or damaged.

    Args:
        root: cache directory.
        recipe: JSON values that determine the content.
        build: writes the files of the entry into an empty directory and returns its metadata.

    Returns:
        The tokens.

    Raises:
        DataError: the cache cannot be written, or ``build`` raises it.
    """
    text = json.dumps({"format": FORMAT, **recipe}, sort_keys=True)
    key = hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
    entry = root / key
    found = load(entry)
    if found is not None:
        return found
    staging = root / f"{key}.{uuid.uuid4().hex}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The lock saves work when every rank prepares at once; the rename below keeps the entry whole
        # even where the file system has no locks.
        with FileLock(root / f"{key}.lock"):
            found = load(entry)
            if found is not None:
                return found
            staging.mkdir()
            meta = {**build(staging), "format": FORMAT, "key": key}
            meta["files"] = {path.name: _fingerprint(path) for path in sorted(staging.iterdir())}
            (staging / META).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            publish(staging, entry)
    except OSError as error:
        raise DataError(
            f"the token cache {root} cannot be written ({error}); "
            "set data.cache_dir to a writable directory with enough space."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = load(entry)
    if found is None:
        raise DataError(f"{entry} changed while it was being written; check the disk and run again.")
    return found


def load(entry: Path) -> TokenData | None:
    """Open a cache entry.

    Args:
        entry: its directory.

    Returns:
        The tokens, or None if the entry is missing or its files are not what its meta.json says.
    """
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / META).read_text(encoding="utf-8"))
        sizes = {name: (entry / name).stat().st_size for name in meta["files"]}
        damaged = [name for name, size in sizes.items() if size != meta["files"][name]["bytes"]]
        if damaged:
            raise ValueError(f"{', '.join(damaged)} changed size")
        dtype = np.dtype(meta["dtype"])
        train, val = (np.memmap(entry / f"{split}.bin", dtype=dtype, mode="r") for split in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("token cache entry %s is damaged (%s); rebuilding it", entry, error)
        return None
    return TokenData(entry, meta, train, val)


def publish(staging: Path, entry: Path) -> None:
    """Move a finished entry into place; an intact entry that got there first stays.

    Args:
        staging: the finished directory; gone afterwards.
        entry: where it belongs.
    """
    try:
        os.rename(staging, entry)
        return
    except OSError:
        if not entry.exists():
            raise
    if load(entry) is not None:
        shutil.rmtree(staging)
        return
    damaged = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    os.rename(entry, damaged)
    os.rename(staging, entry)
    shutil.rmtree(damaged)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
