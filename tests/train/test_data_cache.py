"""The cache of prepared tokens: keyed by content, built once, whole or absent, rebuilt when damaged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmuon.errors import DataError
from distmuon.train.data import DataConfig, TokenData, prepare, store

EOS = "<|endoftext|>"
OTHER_EOS = {"eos_token": "</s>"}
TEXTS = [f"line {i} of the held back and the not held back" for i in range(60)]
Prepare = Callable[..., TokenData]
CONFIG = DataConfig(source="jsonl:a.jsonl", tokenizer="bytes", cache_dir="cache", val_fraction=0.2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    monkeypatch.chdir(tmp_path)

    def call(texts: list[str], tokenizer: str = "bytes", **settings: Any) -> TokenData:
        content, path = "".join(json.dumps({"text": text}) + "\n" for text in texts), tmp_path / "a.jsonl"
        if not path.exists() or path.read_text() != content:  # a new modification time is a new entry
            path.write_text(content)
        table = {"source": "jsonl:a.jsonl", "tokenizer": tokenizer, "cache_dir": "cache", "val_fraction": 0.2}
        return prepare(DataConfig.model_validate(table | settings), progress=False)

    return call


def test_the_cache_is_used_and_keyed(run: Prepare, tmp_path: Path) -> None:
    first = run(TEXTS)
    stamp = (first.root / "train.bin").stat()
    again = prepare(CONFIG, progress=False)
    assert again.root == first.root
    assert (again.root / "train.bin").stat().st_mtime_ns == stamp.st_mtime_ns
    others = [
        run(TEXTS, val_fraction=0.3),
        run(TEXTS, tokenizer="train:bpe:300"),
        run(TEXTS, **OTHER_EOS),
        run(TEXTS, max_docs=40),
        run(TEXTS, source="2*jsonl:a.jsonl"),
        run(TEXTS, document_separator="|"),
        run(TEXTS[:-1]),
    ]
    assert len({data.root for data in [first, *others]}) == 8
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == sorted(
        data.root.name for data in [first, *others]
    )
    assert {path.name for path in first.root.iterdir()} == {
        "train.bin",
        "val.bin",
        "tokenizer.json",
        "meta.json",
    }
    with pytest.raises(ValueError, match="read-only"):
        first.train[0] = 1


def damage_size(root: Path) -> None:
    with (root / "val.bin").open("r+b") as file:
        file.truncate(4)


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        lambda root: (root / "tokenizer.json").unlink(),
        lambda root: (root / "meta.json").write_text('{"files"'),
        lambda root: (root / "meta.json").write_text("[]"),
        lambda root: (root / "meta.json").unlink(),
    ],
)
def test_a_damaged_entry_is_rebuilt(
    run: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    first = run(TEXTS)
    train, val, meta = first.train.tolist(), first.val.tolist(), first.meta
    damage(first.root)
    again = prepare(CONFIG, progress=False)
    assert "is damaged" in caplog.text
    assert (again.root, again.meta) == (first.root, meta)
    assert (again.train.tolist(), again.val.tolist()) == (train, val)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [first.root.name]


def entry_writer(calls: list[Path], fill: int = 7) -> Callable[[Path], dict[str, Any]]:
    def build(staging: Path) -> dict[str, Any]:
        calls.append(staging)
        for split in ("train", "val"):
            np.full(5, fill, dtype=np.uint16).tofile(staging / f"{split}.bin")
        return {"dtype": "uint16", "vocab_size": 9}

    return build


def test_many_at_once_build_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    found: list[TokenData] = []
    build, start = entry_writer(calls), threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.append(store.cached(tmp_path / "c", {"a": 1}, build))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [data.train.tolist() for data in found] == [[7] * 5] * 4


def test_the_last_rename_loses(tmp_path: Path) -> None:
    inner: list[TokenData] = []

    def slow(staging: Path) -> dict[str, Any]:
        # Without a working lock another process may publish while this one still builds.
        other = store.cached(tmp_path / "elsewhere", {"a": 1}, entry_writer([], fill=3))
        other.root.rename(tmp_path / "c" / other.root.name)
        inner.append(other)
        return entry_writer([], fill=7)(staging)

    data = store.cached(tmp_path / "c", {"a": 1}, slow)
    assert data.train.tolist() == [3] * 5
    assert [path for path in (tmp_path / "c").iterdir() if path.is_dir()] == [data.root]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(staging: Path) -> dict[str, Any]:
        (staging / "train.bin").write_bytes(b"12")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        store.cached(tmp_path, {}, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_unwritable_cache(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token cache file/sub cannot be written .* set data.cache_dir"):
        run(TEXTS, cache_dir="file/sub")


def test_progress_bars_can_be_switched_off(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    run(TEXTS, tokenizer="train:bpe:300")
    assert capsys.readouterr().err == ""
    prepare(CONFIG.model_copy(update={"tokenizer": "train:bpe:301"}), progress=True)
    shown = capsys.readouterr().err
    for word in ("reading jsonl:a.jsonl", "training the tokenizer", "train.bin", "val.bin"):
        assert word in shown
