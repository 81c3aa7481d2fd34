"""The split and the tokenizers: what is held out stays unseen, what is encoded decodes exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from distmuon.errors import DataError
from distmuon.train.data import DataConfig, TokenData, prepare

EOS = "<|endoftext|>"
OTHER_EOS = {"eos_token": "</s>"}
TEXTS = [f"line {i} of the held back and the not held back" for i in range(60)]
Prepare = Callable[..., TokenData]


def rank(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    monkeypatch.chdir(tmp_path)

    def call(texts: list[str], tokenizer: str = "bytes", **settings: Any) -> TokenData:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        table = {"source": "jsonl:a.jsonl", "tokenizer": tokenizer, "cache_dir": "cache", "val_fraction": 0.2}
        return prepare(DataConfig.model_validate(table | settings), progress=False)

    return call


def documents(data: TokenData, split: str) -> list[str]:
    return data.decode(getattr(data, split)).split(EOS)[:-1]


def test_split_is_by_content_and_disjoint(run: Prepare) -> None:
    data = run(TEXTS + TEXTS[:30])
    assert documents(data, "val") == [text for text in TEXTS + TEXTS[:30] if rank(text) < 0.2]
    assert documents(data, "train") == [text for text in TEXTS + TEXTS[:30] if rank(text) >= 0.2]
    assert data.meta["split_rule"] == [
        "by document: validation = lowest 0.2 of the range of the text sha256, at least one"
    ]


def test_one_document_is_held_out_at_least(run: Prepare) -> None:
    data = run(TEXTS, val_fraction=1e-9)
    assert documents(data, "val") == [min(TEXTS, key=rank)]
    with pytest.raises(DataError, match="has 3 documents, which give 0 training and 3 validation documents"):
        run(["same"] * 3)


def test_counts(run: Prepare) -> None:
    texts = ["caf\u00e9 " * 3, *TEXTS]
    data = run(texts)
    for split, tokens in (("train", data.train), ("val", data.val)):
        found = documents(data, split)
        size = sum(len(text.encode()) for text in found)
        assert data.meta[split]["documents"] == len(found)
        assert data.meta[split]["bytes"] == size
        assert data.meta[split]["tokens"] == len(tokens) == size + len(found)
        assert data.meta[split]["bytes_per_token"] == size / len(tokens)
        assert data.meta[split]["text_sha256"] == hashlib.sha256("".join(found).encode()).hexdigest()
        raw = (data.root / f"{split}.bin").read_bytes()
        assert data.meta["files"][f"{split}.bin"] == {
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    assert data.bytes_per_token == data.meta["val"]["bytes_per_token"]


def test_bytes_are_their_own_ids(run: Prepare) -> None:
    texts = ["".join(chr(i) for i in range(1, 0x900)), "caf\u00e9 \u2603 \U0001f600  x\r\n\ty", *TEXTS]
    data = run(texts)
    assert data.vocab_size == 257
    stream = data.train.tolist()
    expected = [i for text in texts if rank(text) >= 0.2 for i in [*text.encode(), 256]]
    assert stream == expected


def test_trained_tokenizer_never_saw_the_held_out_text(run: Prepare) -> None:
    marked = [f"{'zq' * 40} {i}" for i in range(400)]
    held_out = [text for text in marked if rank(text) < 0.2]
    trained_on = [text for text in marked if rank(text) >= 0.2]
    assert len(held_out) > 20
    data = run(TEXTS + held_out, tokenizer="train:bpe:300")
    assert any("zq" in text for text in documents(data, "val"))
    assert not any("zq" in text for text in documents(data, "train"))
    assert "zq" not in Tokenizer.from_file(str(data.root / "tokenizer.json")).get_vocab()
    seen = run(TEXTS + trained_on, tokenizer="train:bpe:300")
    assert "zq" in Tokenizer.from_file(str(seen.root / "tokenizer.json")).get_vocab()


def test_trained_tokenizer_round_trips(run: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    texts = [*TEXTS, "  two  spaces\n\n\ttab \u2603\U0001f600 e\u0301 \u0000", f"a {EOS} in the text"]
    data = run(texts, tokenizer="train:bpe:300")
    assert data.vocab_size == 300
    eos = data.meta["eos_id"]
    found = [
        data.decode(part[:-1])
        for tokens in (data.train, data.val)
        for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    ]
    assert sorted(found) == sorted(texts)
    assert not caplog.records
    assert run(texts, tokenizer="train:bpe:100000").vocab_size < 1000
    assert "train:bpe:100000 found only" in caplog.text


def test_a_large_vocabulary_needs_uint32(run: Prepare, tmp_path: Path) -> None:
    vocab = {f"w{i}": i for i in range(66000)} | {EOS: 66000, "line": 66001, "[UNK]": 66002}
    inner = Tokenizer(models.WordLevel(vocab=vocab, **{"unk_token": "[UNK]"}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_truncation(2)
    inner.save(str(tmp_path / "t.json"))
    data = run(TEXTS, tokenizer="file:t.json")
    assert (data.vocab_size, data.meta["eos_id"], data.train.dtype.name) == (66003, 66000, "uint32")
    assert data.train[0] == 66001
    assert len(data.train) > 4 * data.meta["train"]["documents"]


def test_tokenizer_from_the_hub(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    trained = run(TEXTS, tokenizer="train:bpe:300")
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(trained.root / "tokenizer.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = run(TEXTS, tokenizer="hf:owner/name")
    assert asked == [("owner/name", "tokenizer.json")]
    assert np.array_equal(data.train, trained.train)

    def offline(name: str, file: str) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"hf:o/n.* cannot be downloaded \(no network\); .* hf download o/n"):
        run(TEXTS, tokenizer="hf:o/n")


def test_refused_tokenizer_files(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='"file:t.json" names no file; give the path of a tokenizer.json'):
        run(TEXTS, tokenizer="file:t.json")
    for content in (b"\xff\xfe", b"{}"):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(DataError, match="file:t.json is not a tokenizer.json"):
            run(TEXTS, tokenizer="file:t.json")
    trained = run(TEXTS, tokenizer="train:bpe:300", **OTHER_EOS)
    (tmp_path / "t.json").write_bytes((trained.root / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r'no token "<\|endoftext\|>"; set data.eos_token to one of .*: </s>'):
        run(TEXTS, tokenizer="file:t.json")
    assert run(TEXTS, tokenizer="file:t.json", **OTHER_EOS).meta["eos_id"] == 0
