"""Looking at a checkpoint without the model and without ranks, and taking the weights out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import contents, flip, shards, step_directory, stored
from tests.checkpoint.scene import ODD, Spec, Way, Whole, bits_differing, build, train, whole
from tests.ranks import ROOT, run_threads

SPEC = Spec(ODD, dtype="bfloat16", dtypes={"norm": "float32", "odd": "float16"}, frozen=("row",), tied="tall")


def write(rank: int, world: int, folder: Path) -> Whole:
    model, opt = build(SPEC, Way(world, "flat"))
    for step in range(2):
        train(model, opt, SPEC, step, step + 1, rank, world)
        checkpoint.save(folder, model, opt, step=step + 1, extra={"epoch": step})
    return whole(model, opt)


@pytest.fixture(scope="module")
def saved() -> Iterator[tuple[Path, Whole]]:
    """Two steps of three ranks, and the state of the later one."""
    with TemporaryDirectory() as name:
        state = run_threads(3, write, Path(name))[0]
        yield Path(name), state


def test_verify_says_what_is_there(saved: tuple[Path, Whole]) -> None:
    folder, state = saved
    assert not dist.is_initialized()
    found = checkpoint.verify(folder)
    assert (found.step, found.world_size, found.path) == (2, 3, step_directory(folder, 2))
    assert found.state.extra == {"epoch": 1}
    wanted = {k: (str(v.dtype)[6:], tuple(v.shape)) for k, v in state.items() if not k.startswith("updates/")}
    assert {key: value for key, value in found.tensors.items() if not key.startswith("rng/")} == wanted
    assert checkpoint.verify(step_directory(folder, 1)).step == 1


def test_every_stored_bit_is_where_the_manifest_says(saved: tuple[Path, Whole]) -> None:
    """Read by safetensors alone: names, rows and values."""
    folder, state = saved
    path = step_directory(folder, 2)
    manifest = json.loads((path / "manifest.json").read_bytes())["body"]
    chunks = {(c["file"], key): c["offsets"] for key, t in manifest["tensors"].items() for c in t["chunks"]}
    found: Whole = {k: torch.full_like(v, 77) for k, v in state.items() if not k.startswith("updates/")}
    for file, key, tensor in stored(path):
        offsets = chunks.pop((file, key))
        if not key.startswith("rng/"):
            view = found[key]
            for dim, offset in enumerate(offsets):
                view = view.narrow(dim, offset, tensor.shape[dim])
            view.copy_(tensor)
    assert not chunks
    assert bits_differing(found, {key: state[key] for key in found}) == 0


def test_ranks_share_the_work_of_writing(saved: tuple[Path, Whole]) -> None:
    sizes = [shard.stat().st_size for shard in shards(step_directory(saved[0], 2))]
    assert len(sizes) == 3
    assert max(sizes) < 0.6 * sum(sizes)


def test_check_size_reads_no_tensors(saved: tuple[Path, Whole], tmp_path: Path) -> None:
    """A flipped bit is found by the full check only; that is what "size" gives up."""
    folder = tmp_path / "copy"
    path = step_directory(folder, 2)
    path.mkdir(parents=True)
    for name, data in contents(step_directory(saved[0], 2)).items():
        (path / name).write_bytes(data)
    shard = shards(path)[0]
    flip(shard, 8 * shard.stat().st_size - 1)
    assert checkpoint.verify(path, check="size").step == 2
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.verify(path, check="full")
    with pytest.raises(CheckpointError, match="quick"):
        checkpoint.verify(path, check="quick")  # type: ignore[arg-type]


READER = """
import sys
sys.modules["distmuon"] = None
import torch
from safetensors.torch import load_file
found = load_file(sys.argv[1])
torch.save({name: tensor.view(torch.uint8) if tensor.ndim else tensor for name, tensor in found.items()}, sys.argv[2])
try:
    import distmuon
except ImportError:
    print(len(found), "tensors")
"""


def test_exported_weights_need_nothing_of_ours(saved: tuple[Path, Whole], tmp_path: Path) -> None:
    """Read in a process that cannot import this package."""
    folder, state = saved
    out = checkpoint.export(folder, tmp_path / "weights.safetensors")
    assert out == tmp_path / "weights.safetensors"
    command = [sys.executable, "-c", READER, str(out), str(tmp_path / "read.pt")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "read.pt")
    weights = {key.partition("/")[2]: v for key, v in state.items() if key.startswith(("weight/", "buffer/"))}
    assert answer.stdout == f"{len(weights)} tensors\n"
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor.view(torch.uint8) if tensor.ndim else tensor), name


def test_exported_weights_fit_the_model(saved: tuple[Path, Whole], tmp_path: Path) -> None:
    folder, state = saved
    checkpoint.export(step_directory(folder, 2), tmp_path / "weights.safetensors")
    model, opt = build(SPEC, Way(alone=True), seed=8)
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    assert set(missing) <= {"z.alias"}
    assert not unexpected
    now = whole(model, opt)
    assert all(torch.equal(now[key], value) for key, value in state.items() if key.startswith(("weight/", "buffer/")))


def test_export_is_of_whole_checkpoints_and_overwrites_nothing(saved: tuple[Path, Whole], tmp_path: Path) -> None:
    folder, _ = saved
    out = tmp_path / "weights.safetensors"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="weights"):
        checkpoint.export(folder, out)
    assert out.read_text() == "mine"
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.export(folder, tmp_path / "nowhere" / "weights.safetensors")
    with pytest.raises(CheckpointError, match="empty"):
        checkpoint.export(tmp_path / "empty", tmp_path / "other.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]


@pytest.mark.parametrize("check", ["full", "size"])
def test_a_damaged_checkpoint_is_not_exported(saved: tuple[Path, Whole], tmp_path: Path, check: str) -> None:
    path = step_directory(tmp_path, 2)
    path.mkdir()
    for name, data in contents(step_directory(saved[0], 2)).items():
        (path / name).write_bytes(data[:-1] if name == "state.json" else data)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.export(path, tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()
    assert not list(tmp_path.glob("*.tmp*"))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.verify(path, check=check)  # type: ignore[arg-type]


def command_line(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distmuon", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_commands(saved: tuple[Path, Whole], tmp_path: Path) -> None:
    """``distmuon verify`` and ``distmuon export`` in a process of their own."""
    folder, state = saved
    answer = command_line("verify", folder)
    assert answer.returncode == 0, answer.stderr
    assert "step 2" in answer.stdout or "step_00000002" in answer.stdout
    answer = command_line("export", folder, tmp_path / "out.safetensors")
    assert answer.returncode == 0, answer.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w.tall"], state["weight/w.tall"])
    answer = command_line("verify", tmp_path / "nothing")
    assert answer.returncode != 0
    assert "nothing" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_loading_the_model_only(saved: tuple[Path, Whole]) -> None:
    """For inference: no optimizer anywhere."""
    folder, state = saved
    model, twin = build(SPEC, Way(alone=True), seed=8)
    restored = checkpoint.load(folder, model, None)
    assert restored.step == 2
    now = whole(model, twin)
    assert all(torch.equal(now[key], value) for key, value in state.items() if key.startswith(("weight/", "buffer/")))
    other, _ = build(replace(SPEC, tied=""), Way(alone=True), seed=8)
    assert checkpoint.load(folder, other, None).step == 2
