"""The grammar of source and tokenizer specs, and the sentences for what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from distmuon.config import parse
from distmuon.errors import ConfigError
from distmuon.train.data import DataConfig
from distmuon.train.data.config import parse_source, parse_sources, parse_tokenizer


@pytest.mark.parametrize(
    ("text", "kind", "target", "field", "weight"),
    [
        ("sotu", "sotu", "", "", None),
        ("0.7*sotu", "sotu", "", "", 0.7),
        ("files:/a/**/*.txt", "files", "/a/**/*.txt", "", None),
        ("files:/a/c#/*2", "files", "/a/c#/*2", "", None),
        ("2*jsonl:/a/*.gz#body", "jsonl", "/a/*.gz", "body", 2.0),
        ("jsonl:/c#/a.jsonl#text", "jsonl", "/c#/a.jsonl", "text", None),
        ("parquet:/a/*.parquet", "parquet", "/a/*.parquet", "text", None),
        ("bin:/a/train.bin", "bin", "/a/train.bin", "", None),
        ("hf:owner/name:config#text", "hf", "owner/name:config", "text", None),
    ],
)
def test_source_specs(text: str, kind: str, target: str, field: str, weight: float | None) -> None:
    spec = parse_source(text)
    assert (spec.kind, spec.target, spec.field, spec.weight) == (kind, target, field, weight)
    assert spec.text == text.removeprefix("0.7*").removeprefix("2*")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("web:x", '"web:x" has no known prefix; use one of "sotu", "files:GLOB", "jsonl:GLOB#FIELD"'),
        ("sotu:x", "no known prefix"),
        ("*.txt", "no known prefix"),
        ("files:", 'nothing after "files:"'),
        ("jsonl:/a#", 'no field after "#"'),
        ("0*sotu", "weight 0; use a number above 0"),
        ("nan*sotu", "weight nan"),
        ([], "names no source"),
        (["sotu", "sotu"], "twice"),
        (["0.5*sotu", "files:/a"], "weights on some sources only"),
        (["sotu", "bin:/a"], 'use "bin:" alone'),
    ],
)
def test_refused_sources(value: str | list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sources(value)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match='^run.toml: "source') as through_config:
        parse(DataConfig, {"source": value}, "run.toml")
    assert words in str(through_config.value)


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [
        ("train:bpe:4096", "train", "4096"),
        ("train:bpe:257", "train", "257"),
        ("file:a:b.json", "file", "a:b.json"),
        ("hf:owner/name", "hf", "owner/name"),
        ("bytes", "bytes", ""),
    ],
)
def test_tokenizer_specs(text: str, kind: str, target: str) -> None:
    spec = parse_tokenizer(text)
    assert (spec.kind, spec.target) == (kind, target)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpt2", 'use one of "train:bpe:SIZE", "file:PATH", "hf:NAME", "bytes"'),
        ("file:", "not legal"),
        ("train:unigram:300", "not legal"),
        ("train:bpe:256", "256 entries; use a whole number from 257 to 1048576"),
        ("train:bpe:", "no entries"),
        ("train:bpe:-5", "-5 entries"),
        ("train:bpe:1048577", "1048577 entries"),
    ],
)
def test_refused_tokenizers(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tokenizer(text)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match='"tokenizer"') as through_config:
        parse(DataConfig, {"tokenizer": text}, "run.toml")
    assert words in str(through_config.value)


def test_defaults_and_bounds() -> None:
    cfg = DataConfig()
    assert (cfg.source, cfg.tokenizer, cfg.max_docs) == ("sotu", "train:bpe:4096", None)
    for bad in (
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"max_docs": 0},
        {"eos_token": ""},
        {"sauce": "sotu"},
    ):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(bad)


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert DataConfig().cache_root() == Path("/fast/distmuon/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache_root() == Path("/home/u/.cache/distmuon/data")
    assert DataConfig(cache_dir="~/c").cache_root() == Path("/home/u/c")
