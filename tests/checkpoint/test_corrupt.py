"""Whatever is not what was written is refused by name, by ``load`` and by ``verify``, and nothing is loaded partly."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from distmuon import checkpoint
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import MANIFEST, STATE, body, flip, header, reseal, shards, step_directory, write_header
from tests.checkpoint.scene import Figure, Spec, Way, bits_differing, build, train, whole
from tests.ranks import run_threads

SPEC = Spec(
    {"tall": ((12, 5), "muon"), "stack": ((4, 3, 3), "muon"), "table": ((9, 3), "adamw"), "gain": ((), "adamw")},
    dtype="bfloat16",
)
ALONE = Way(alone=True)


def write(rank: int, world: int, folder: Path) -> None:
    model, opt = build(SPEC, Way(world, "flat"))
    for step in range(2):
        train(model, opt, SPEC, step, step + 1, rank, world)
        checkpoint.save(folder, model, opt, step=step + 1, extra={"epoch": step})


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    """Two whole steps that three ranks wrote."""
    with TemporaryDirectory() as name:
        run_threads(3, write, Path(name))
        yield Path(name)


@pytest.fixture
def step(pristine: Path, tmp_path: Path) -> Path:
    """The later step, in a copy that may be damaged."""
    return step_directory(Path(shutil.copytree(pristine, tmp_path / "copy")), 2)


class Victim:
    """A model and its optimizer in the middle of training, which no refused checkpoint may change."""

    def __init__(self) -> None:
        self.model, self.opt = build(SPEC, ALONE, seed=8)
        train(self.model, self.opt, SPEC, 5, 7)
        self.before = whole(self.model, self.opt)
        self.groups = self.settings()

    def settings(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.opt.param_groups]

    def refuses(self, path: Path, check: str = "full") -> tuple[str, str]:
        """What ``load`` and ``verify`` say."""
        with pytest.raises(CheckpointError) as loading:
            checkpoint.load(path.parent, self.model, self.opt, check=check)
        assert bits_differing(whole(self.model, self.opt), self.before) == 0
        assert self.settings() == self.groups
        with pytest.raises(CheckpointError) as verifying:
            checkpoint.verify(path, check=check)
        return str(loading.value), str(verifying.value)


def places(path: Path, count: int) -> list[tuple[str, int]]:
    """(File, bit), evenly over the files and then over their bits, the same in every run."""
    source = random.Random(20)
    files = sorted(file for file in path.iterdir())
    return [(files[n % len(files)].name, source.randrange(8 * files[n % len(files)].stat().st_size)) for n in range(count)]


@pytest.mark.fault("F6")
def test_every_flipped_bit_is_found(step: Path, figure: Figure) -> None:
    victim, refused = Victim(), 0
    chosen = places(step, 200)
    for name, bit in chosen:
        flip(step / name, bit)
        assert all(name in message for message in victim.refuses(step)), (name, bit)
        flip(step / name, bit)
        refused += 1
    assert checkpoint.load(step.parent, victim.model, victim.opt).step == 2
    figure(f"{refused} of {len(chosen)} flipped bits in {len({name for name, _ in chosen})} files refused by name")


def each_file(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.fault("F6")
@pytest.mark.parametrize("check", ["full", "size"])
def test_every_truncated_missing_or_longer_file_is_found(step: Path, check: str, figure: Figure) -> None:
    victim, refused = Victim(), 0
    for name in each_file(step):
        data = (step / name).read_bytes()
        damages: list[bytes | None] = [data[:-1], data[: len(data) // 2], b"", data + b"\0", None]
        for damage in damages:
            if damage is None:
                (step / name).unlink()
            else:
                (step / name).write_bytes(damage)
            assert all(name in message for message in victim.refuses(step, check)), (name, damage)
            (step / name).write_bytes(data)
            refused += 1
    figure(f"{refused} of {refused} truncated, longer, empty or missing files refused by name, check {check}")


@pytest.mark.fault("F6")
def test_swapped_shards_are_found(step: Path, figure: Figure) -> None:
    first, second, *_ = shards(step)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    messages = Victim().refuses(step)
    assert all(first.name in message or second.name in message for message in messages)
    figure("swapped shards refused by name")


@pytest.mark.fault("F6")
def test_files_of_another_step_are_found(step: Path, figure: Figure) -> None:
    refused, names = 0, each_file(step)
    for name in names:
        data = (step / name).read_bytes()
        shutil.copy(step_directory(step.parent, 1) / name, step / name)
        Victim().refuses(step)
        (step / name).write_bytes(data)
        refused += 1
    figure(f"{refused} of {len(names)} files taken from another step refused")


@pytest.mark.fault("F6")
@pytest.mark.parametrize("name", ["extra.safetensors", "shard-00009-model-00001-of-00001.safetensors", "notes.txt"])
def test_a_file_too_many_is_found(step: Path, name: str, figure: Figure) -> None:
    shutil.copy(shards(step)[0], step / name)
    assert all(name in message for message in Victim().refuses(step))
    figure(f"a file too many, {name}, refused by name")


@pytest.mark.fault("F6")
def test_a_whole_step_under_another_number_is_found(step: Path, figure: Figure) -> None:
    """Otherwise step 1 could be passed off as step 2."""
    shutil.rmtree(step)
    shutil.copytree(step_directory(step.parent, 1), step)
    victim = Victim()
    with pytest.raises(CheckpointError, match="step_00000002"):
        checkpoint.load(step.parent, victim.model, victim.opt, step=2)
    figure("step 1 under the name of step 2 refused")


Change = Callable[[dict[str, Any]], object]


def chunks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks of a tensor that lies in several files."""
    found: list[dict[str, Any]] = max((t["chunks"] for t in content["tensors"].values()), key=len)
    assert len(found) > 1
    return found


