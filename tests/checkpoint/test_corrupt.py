"""Whatever is not what was written is refused by name, by ``load`` and by ``verify``, and nothing is loaded partly."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from distmuon import checkpoint
from distmuon.checkpoint.verify import Check
from distmuon.errors import CheckpointError
from tests.checkpoint.disk import flip, shards, step_directory
from tests.checkpoint.scene import Figure, Way, bits_differing, build, whole
from tests.checkpoint.victim import SPEC, Victim
from tests.ranks import run_threads


def places(path: Path, count: int) -> list[tuple[str, int]]:
    """(File, bit), evenly over the files and then over their bits, the same in every run."""
    source = random.Random(20)
    files = sorted(file for file in path.iterdir())
    return [
        (files[n % len(files)].name, source.randrange(8 * files[n % len(files)].stat().st_size)) for n in range(count)
    ]


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
def test_every_truncated_missing_or_longer_file_is_found(step: Path, check: Check, figure: Figure) -> None:
    victim, refused = Victim(), 0
    for name in each_file(step):
        data = (step / name).read_bytes()
        damages: list[bytes | None] = [data[:-1], data[: len(data) // 2], b"", data + b" ", None]
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
