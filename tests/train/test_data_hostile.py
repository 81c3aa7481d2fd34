"""Training text and tokenizers of strangers: what is meant to run does not run, and what is no data is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from distmuon.errors import DataError
from distmuon.train.data.config import DataConfig
from distmuon.train.data.prepare import prepare

Figure = Callable[[str], None]
SCRIPT = """
from pathlib import Path
Path({sentinel!r}).write_text("ran")
import datasets
class Evil(datasets.GeneratorBasedBuilder): pass
"""


class Evil:
    """Unpickled, it writes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.sentinel, "ran"))


def refusal(tmp_path: Path, **settings: str) -> str:
    table = {"source": "files:text.txt", "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), **settings}
    with pytest.raises(DataError) as caught:
        prepare(DataConfig.model_validate(table), progress=False)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    return tmp_path


@pytest.mark.fault("F27")
def test_code_beside_a_data_set_does_not_run(folder: Path, figure: Figure) -> None:
    pytest.importorskip("datasets")
    sentinel = folder / "sentinel"
    (folder / "set").mkdir()
    (folder / "set" / "set.py").write_text(SCRIPT.format(sentinel=str(sentinel)))
    for target in ("set", "set/set.py"):
        assert "cannot be read" in refusal(folder, source=f"hf:{folder / target}")
    assert not sentinel.exists()
    figure("2 of 2 data sets with a script of their own were refused, 0 scripts ran")


@pytest.mark.fault("F27")
@pytest.mark.parametrize("kind", ["tokenizer", "jsonl", "parquet", "bin"])
def test_a_pickle_instead_of_data_does_not_run(folder: Path, kind: str, figure: Figure) -> None:
    sentinel, path = folder / "sentinel", folder / "data"
    path.write_bytes(pickle.dumps(Evil(sentinel)))
    text = refusal(folder, **({"tokenizer": "file:data"} if kind == "tokenizer" else {"source": f"{kind}:data"}))
    assert "data" in text
    assert not sentinel.exists()
    figure(f"a pickle as {kind} was refused, it ran {int(sentinel.exists())} times")
    pickle.loads(path.read_bytes())  # noqa: S301
    assert sentinel.exists()


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, '{"text": NaN}', "\x00", '{"text": "\\ud800"}'])
def test_lines_made_to_hurt(folder: Path, line: str) -> None:
    (folder / "a.jsonl").write_text(line + "\n")
    assert "a.jsonl" in refusal(folder, source="jsonl:a.jsonl")