def renamed_file(new: str) -> Change:
    """A shard under another name, everywhere in the manifest."""

    def change(content: dict[str, Any]) -> None:
        old = next(name for name in content["files"] if name.endswith(".safetensors"))
        content["files"][new] = content["files"].pop(old)
        for tensor in content["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = new if chunk["file"] == old else chunk["file"]

    return change


CHANGES: dict[str, Change] = {
    "a chunk twice": lambda c: chunks(c).append(dict(chunks(c)[0])),
    "a chunk missing": lambda c: chunks(c).pop(),
    "all chunks missing": lambda c: chunks(c).clear(),
    "chunks that overlap": lambda c: chunks(c)[1]["offsets"].__setitem__(0, chunks(c)[1]["offsets"][0] - 1),
    "a negative offset": lambda c: chunks(c)[0]["offsets"].__setitem__(0, -1),
    "a negative size": lambda c: chunks(c)[0]["sizes"].__setitem__(0, -1),
    "a size of 0": lambda c: chunks(c)[0]["sizes"].__setitem__(0, 0),
    "an offset too many": lambda c: chunks(c)[0]["offsets"].append(0),
    "offsets that are text": lambda c: chunks(c)[0].__setitem__("offsets", "00"),
    "a size that is true": lambda c: chunks(c)[0]["sizes"].__setitem__(0, True),
    "a fractional size": lambda c: chunks(c)[0]["sizes"].__setitem__(0, 1.5),
    "a file that is not listed": lambda c: chunks(c)[0].__setitem__("file", "other.safetensors"),
    "a parent directory": renamed_file("../secret.safetensors"),
    "an absolute path": renamed_file("/etc/hostname"),
    "a subdirectory": renamed_file("a/b.safetensors"),
    "a zero byte": renamed_file("shard\0.safetensors"),
    "no name": renamed_file(""),
    "the directory itself": renamed_file("."),
    "the manifest as a shard": renamed_file(MANIFEST),
    "the state as a shard": renamed_file(STATE),
    "a negative step": lambda c: c.__setitem__("step", -1),
    "another step": lambda c: c.__setitem__("step", 3),
    "no step": lambda c: c.pop("step"),
    "a step that is text": lambda c: c.__setitem__("step", "2"),
    "a world of none": lambda c: c.__setitem__("world_size", 0),
    "no tensors": lambda c: c.__setitem__("tensors", []),
    "an unknown key": lambda c: c.__setitem__("hook", "os.system"),
    "an unknown dtype": lambda c: next(iter(c["tensors"].values())).__setitem__("dtype", "object"),
    "a dtype that is an attribute": lambda c: next(iter(c["tensors"].values())).__setitem__("dtype", "load"),
    "a fractional schema": lambda c: c.__setitem__("schema_number", 1.0),
    "a schema that is true": lambda c: c.__setitem__("schema_number", True),
    "no state": lambda c: c["files"].pop(STATE),
}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", CHANGES)
def test_a_consistent_manifest_that_lies(step: Path, change: str, figure: Figure) -> None:
    """Its hash of itself is right, but it does not describe a checkpoint."""
    reseal(step, CHANGES[change])
    messages = Victim().refuses(step)
    assert all(any(n in m for n in (MANIFEST, STATE, "shard-", "step_00000002")) for m in messages), messages
    figure(f"a manifest with {change} refused by name")


def test_a_manifest_sealed_anew_is_fine(step: Path) -> None:
    """What the tests above change is what is refused."""
    reseal(step)
    assert checkpoint.verify(step).step == 2
    assert body(step)["step"] == 2


def reshaped(table: dict[str, Any]) -> None:
    key = next(key for key in table if key.startswith("weight/") and table[key]["shape"])
    table[key]["shape"] = [*table[key]["shape"][::-1], 1]


HEADERS: dict[str, Change] = {
    "another shape": reshaped,
    "another dtype": lambda t: next(v for k, v in t.items() if k.startswith("weight/")).__setitem__("dtype", "F16"),
    "another name": lambda t: t.__setitem__("weight/other", t.pop(next(k for k in t if k.startswith("weight/")))),
    "a tensor less": lambda t: t.pop(next(k for k in t if k.startswith("weight/"))),
}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", HEADERS)
def test_a_shard_that_is_not_what_a_consistent_manifest_says(step: Path, change: str, figure: Figure) -> None:
    shard = next(file for file in shards(step) if any(key.startswith("weight/") for key in header(file)[0]))
    table, data = header(shard)
    HEADERS[change](table)
    write_header(shard, table, data)
    reseal(step)
    messages = Victim().refuses(step)
    assert all(shard.name in message for message in messages), messages
    figure(f"a shard with {change} than its manifest says refused by name")


STATES: dict[str, Change] = {
    "another step": lambda s: s.__setitem__("step", 7),
    "a negative number of updates": lambda s: corrupt_updates(s, -1),
    "updates that are text": lambda s: corrupt_updates(s, "2"),
    "an unknown key": lambda s: s.__setitem__("hook", 1),
    "no groups": lambda s: s.__setitem__("groups", {}),
    "no extra": lambda s: s.pop("extra"),
}


def corrupt_updates(state: dict[str, Any], value: Any) -> None:
    for entry in next(v for k, v in state.items() if k in ("parameters", "updates")).values():
        entry["updates"] = value


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", STATES)
def test_a_state_that_lies(step: Path, change: str, figure: Figure) -> None:
    state = json.loads((step / STATE).read_bytes())
    STATES[change](state)
    (step / STATE).write_text(json.dumps(state))
    reseal(step)
    assert all(STATE in message for message in Victim().refuses(step))
    figure(f"a state with {change} refused by name")


def try_to_load(rank: int, world: int, folder: Path) -> tuple[str, int]:
    model, opt = build(SPEC, Way(world), seed=8)
    before = whole(model, opt)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, model, opt)
    return str(caught.value), bits_differing(whole(model, opt), before)


@pytest.mark.fault("F6")
@pytest.mark.parametrize("world", [2, 3])
def test_damage_is_everybodys_whoever_reads_the_file(step: Path, world: int, figure: Figure) -> None:
    names = each_file(step)
    for name in names:
        flip(step / name, 8 * ((step / name).stat().st_size - 1))
        answers = run_threads(world, try_to_load, step.parent)
        assert len({message for message, _ in answers}) == 1
        assert name in answers[0][0]
        assert [differing for _, differing in answers] == [0] * world
        flip(step / name, 8 * ((step / name).stat().st_size - 1))
    figure(f"each of {len(names)} files damaged: same error on {world} of {world} ranks, 0 bits changed")
