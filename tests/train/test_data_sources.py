"""Every kind of source, read from temporary files, and the sentence for every way it can fail."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from distmuon.errors import DataError
from distmuon.train.data import DataConfig, TokenData, prepare

EOS = "<|endoftext|>"
TEXTS = [f"document {i}: caf\u00e9 {'ab' * i}\n" for i in range(30)]
Prepare = Callable[..., TokenData]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    monkeypatch.chdir(tmp_path)

    def call(source: str | list[str], tokenizer: str = "bytes", **settings: object) -> TokenData:
        table = {
            "source": source,
            "tokenizer": tokenizer,
            "cache_dir": "cache",
            "val_fraction": 0.2,
            **settings,
        }
        return prepare(DataConfig.model_validate(table), progress=False)

    return call


def documents(data: TokenData) -> list[str]:
    return [text for split in (data.train, data.val) for text in data.decode(split).split(EOS)[:-1]]


def write_jsonl(path: Path, rows: Sequence[object]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_parquet(path: Path, **columns: Sequence[object]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_files(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "sub" / ("deep" if i % 2 else ".") / f"{i:02}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "sub" / "empty.txt").write_text(" \n")
    data = run("files:**/*.txt")
    assert sorted(documents(data)) == sorted(TEXTS)
    assert data.meta["empty_documents_skipped"] == 1
    (tmp_path / "sub" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin.txt is not UTF-8 at byte 3"):
        run("files:**/*.txt")


def test_document_separator(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("<sep>".join(TEXTS), encoding="utf-8")
    with pytest.raises(DataError, match="has 1 documents, .* set data.document_separator"):
        run("files:all.txt")
    assert sorted(documents(run("files:all.txt", document_separator="<sep>"))) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(run: Prepare, tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, [{"id": i, "body": text} for i, text in enumerate(TEXTS)] + [{"body": None}])
    data = run(f"jsonl:{name}#body")
    assert sorted(documents(data)) == sorted(TEXTS)
    assert data.meta["empty_documents_skipped"] == 1
    assert len(documents(run(f"jsonl:{name}#body", max_docs=20))) == 20
    with pytest.raises(DataError, match=f'{name}:1 has no field "text"; name one of id, body'):
        run(f"jsonl:{name}")
    with pytest.raises(DataError, match=f'field "id" of .*{name}:1 holds int, not text; name one of id, body'):
        run(f"jsonl:{name}#id")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text"\n', "a.jsonl:2 is not JSON"),
        (b'"text"\n', 'a.jsonl:1 holds a str, not an object with field "text"'),
        (b'{"text": "\xff"}\n', "a.jsonl is not UTF-8"),
        (b'{"text": "\\ud800"}\n', "lone surrogate in document 0"),
        (
            b'{"n": 1, "text": ""}\n{"n": 2, "text": " "}\n',
            'field "text" of .* empty in all 2 .* available: n, text',
        ),
        (b"\n", "empty in all 0 documents"),
    ],
)
def test_broken_jsonl(run: Prepare, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words):
        run("jsonl:a.jsonl")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_broken_gzip(run: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in TEXTS])
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    for broken in (whole[:-12], b"not gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match="a.jsonl.gz cannot be read .*; repair or replace"):
            run("jsonl:a.jsonl.gz")


def test_parquet(run: Prepare, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", n=[*range(31)], text=[*TEXTS, None])
    assert sorted(documents(run("parquet:*.parquet"))) == sorted(TEXTS)
    with pytest.raises(DataError, match='a.parquet has no field "body"; name one of n, text'):
        run("parquet:*.parquet#body")
    with pytest.raises(DataError, match='field "n" of .* holds int, not text; name one of n, text'):
        run("parquet:*.parquet#n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="a.parquet is not a readable Parquet file"):
        run("parquet:*.parquet")


def test_hf_local_directory(run: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", n=[*range(30)], body=TEXTS)
    source = f"hf:{tmp_path}/set#body"
    assert sorted(documents(run(source))) == sorted(TEXTS)
    assert sorted(documents(run(source, max_docs=25))) == sorted(TEXTS[:25])
    with pytest.raises(DataError, match='has no field "text"; name one of n, body'):
        run(f"hf:{tmp_path}/set")
    write_parquet(tmp_path / "set" / "train.parquet", n=[*range(5)], body=TEXTS[:5])
    assert sorted(documents(run(source))) == sorted(TEXTS[:5])
    with pytest.raises(DataError, match='data.source "hf:.*:other" cannot be read .* hf auth login'):
        run(f"hf:{tmp_path}/set:other#body")


@pytest.mark.parametrize(
    ("source", "module"),
    [("parquet:a", "pyarrow.parquet"), ("hf:a", "datasets")],
)
def test_missing_package(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str
) -> None:
    (tmp_path / "a").write_text("")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {module}; run: pip install 'distmuon\[hf\]'"):
        run(source)


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
def test_a_glob_without_files(run: Prepare, kind: str) -> None:
    with pytest.raises(DataError, match=r'the glob "no/\*\.x" matches no file'):
        run(f"{kind}:no/*.x")


def test_weights(run: Prepare, tmp_path: Path) -> None:
    for name in "ab":
        for i in range(200):
            (tmp_path / f"{name}{i:03}.txt").write_text(f"{name} {1000 + i} " + name * 93)
    both = run(["files:a*.txt", "files:b*.txt"])
    assert len(documents(both)) == 400
    data = run(["3*files:a*.txt", "1*files:b*.txt"])
    texts = data.decode(data.train).split(EOS)[:-1]
    a, b = (sum(text[0] == name for text in texts) for name in "ab")
    assert a == sum(text[0] == "a" for text in both.decode(both.train).split(EOS)[:-1])
    assert b == a // 3
    every_b = [text for text in both.decode(both.train).split(EOS)[:-1] if text[0] == "b"]
    every_b.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    assert sorted(every_b[:b]) == [text for text in texts if text[0] == "b"]
    assert len(set(texts)) == a + b
    tiny = run(["1*files:a*.txt", "0.0001*files:b*.txt"])
    assert tiny.decode(tiny.train).count("b 1") == 1


def test_bin(run: Prepare, tmp_path: Path) -> None:
    train, val = np.arange(500, dtype=np.uint32) * 200, np.arange(50, dtype=np.uint32)
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r'no .*meta.json; write e.g. {"dtype": "uint16", "vocab_size": 50257}'):
        run("bin:train.bin")
    for meta, words in (
        ("{", "must hold"),
        ('{"dtype": "uint32"}', "KeyError: 'vocab_size'"),
        ('{"dtype": "int8", "vocab_size": 5}', "dtype 'int8'; legal are"),
        ('{"dtype": "uint32", "vocab_size": true}', "vocab_size True"),
        ('{"dtype": "uint32", "vocab_size": 99800}', "token id 99800, but meta.json says vocab_size 99800"),
    ):
        (tmp_path / "meta.json").write_text(meta)
        with pytest.raises(DataError, match=words):
            run("bin:train.bin")
    (tmp_path / "meta.json").write_text('{"dtype": "uint32", "vocab_size": 99801}')
    for source in ("bin:train.bin", "bin:."):
        data = run(source)
        assert data.vocab_size == 99801
        assert np.array_equal(data.train, train)
        assert np.array_equal(data.val, val)
        assert data.bytes_per_token is None
    with pytest.raises(DataError, match="bin:. has no tokenizer; put a tokenizer.json next to train.bin"):
        data.decode([1])
    with pytest.raises(DataError, match="must name a train.bin"):
        run("bin:val.bin")
    (tmp_path / "val.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="val.bin has 3 bytes, not whole uint32 tokens"):
        run("bin:train.bin")
    (tmp_path / "val.bin").unlink()
    with pytest.raises(DataError, match="no .*val.bin; put the held-out token ids there"):
        run("bin:train.bin")


def test_bin_of_prepared_text(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("|".join(TEXTS), encoding="utf-8")
    text = run("files:all.txt", document_separator="|")
    again = run(f"bin:{text.root}/train.bin")
    assert documents(again) == documents(text)
    assert (again.root / "train.bin").resolve() == (text.root / "train.bin").resolve()
