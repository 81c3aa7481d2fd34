"""What saves leave alone, what they clear away, and what survives a kill while a checkpoint is replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import distmuon
from distmuon import checkpoint
from distmuon.checkpoint import directory as directories
from distmuon.checkpoint.describe import describe
from distmuon.errors import CheckpointError
from tests.ranks import run_threads

Pair = tuple[torch.nn.Module, distmuon.Muon]


@pytest.fixture
def pair() -> Pair:
    model = torch.nn.Linear(3, 2)
    return model, distmuon.Muon(model.named_parameters())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_of_others_stay(pair: Pair, tmp_path: Path) -> None:
    own = ["thesis.tmp-draft", "notes.tmp-1", "step_00000001.tmp-mine"]
    for name in own:
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path, *pair, 1)
    assert names(tmp_path) == sorted([*own, "LATEST", "step_00000001"])


def test_what_latest_names_is_never_pruned(pair: Pair, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *pair, 1)
    checkpoint.save(tmp_path, *pair, 2, keep=1, point=False)
    assert names(tmp_path) == ["LATEST", "step_00000001", "step_00000002"]
    assert checkpoint.verify(tmp_path).step == 1
    checkpoint.save(tmp_path, *pair, 3, keep=1)
    assert names(tmp_path) == ["LATEST", "step_00000003"]


def test_only_whole_checkpoints_count_as_kept(pair: Pair, tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, *pair, step)
    next((tmp_path / "step_00000002").glob("*.safetensors")).unlink()
    checkpoint.save(tmp_path, *pair, 3, keep=2)
    assert checkpoint.verify(tmp_path / "step_00000001").step == 1


def test_a_checkpoint_that_was_about_to_be_replaced_is_still_there(pair: Pair, tmp_path: Path) -> None:
    """The kill came after the old one was renamed and before the new one was."""
    model, optimizer = pair
    path = checkpoint.save(tmp_path, model, optimizer, 4)
    path.rename(tmp_path / "step_00000004.tmp-replaced-by-0123456789ab")
    assert checkpoint.verify(tmp_path).step == 4
    assert checkpoint.load(tmp_path, model, optimizer).step == 4
    checkpoint.save(tmp_path, model, optimizer, 5)
    assert names(tmp_path) == ["LATEST", "step_00000004", "step_00000005"]
    assert checkpoint.verify(tmp_path / "step_00000004").step == 4


def test_replacing(pair: Pair, tmp_path: Path) -> None:
    model, optimizer = pair
    checkpoint.save(tmp_path, model, optimizer, 4, {"number": 1})
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoint.save(tmp_path, model, optimizer, 4)
    checkpoint.save(tmp_path, model, optimizer, 4, {"number": 2}, replace=True)
    assert names(tmp_path) == ["LATEST", "step_00000004"]
    assert checkpoint.verify(tmp_path).state.extra == {"number": 2}


def test_a_process_forked_during_a_save_does_not_keep_its_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    with directories.alone(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
        with pytest.raises(CheckpointError, match="another save is writing"), directories.alone(tmp_path):
            pass
    with directories.alone(tmp_path):
        pass
    os.write(write, b"x")
    os.waitpid(child, 0)


def test_what_cannot_be_pruned_is_no_failure(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, *pair, 1)

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert checkpoint.save(tmp_path, *pair, 2, keep=1).name == "step_00000002"
    assert "not yours" in caplog.text


def test_directories_that_are_made_are_on_disk(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = directories.sync
    monkeypatch.setattr(directories, "sync", lambda path: (synced.append(path), sync(path)))
    checkpoint.save(tmp_path / "a" / "b", *pair, 1)
    assert synced[:2] == [tmp_path, tmp_path / "a"]


def test_the_step_goes_on_counting(tmp_path: Path) -> None:
    """An error after a resumption names the step of the run, not that since its start."""

    def body(rank: int, world: int) -> int:
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        optimizer = distmuon.DistMuon(model.named_parameters())
        checkpoint.save(tmp_path, model, optimizer, 41)
        checkpoint.load(tmp_path, model, optimizer)
        optimizer.step()
        return optimizer.clock.step

    assert run_threads(2, body) == [42, 42]


def test_terminals_are_safe(pair: Pair, tmp_path: Path) -> None:
    pair[1].param_groups[0]["colour"] = "\x1b[31mred"
    checkpoint.save(tmp_path, *pair, 1, {"\x1b]0;title\x07": "\x1b[2J"})
    text = "\n".join(describe(checkpoint.verify(tmp_path)))
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text


@pytest.mark.parametrize(("given", "message"), [(torch.optim.SGD, "a SGD cannot be saved here"), (None, "complex64")])
def test_what_cannot_be_saved_is_said_before_anything_is_written(given: Any, message: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    if given is None:
        model.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, model, given and given(model.parameters(), lr=1.0), 1)
    assert names(tmp_path) == []
