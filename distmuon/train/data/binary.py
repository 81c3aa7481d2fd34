"""Tokens the user prepared elsewhere: train.bin and val.bin with a meta.json, used where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distmuon.errors import DataError
from distmuon.train.data.config import SourceSpec

DTYPES = ("uint16", "uint32")
CHUNK_TOKENS = 1 << 24


def binary_files(spec: SourceSpec) -> list[Path]:
    """The files of a "bin:" source.

    Args:
        spec: the source; its target is train.bin or the directory that holds it.

    Returns:
        train.bin, val.bin, meta.json and, if there is one, tokenizer.json.

    Raises:
        DataError: one of them is missing.
    """
    target = Path(spec.target).expanduser().resolve()
    root = target if target.is_dir() else target.parent
    if target != root and target.name != "train.bin":
        raise DataError(f'data.source "{spec.text}" must name a train.bin or its directory; rename {target.name}.')
    for name, remedy in (
        ("train.bin", "put the training token ids there"),
        ("val.bin", "put the held-out token ids there"),
        ("meta.json", 'write e.g. {"dtype": "uint16", "vocab_size": 50257} to it'),
    ):
        if not (root / name).is_file():
            raise DataError(f'data.source "{spec.text}" has no {root / name}; {remedy}.')
    names = ["train.bin", "val.bin", "meta.json", "tokenizer.json"]
    return [root / name for name in names if (root / name).is_file()]


def link_binary(spec: SourceSpec, eos_token: str, staging: Path, progress: bool) -> dict[str, Any]:
    """Check a "bin:" source once and link its files into a cache entry, without copying them.

    Args:
        spec: the source.
        eos_token: end-of-document token of its tokenizer.json, if it has one.
        staging: the empty directory of the entry.
        progress: show a progress bar.

    Returns:
        The metadata of the entry.

    Raises:
        DataError: meta.json is wrong, or a file holds no whole tokens or ids outside the vocabulary.
    """
    files = {path.name: path for path in binary_files(spec)}
    dtype, vocab_size = _read_meta(files["meta.json"])
    counts: dict[str, Any] = {}
    for split in ("train", "val"):
        path = files[f"{split}.bin"]
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise DataError(f"{path} has {size} bytes, not whole {dtype} tokens; correct dtype in meta.json.")
        tokens = np.memmap(path, dtype=dtype, mode="r")
        largest = max(int(part.max()) for part in _chunks(tokens, f"checking {path.name}", progress))
        if largest >= vocab_size:
            raise DataError(
                f"{path} holds token id {largest}, but meta.json says vocab_size {vocab_size}; "
                "correct dtype or vocab_size in meta.json."
            )
        counts[split] = {"documents": None, "tokens": tokens.size, "bytes": None, "bytes_per_token": None}
    for name in files.keys() - {"meta.json"}:
        (staging / name).symlink_to(files[name])
    return {
        "source": [spec.text],
        "tokenizer": str(files["tokenizer.json"]) if "tokenizer.json" in files else None,
        "split_rule": ["given: train.bin and val.bin"],
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "eos_token": eos_token,
        **counts,
    }


def _chunks(tokens: np.memmap[Any, np.dtype[Any]], desc: str, progress: bool) -> Iterator[Any]:
    starts = range(0, tokens.size, CHUNK_TOKENS)
    for start in tqdm(starts, desc=desc, disable=not progress or len(starts) == 1):
        yield tokens[start : start + CHUNK_TOKENS]


def _read_meta(path: Path) -> tuple[np.dtype[Any], int]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        dtype, vocab_size = meta["dtype"], meta["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} must hold "dtype" and "vocab_size" ({type(error).__name__}: {error}); '
            'write e.g. {"dtype": "uint16", "vocab_size": 50257}.'
        ) from None
    if dtype not in DTYPES:
        raise DataError(f'{path} has dtype {dtype!r}; legal are "uint16" and "uint32".')
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise DataError(f"{path} has vocab_size {vocab_size!r}; give a whole number of at least 1.")
    return np.dtype(dtype), vocab_size
