"""A checkpoint that somebody made to do harm: no code runs, nothing is read elsewhere, and little memory is taken."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from distmuon import checkpoint
from distmuon.errors import DistMuonError
from tests.checkpoint.disk import (
    LATEST,
    MANIFEST,
    STATE,
    canonical,
    header,
    reseal,
    shards,
    step_directory,
    write_header,
)
from tests.checkpoint.forked import run_forked, values
from tests.checkpoint.scene import Figure, Spec, Way, bits_differing, build, train, whole

SPEC = Spec({"tall": ((12, 5), "muon"), "table": ((9, 3), "adamw")}, dtype="bfloat16")
ALONE = Way(alone=True)


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        model, opt = build(SPEC, ALONE)
        train(model, opt, SPEC, 0, 2)
        checkpoint.save(name, model, opt, step=2)
        yield Path(name)


@pytest.fixture
def step(pristine: Path, tmp_path: Path) -> Path:
    return step_directory(Path(shutil.copytree(pristine, tmp_path / "copy")), 2)


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


def memory(field: str) -> float:
    """A field of this process's memory account in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@dataclass
class Damage:
    """One file to replace before an attempt; the others are as they were."""

    what: str
    name: str
    data: bytes
    sealed: bool
    """Whether the manifest is to agree with it."""
    verified: bool = False
    """Whether ``verify``, which knows no optimizer, may accept it."""


def attack(rank: int, world: int, path: Path, damages: list[Damage]) -> list[dict[str, Any]]:
    """Verify and load what is there, once for every damage; error, seconds and growth of memory of each."""
    model, opt = build(SPEC, ALONE, seed=8)
    train(model, opt, SPEC, 5, 6)
    before, seen = whole(model, opt), []
    intact = {
        name: (path / name).read_bytes() for name in {d.name for d in damages} | ({MANIFEST} if damages else set())
    }
    attempts: list[Damage | None] = [*damages] or [None]
    for damage in attempts:
        for name, data in intact.items():
            (path / name).write_bytes(data)
        if damage is not None:
            (path / damage.name).write_bytes(damage.data)
            if damage.sealed:
                reseal(path)
        what = "" if damage is None else damage.what
        seen.append({"what": what, **measured(lambda: checkpoint.load(path.parent, model, opt))})
        if damage is None or not damage.verified:
            seen.append({"what": what, **measured(lambda: checkpoint.verify(path))})
        assert bits_differing(whole(model, opt), before) == 0
    return seen


def measured(attempt: Callable[[], object]) -> dict[str, Any]:
    """Error, seconds and growth of memory of what must not succeed."""
    resident = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started, error = time.process_time(), ""
    try:
        attempt()
    except DistMuonError as refused:
        error = f"{type(refused).__name__}: {refused}"
    seconds = time.process_time() - started
    return {"error": error, "seconds": seconds, "growth": memory("VmHWM") - resident}


def examine(path: Path, figure: Figure, what: str, names: tuple[str, ...], damages: list[Damage] | None = None) -> None:
    """All is refused, in time and in little memory, naming one of the names."""
    (answers,) = values(run_forked(attack, path, damages or []))
    for seen in answers:
        assert seen["error"], seen
        assert any(name in seen["error"] for name in names), seen
        assert len(seen["error"]) < 10_000
        assert seen["seconds"] <= 1, seen
        assert seen["growth"] <= 50, seen
    seconds, growth = (max(seen[key] for seen in answers) for key in ("seconds", "growth"))
    figure(
        f"{what}: {len(answers)} of {len(answers)} attempts refused in {seconds:.2f} s, {growth:.1f} MiB more memory"
    )


@pytest.mark.fault("F7")
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_in_every_file(step: Path, tmp_path: Path, sealed: bool, figure: Figure) -> None:
    sentinel, archive = tmp_path / "sentinel", io.BytesIO()
    torch.save(Payload(sentinel), archive)
    names = sorted(file.name for file in step.iterdir() if not (sealed and file.name == MANIFEST))
    pickles = [pickle.dumps(Payload(sentinel)), archive.getvalue()]
    damages = [Damage(f"pickle as {name}", name, data, sealed) for name in names for data in pickles]
    examine(step, figure, f"{len(damages)} pickles in {len(names)} files", (*names,), damages)
    assert not sentinel.exists()
    pickle.loads(pickles[0])  # noqa: S301
    assert sentinel.exists(), "the payload is live"


@pytest.mark.fault("F7")
def test_a_pickle_as_latest_and_beside_it(step: Path, tmp_path: Path, figure: Figure) -> None:
    sentinel = tmp_path / "sentinel"
    for name in (LATEST, ".metadata", "latest"):
        (step.parent / name).write_bytes(pickle.dumps(Payload(sentinel)))
    model, opt = build(SPEC, ALONE, seed=8)
    assert checkpoint.load(step.parent, model, opt).step == 2
    (step / ".metadata").write_bytes(pickle.dumps(Payload(sentinel)))
    examine(step, figure, "pickle named .metadata in the step", (".metadata",))
    assert not sentinel.exists()


