"""Saved on one number of ranks under one placement, loaded on another under another: not a bit is lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from distmuon import checkpoint
from tests.checkpoint.scene import (
    LARGE_MB,
    ODD,
    SMALL_MB,
    Figure,
    Spec,
    Way,
    Whole,
    bits_differing,
    build,
    join_late,
    train,
    whole,
)
from tests.ranks import run_threads

WORLDS = (1, 2, 3, 4)
PLACEMENTS = {
    "scatter": Way(policy="balanced", transport="scatter"),
    "owner": Way(policy="balanced", transport="owner"),
    "flat": Way(policy="flat", bucket_mb=0.002),
    "team": Way(policy="team"),
    "large": Way(bucket_mb=LARGE_MB),
}
SPECS = {
    "plain": Spec(),
    "rich": Spec(
        dtype="bfloat16",
        dtypes={"square": "float32", "norm": "float32", "odd": "float16"},
        splits={"fused": [4, 2, 6], "experts": 2},
        frozen=("row",),
        tied="tall",
        apart=("norm", "square"),
        late=("column", "gain"),
    ),
}
SAVED, MORE = 3, 10


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def write(rank: int, world: int, spec: Spec, way: Way, folder: Path) -> tuple[Whole, Whole]:
    """State at the save and after the next ten steps."""
    model, opt = build(spec, way)
    train(model, opt, spec, 0, 2, rank, world)
    for group in opt.param_groups:
        group["lr"] *= 0.5
    join_late(model, spec, opt)
    train(model, opt, spec, 2, SAVED, rank, world)
    saved = whole(model, opt)
    checkpoint.save(folder, model, opt, step=SAVED)
    assert bits_differing(whole(model, opt), saved) == 0
    train(model, opt, spec, SAVED, SAVED + MORE, rank, world)
    return saved, whole(model, opt)


def read(rank: int, world: int, spec: Spec, way: Way, folder: Path, again: Path | None = None) -> tuple[Whole, Whole]:
    """State after loading and after the next ten steps; in between it may be saved once more."""
    model, opt = build(spec, way, seed=8)
    join_late(model, spec, opt)
    train(model, opt, spec, 5, 6, rank, world)  # state to be overwritten
    assert checkpoint.load(folder, model, opt).step == SAVED
    loaded = whole(model, opt)
    if again is not None:
        checkpoint.save(again, model, opt, step=SAVED)
    train(model, opt, spec, SAVED, SAVED + MORE, rank, world)
    return loaded, whole(model, opt)


@cache
def source(root: Path, spec: str, world: int, placement: str) -> tuple[Path, Whole, Whole]:
    """A checkpoint, what was saved, and how it went on without an interruption."""
    folder = root / f"{spec}-{world}-{placement}"
    answers = run_threads(world, write, SPECS[spec], replace(PLACEMENTS[placement], world=world), folder)
    for answer in answers[1:]:
        assert sum(bits_differing(a, b) for a, b in zip(answer, answers[0], strict=True)) == 0
    return folder, *answers[0]


def reshard(root: Path, spec: str, before: tuple[int, str], after: tuple[int, str]) -> tuple[int, int | None]:
    """Bits that differ after loading, and ten steps later where both placements compute alike."""
    folder, saved, straight = source(root, spec, *before)
    way = replace(PLACEMENTS[after[1]], world=after[0])
    loaded, later = 0, 0
    for found, gone_on in run_threads(after[0], read, SPECS[spec], way, folder):
        loaded += bits_differing(found, saved)
        later += bits_differing(gone_on, straight)
    # A team sums in another order than a rank on its own.
    alike = before == after or "team" not in (before[1], after[1])
    return loaded, later if alike else None


PAIRS = list(itertools.product(WORLDS, WORLDS))


QUICK = [(before, after, "plain" if (before + after) % 2 else "rich") for before, after in PAIRS]
REST = [(before, after, "rich" if (before + after) % 2 else "plain") for before, after in PAIRS]


@pytest.mark.fault("F9")
@pytest.mark.parametrize(
    ("before", "after", "spec"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.soak) for case in REST)]
)
def test_every_pair_of_world_sizes(root: Path, before: int, after: int, spec: str, figure: Figure) -> None:
    names = [name for name in PLACEMENTS if name != "team"]
    a, b = names[(before + after) % 4], names[(2 * before + after) % 4]
    loaded, later = reshard(root, spec, (before, a), (after, b))
    figure(f"{before} {a} -> {after} {b}, {spec}: {loaded} bits differ after loading, {later} ten steps later")
    assert (loaded, later) == (0, 0)


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("before", "after"), list(itertools.product(PLACEMENTS, PLACEMENTS)))
def test_every_pair_of_placements(root: Path, before: str, after: str, figure: Figure) -> None:
    loaded, later = reshard(root, "plain", (3, before), (2, after))
    figure(f"3 {before} -> 2 {after}: {loaded} bits differ after loading, {later} ten steps later")
    assert (loaded, later or 0) == (0, 0)


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("world", "spec"), [(3, "plain"), pytest.param(4, "rich", marks=pytest.mark.soak)])
def test_teams_go_on_where_they_were(root: Path, spec: str, world: int, figure: Figure) -> None:
    assert reshard(root, spec, (world, "team"), (world, "team")) == (0, 0)
    figure(f"{world} ranks in teams, {spec}: 0 bits differ after loading and ten steps later")


@pytest.mark.soak
@pytest.mark.fault("F9")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_pair_of_worlds_and_placements(root: Path, before: int, after: int, spec: str, figure: Figure) -> None:
    ways = list(itertools.product(PLACEMENTS, PLACEMENTS))
    found = {reshard(root, spec, (before, a), (after, b)) for a, b in ways}
    figure(f"{before} -> {after}, {spec}, {len(ways)} pairs of placements: (bits at the load, ten steps later) {found}")
    assert found <= {(0, 0), (0, None)}


@pytest.mark.fault("F9")
@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back(root: Path, tmp_path: Path, spec: str, figure: Figure) -> None:
    """1 -> 4 -> 2 -> 1, each saving what it loaded."""
    folder, saved, straight = source(root, spec, 1, "scatter")
    differing = 0
    for number, (world, placement) in enumerate([(4, "flat"), (2, "owner"), (1, "large")]):
        again = tmp_path / str(number)
        way = replace(PLACEMENTS[placement], world=world)
        for loaded, later in run_threads(world, read, SPECS[spec], way, folder, again):
            differing += bits_differing(loaded, saved) + bits_differing(later, straight)
        folder = again
    figure(f"1 -> 4 -> 2 -> 1, {spec}: {differing} bits differ")
    assert differing == 0


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("before", "after"), [(1, 16), (16, 1), (16, 3)])
def test_more_ranks_than_elements(tmp_path: Path, before: int, after: int, figure: Figure) -> None:
    spec = Spec(
        {
            "nothing": ((0, 3), "adamw"),
            "one": ((1,), "adamw"),
            "dot": ((1, 1), "muon"),
            "two": ((2, 1), "muon"),
            "gain": ((), "adamw"),
        }
    )
    saved, straight = run_threads(before, write, spec, Way(before), tmp_path)[0]
    differing = 0
    for loaded, later in run_threads(after, read, spec, Way(after, "flat"), tmp_path):
        differing += bits_differing(loaded, saved) + bits_differing(later, straight)
    figure(f"5 elements, {before} -> {after} ranks: {differing} bits differ")
    assert differing == 0


@pytest.mark.parametrize(
    ("before", "after"), [({}, {"fused": 3}), ({"fused": 3}, {}), ({"fused": 2}, {"fused": [2, 10]})]
)
def test_other_splits(tmp_path: Path, before: dict[str, object], after: dict[str, object]) -> None:
    """A split is how the optimizer works, not what it saves: the state is loaded, the split stays the own one."""
    saved, _ = run_threads(2, write, Spec(splits=before), Way(2, "flat"), tmp_path)[0]
    for loaded, later in run_threads(3, read, Spec(splits=after), Way(3, "flat"), tmp_path):
        assert bits_differing(loaded, saved) == 0
        straight = run_threads(1, follow, Spec(splits=after), tmp_path)[0]
        assert bits_differing(later, straight) == 0


def follow(rank: int, world: int, spec: Spec, folder: Path) -> Whole:
    return read(rank, world, spec, Way(1), folder)[1]


def test_a_parameter_added_later_has_had_fewer_updates(root: Path) -> None:
    """Otherwise AdamW's bias correction would be that of another step."""
    _, saved, _ = source(root, "rich", 2, "flat")
    updates = {name: int(count) for name, count in saved.items() if name.startswith("updates/")}
    assert {updates["updates/w.gain"], updates["updates/w.column"]} == {1}
    assert {count for name, count in updates.items() if name[10:] not in ("gain", "column")} == {SAVED}


def test_the_gatherer_sees_every_difference(root: Path) -> None:
    """One changed bit is one: the comparison of this file can fail."""
    _, saved, later = source(root, "plain", 1, "scatter")
    changed = {name: tensor.clone() for name, tensor in saved.items()}
    changed["first_moment/w.odd"].view(torch.int32)[2, 3] ^= 1 << 20
    assert bits_differing(saved, changed) == 1
    assert bits_differing(saved, later) > 1000
    assert {name.split("/")[1] for name in saved if name.startswith("weight/")} == {f"w.{name}" for name in ODD}
    assert SMALL_MB < LARGE_MB
