"""``distmuon verify`` and ``distmuon export``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distmuon
from distmuon import checkpoint
from distmuon.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A model with two kinds of parameters and a buffer, after one step."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    optimizer = distmuon.Muon(model.named_parameters(), lr=0.25)
    model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    return model, checkpoint.save(tmp_path, model, optimizer, 12, {"epoch": 3, "long": "x" * 100})


def test_verify_shows_what_is_there(saved: tuple[torch.nn.Module, Path], capsys: Captured) -> None:
    _, path = saved
    assert main(["verify", str(path.parent)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    size = sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    assert lines[0] == f"{path} is whole: 2 files, {size:,} bytes"
    assert lines[1] == "step 12, ranks that saved it: 1, schema 1"
    assert "weight                4               36              144" in lines
    assert any(line.startswith("param group 0: parameters: 1, updates: 1") for line in lines)
    assert "lr = 0.25" in shown
    assert "epoch = 3" in shown
    assert "x" * 61 not in shown
    assert any(line.split() == ["0.weight", "float32", "[4,", "6]"] for line in lines)
    assert any(line.split() == ["1.num_batches_tracked", "int64", "[]"] for line in lines)


@pytest.mark.parametrize("flags", [[], ["--size"]])
def test_verify_names_what_is_broken(saved: tuple[torch.nn.Module, Path], capsys: Captured, flags: list[str]) -> None:
    _, path = saved
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status = main(["verify", str(path), *flags])
    shown = capsys.readouterr()
    assert status == (0 if flags else 1)
    assert flags or f"{shard} is damaged" in shown.err


def test_export(saved: tuple[torch.nn.Module, Path], tmp_path: Path, capsys: Captured) -> None:
    model, path = saved
    out = tmp_path / "weights.safetensors"
    assert main(["export", str(path), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size:,} bytes\n"
    found = load_file(out)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert main(["export", str(path), str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["verify"], 2),
        (["verify", "--help"], 0),
        (["verify", "a", "b"], 2),
        (["verify", "nowhere"], 1),
        (["export", "a"], 2),
        (["export", "--help"], 0),
        (["export", "nowhere", "out"], 1),
    ],
)
def test_wrong_usage(arguments: list[str], status: int, capsys: Captured) -> None:
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: distmuon {arguments[0]}") == (status != 1)
    assert ("holds no checkpoint" in shown.err) == (status == 1)
