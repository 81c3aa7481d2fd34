"""One pass over each source into a spool file, then the document-level split and the mixture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distmuon.errors import DataError
from distmuon.train.data import sotu
from distmuon.train.data.config import DataConfig, SourceSpec
from distmuon.train.data.readers import (
    Document,
    matching_files,
    read_files,
    read_hf,
    read_jsonl,
    read_parquet,
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Spool:
    """The documents of one source, on disk, with what the split and the mixture need to know of each."""

    spec: SourceSpec
    path: Path
    ranks: npt.NDArray[np.uint64]
    """First 8 bytes of the sha256 of each text, [documents]; equal texts always share a split."""
    sizes: npt.NDArray[np.int64]
    """UTF-8 bytes of each text, [documents]."""
    held_out: Mask | None
    """Split given by the source itself, [documents]; None: split by ``ranks``."""
    skipped: int
    """Documents without text."""

    def texts(self, keep: Mask) -> Iterator[str]:
        """Read the chosen documents back.

        Args:
            keep: which documents, bool [documents].

        Yields:
            Their texts in source order.
        """
        with self.path.open(encoding="ascii") as lines:
            for line, wanted in zip(lines, keep, strict=True):
                if wanted:
                    yield json.loads(line)


def identity(spec: SourceSpec) -> list[Any]:
    """What tells two contents of one source apart without reading all of it.

    Args:
        spec: the source.

    Returns:
        JSON values: the corpus hash, or path, size and modification time of every file; a data set on
        the hub is identified by its name alone.

    Raises:
        DataError: the source is missing.
    """
    if spec.kind == "sotu":
        sotu.corpus_files()
        return [sotu.CORPUS_SHA256]
    if spec.kind == "hf":
        root = Path(spec.target.partition(":")[0]).expanduser()
        paths = sorted(path.resolve() for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
    else:
        paths = matching_files(spec.target)
    return [file_identity(path) for path in paths]


def file_identity(path: Path) -> list[Any]:
    """Path, bytes and modification time of a file.

    Args:
        path: an existing file.

    Returns:
        ``[path, bytes, nanoseconds]``.
    """
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _read(spec: SourceSpec, separator: str) -> Iterator[Document]:
    if spec.kind == "sotu":
        return sotu.read_sotu()
    if spec.kind == "files":
        return read_files(spec.target, separator)
    readers = {"jsonl": read_jsonl, "parquet": read_parquet, "hf": read_hf}
    return readers[spec.kind](spec.target, spec.field)


def fill(spec: SourceSpec, cfg: DataConfig, path: Path, progress: bool) -> Spool:
    """Read a source once and write its documents to a spool file.

    Args:
        spec: the source.
        cfg: gives ``max_docs`` and ``document_separator``.
        path: file to write.
        progress: show a progress bar.

    Returns:
        The spool.

    Raises:
        DataError: the source is missing or broken, or no document has text.
    """
    ranks: list[int] = []
    sizes: list[int] = []
    held_out: list[bool | None] = []
    skipped = 0
    fields: tuple[str, ...] = ("(none)",)
    documents = islice(_read(spec, cfg.document_separator), cfg.max_docs)
    with path.open("w", encoding="ascii") as spool:
        for document in tqdm(documents, desc=f"reading {spec.text}", unit="doc", disable=not progress):
            if not document.text:
                skipped, fields = skipped + 1, document.fields or fields
                continue
            try:
                raw = document.text.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f'data.source "{spec.text}" has a lone surrogate in document {len(ranks) + skipped}, '
                    "which is not Unicode text; repair the record."
                ) from None
            spool.write(json.dumps(document.text) + "\n")
            ranks.append(int.from_bytes(hashlib.sha256(raw).digest()[:8], "big"))
            sizes.append(len(raw))
            held_out.append(document.held_out)
    if not ranks:
        where = f'field "{spec.field}" of ' if spec.field else ""
        raise DataError(
            f'{where}data.source "{spec.text}" is empty in all {skipped} documents; '
            f"fields available: {', '.join(fields)}; name another source or field."
        )
    given = None if held_out[0] is None else np.array(held_out, dtype=np.bool_)
    hashes, nbytes = np.array(ranks, dtype=np.uint64), np.array(sizes, dtype=np.int64)
    return Spool(spec, path, hashes, nbytes, given, skipped)


def split_rule(spec: SourceSpec, val_fraction: float) -> str:
    """The split rule of a source, in words.

    Args:
        spec: the source.
        val_fraction: share of documents held out.

    Returns:
        The rule.
    """
    if spec.kind == "sotu":
        return sotu.SPLIT_RULE
    return f"by document: validation = lowest {val_fraction} of the range of the text sha256, at least one"


def split(spool: Spool, val_fraction: float) -> tuple[Mask, Mask]:
    """Divide the documents of a source; depends on each text alone, never on file order.

    Args:
        spool: the source.
        val_fraction: share of documents held out.

    Returns:
        Training and validation masks, bool [documents], disjoint and each with a document.

    Raises:
        DataError: one of the splits is empty.
    """
    if spool.held_out is not None:
        val = spool.held_out
    else:
        cutoff = max(int(val_fraction * 2.0**64) - 1, int(spool.ranks.min()))
        val = spool.ranks <= np.uint64(cutoff)
    if val.all() or not val.any():
        raise DataError(
            f'data.source "{spool.spec.text}" has {val.size} documents, which give {int((~val).sum())} '
            f"training and {int(val.sum())} validation documents ({split_rule(spool.spec, val_fraction)}), "
            "and both need at least 1; add documents, raise data.max_docs or set data.document_separator."
        )
    return ~val, val


def mix(spools: list[Spool], masks: list[Mask]) -> list[Mask]:
    """Shrink one split of every source to the largest mixture with the wanted shares of bytes.

    Args:
        spools: the sources, with or without weights.
        masks: one split of each source, bool [documents].

    Returns:
        The documents to keep, in hash order up to each source's budget, at least one of each source.
    """
    weights = [spool.spec.weight for spool in spools]
    totals = [int(spool.sizes[mask].sum()) for spool, mask in zip(spools, masks, strict=True)]
    unit = min((total / weight for total, weight in zip(totals, weights, strict=True) if weight), default=0.0)
    kept = []
    for spool, mask, weight in zip(spools, masks, weights, strict=True):
        if weight is None:
            kept.append(mask)
            continue
        order = np.flatnonzero(mask)
        order = order[np.argsort(spool.ranks[order], kind="stable")]
        fits = np.cumsum(spool.sizes[order]) <= unit * weight * (1 + 1e-9)
        fits[0] = True
        chosen = np.zeros_like(mask)
        chosen[order[fits]] = True
        kept.append(chosen)
    return kept
