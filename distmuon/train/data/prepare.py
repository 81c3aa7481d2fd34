"""From a data configuration to memory-mapped tokens: read, split, train the tokenizer, encode, cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distmuon.train.data import sotu
from distmuon.train.data.binary import binary_files, link_binary
from distmuon.train.data.config import (
    DataConfig,
    SourceSpec,
    TokenizerSpec,
    parse_sources,
    parse_tokenizer,
)
from distmuon.train.data.spool import Mask, Spool, file_identity, fill, identity, mix, split, split_rule
from distmuon.train.data.store import TokenData, cached
from distmuon.train.data.tokenizer import (
    TextTokenizer,
    byte_tokenizer,
    load_tokenizer,
    tokenizer_file,
    train_bpe,
)

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20


def prepare(cfg: DataConfig, progress: bool = True) -> TokenData:
    """Open the tokens of a configuration, preparing them first unless the cache holds them.

    Safe to call from every rank at once: one prepares, the others wait and open the result.

    Args:
        cfg: the data section of a configuration.
        progress: show progress bars.

    Returns:
        Both splits, memory-mapped.

    Raises:
        DataError: a source or tokenizer is missing, unreadable or not what its hash says.
    """
    specs = parse_sources(cfg.source)
    if any(spec.kind == "sotu" for spec in specs):
        logger.info(sotu.CAVEAT)
    source = [[spec.text, spec.weight] for spec in specs]
    recipe: dict[str, Any] = {"source": source, "eos_token": cfg.eos_token}
    if specs[0].kind == "bin":
        recipe["identity"] = [file_identity(path) for path in binary_files(specs[0])]
        logger.info("%s brings its own tokens; data.tokenizer is not used", specs[0].text)
        return cached(cfg.cache_root(), recipe, lambda staging: link_binary(specs[0], cfg.eos_token, staging, progress))
    tokenizer = parse_tokenizer(cfg.tokenizer)
    path = tokenizer_file(tokenizer)
    content = None if path is None else path.read_text(encoding="utf-8", errors="replace")
    recipe |= {
        "identity": [identity(spec) for spec in specs],
        "tokenizer": tokenizer.text if content is None else _sha256(content),
        "max_docs": cfg.max_docs,
        "val_fraction": cfg.val_fraction,
        "document_separator": cfg.document_separator,
    }
    return cached(cfg.cache_root(), recipe, partial(_build, cfg, specs, tokenizer, content, progress))


def _build(
    cfg: DataConfig,
    specs: list[SourceSpec],
    tokenizer_spec: TokenizerSpec,
    content: str | None,
    progress: bool,
    staging: Path,
) -> dict[str, Any]:
    if content is not None:  # before the long work, so that a bad file fails at once
        load_tokenizer(content, cfg.eos_token, tokenizer_spec.text)
    scratch = staging / "spool"
    scratch.mkdir()
    spools = [fill(spec, cfg, scratch / f"{i}.jsonl", progress) for i, spec in enumerate(specs)]
    masks = [split(spool, cfg.val_fraction) for spool in spools]
    train = mix(spools, [mask for mask, _ in masks])
    val = mix(spools, [mask for _, mask in masks])
    if content is not None:
        tokenizer = load_tokenizer(content, cfg.eos_token, tokenizer_spec.text)
    elif tokenizer_spec.kind == "bytes":
        tokenizer = byte_tokenizer(cfg.eos_token)
    else:
        tokenizer = _train(tokenizer_spec, cfg.eos_token, _texts(spools, train), _count(train), progress)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = {
        name: _encode(tokenizer, _texts(spools, keep), _count(keep), staging / f"{name}.bin", dtype, progress)
        for name, keep in (("train", train), ("val", val))
    }
    (staging / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    shutil.rmtree(scratch)
    return {
        "source": [spec.text for spec in specs],
        "weights": [spec.weight for spec in specs],
        "corpus_sha256": [sotu.CORPUS_SHA256 if spec.kind == "sotu" else None for spec in specs],
        "caveats": [sotu.CAVEAT for spec in specs if spec.kind == "sotu"],
        "split_rule": [split_rule(spec, cfg.val_fraction) for spec in specs],
        "empty_documents_skipped": sum(spool.skipped for spool in spools),
        "tokenizer": tokenizer_spec.text,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "eos_token": cfg.eos_token,
        "eos_id": tokenizer.eos_id,
        **counts,
    }


def _train(spec: TokenizerSpec, eos_token: str, texts: Iterator[str], documents: int, progress: bool) -> TextTokenizer:
    size = int(spec.target)
    bar = tqdm(texts, desc="training the tokenizer", total=documents, unit="doc", disable=not progress)
    tokenizer = train_bpe(iter(bar), size, eos_token, documents)
    if tokenizer.vocab_size < size:
        logger.warning("%s found only %d entries in the training text", spec.text, tokenizer.vocab_size)
    return tokenizer


def _encode(
    tokenizer: TextTokenizer,
    texts: Iterator[str],
    documents: int,
    path: Path,
    dtype: np.dtype[Any],
    progress: bool,
) -> dict[str, Any]:
    size = tokens = 0
    digest = hashlib.sha256()
    bar = tqdm(total=documents, desc=path.name, unit="doc", disable=not progress)
    with path.open("wb") as out, bar:
        for batch in _batches(texts):
            for ids in tokenizer.encode(batch):
                np.array([*ids, tokenizer.eos_id], dtype=dtype).tofile(out)
                tokens += len(ids) + 1
            for text in batch:
                raw = text.encode("utf-8")
                digest.update(raw)
                size += len(raw)
            bar.update(len(batch))
    return {
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "text_sha256": digest.hexdigest(),
    }


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH_CHARACTERS or len(batch) == 256:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(spools: list[Spool], keep: list[Mask]) -> Iterator[str]:
    return chain.from_iterable(spool.texts(mask) for spool, mask in zip(spools, keep, strict=True))


def _count(keep: list[Mask]) -> int:
    return sum(int(mask.sum()) for mask in keep)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