def widen(path: Path, shape: list[int], grow: bool) -> None:
    """Let header and manifest agree that a tensor is enormous."""
    shard = next(file for file in shards(path) if "weight/w.table" in header(file)[0])
    table, data = header(shard)
    entry = table["weight/w.table"]
    entry["shape"] = shape
    count = 1
    for size in shape:
        count *= size
    if grow:
        entry["data_offsets"][1] = entry["data_offsets"][0] + 2 * count
    write_header(shard, table, data)

    def change(content: dict[str, Any]) -> None:
        tensor = content["tensors"]["weight/w.table"]
        tensor.update(shape=shape)
        tensor["chunks"] = [{"file": shard.name, "offsets": [0] * len(shape), "sizes": shape}]

    reseal(path, change)


@pytest.mark.fault("F7")
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize(
    "shape", [[2**40], [2**20, 2**20], [2**63, 2], [2**62, 0], [1] * 100_000], ids=lambda s: str(s)[:20]
)
def test_a_tensor_of_enormous_size(step: Path, shape: list[int], grow: bool, figure: Figure) -> None:
    widen(step, shape, grow)
    examine(step, figure, f"shape {str(shape)[:20]}", ("weight/w.table", "shard-"))


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


TEXTS: dict[str, Callable[[], str]] = {
    "nested 900 deep": lambda: deep(900),
    "nested 990 deep": lambda: deep(990),
    "nested 100,000 deep": lambda: deep(100_000),
    "objects 100,000 deep": lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "an integer of 4,000 digits": lambda: "9" * 4_000,
    "an integer of a million digits": lambda: "9" * 1_000_000,
    "a float beyond range": lambda: "1e999999",
    "NaN": lambda: "NaN",
    "minus infinity": lambda: "-Infinity",
    "a lone surrogate": lambda: '"\\ud800"',
    "a zero byte": lambda: '"\\u0000"',
    "no JSON": lambda: "{",
    "no UTF-8": lambda: "\udcff",
}


@pytest.mark.fault("F7")
@pytest.mark.parametrize("text", TEXTS)
def test_json_that_is_made_to_hurt(step: Path, text: str, figure: Figure) -> None:
    """In the place of a file, of a manifest's body, of values in it, and of values of a consistent state."""
    value = TEXTS[text]().encode(errors="surrogateescape")
    manifest, state = ((step / name).read_bytes() for name in (MANIFEST, STATE))
    bodies = [value, b'{"schema_number":' + value + b"}"]
    damages = [Damage("a body", MANIFEST, b'{"body":' + b + b',"sha256":"' + b"0" * 64 + b'"}', False) for b in bodies]
    damages += [
        Damage("the manifest", MANIFEST, value, False),
        Damage("a step", MANIFEST, manifest.replace(b'"step":2', b'"step":' + value), False),
        Damage("the state", STATE, value, True),
        Damage("the state's step", STATE, state.replace(b'"step":2', b'"step":' + value), True),
        Damage("lr", STATE, state.replace(b'"lr":', b'"lr":' + value + b',"other":', 1), True, verified=True),
    ]
    assert all(damage.data not in (manifest, state) for damage in damages)
    examine(step, figure, text, (MANIFEST, STATE, "lr"), damages)


@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", [MANIFEST, STATE, "shard"])
def test_a_file_far_too_large(step: Path, name: str, figure: Figure) -> None:
    """A terabyte that takes no room on the disk."""
    file = shards(step)[0] if name == "shard" else step / name
    os.truncate(file, 2**40)
    examine(step, figure, f"{name} of a terabyte", (file.name,))


@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", [MANIFEST, STATE, "shard"])
@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "directory", "pipe", "device"])
def test_what_is_not_a_file(step: Path, tmp_path: Path, kind: str, name: str, figure: Figure) -> None:
    """Even if its content is right: a link may point anywhere."""
    file = shards(step)[0] if name == "shard" else step / name
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.symlink_to(elsewhere if kind == "symlink" else tmp_path / "nowhere")
    examine(step, figure, f"{name} that is a {kind}", (file.name, step.name))


@pytest.mark.fault("F7")
@pytest.mark.parametrize(
    "how", ["step", "LATEST", "LATEST names a parent", "LATEST names a path", "LATEST names a link"]
)
def test_links_to_a_checkpoint_elsewhere(step: Path, tmp_path: Path, how: str, figure: Figure) -> None:
    """Nothing outside the directory is loaded, even if it is whole."""
    outside = Path(shutil.copytree(step.parent, tmp_path / "outside"))
    shutil.rmtree(step)
    pointer = step.parent / LATEST
    if how == "step":
        step.symlink_to(step_directory(outside, 2))
    elif how == "LATEST":
        pointer.unlink()
        pointer.symlink_to(outside / LATEST)
    elif how == "LATEST names a link":
        (step.parent / "link").symlink_to(step_directory(outside, 2))
        pointer.write_text("link\n")
    else:
        pointer.write_text(
            "../outside/step_00000002\n" if how.endswith("parent") else f"{step_directory(outside, 2)}\n"
        )
    examine(step, figure, f"a link: {how}", ("copy",))


def test_the_intact_checkpoint_is_accepted(step: Path) -> None:
    (answers,) = values(run_forked(attack_nothing, step))
    assert answers == 2


def attack_nothing(rank: int, world: int, path: Path) -> int:
    model, opt = build(SPEC, ALONE, seed=8)
    assert json.loads(canonical({"a": 1})) == {"a": 1}
    assert checkpoint.verify(path).step == 2
    return checkpoint.load(path.parent, model, opt).step
