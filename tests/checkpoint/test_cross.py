"""One checkpoint for both optimizers: DistMuon to Muon and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from distmuon import checkpoint
from tests.checkpoint.scene import Figure, Spec, Way, Whole, bits_differing, build, join_late, train, whole
from tests.ranks import run_threads

ALONE = Way(alone=True)
SPECS = {
    "float32": Spec(),
    "bfloat16": Spec(dtype="bfloat16", dtypes={"norm": "float32"}, frozen=("odd",), tied="tall", apart=("square",)),
    "split and late": Spec(splits={"fused": 3}, late=("gain", "row")),
}


def relay(rank: int, world: int, spec: Spec, way: Way, folder: Path, first: int) -> tuple[Whole, Whole]:
    """State as it is found, after two more steps it is saved."""
    model, opt = build(spec, way, seed=8)
    join_late(model, spec, opt)
    if first:
        assert checkpoint.load(folder, model, opt).step == first
    found = whole(model, opt)
    train(model, opt, spec, first, first + 2, rank, world)
    checkpoint.save(folder, model, opt, step=first + 2)
    return found, whole(model, opt)


def straight(rank: int, world: int, spec: Spec, steps: int) -> Whole:
    """The same training without an interruption."""
    model, opt = build(spec, ALONE, seed=8)
    join_late(model, spec, opt)
    train(model, opt, spec, 0, steps)
    return whole(model, opt)


@pytest.mark.fault("F9")
@pytest.mark.parametrize("spec", SPECS)
def test_from_one_optimizer_to_the_other_and_back(tmp_path: Path, spec: str, figure: Figure) -> None:
    ways = [Way(2, "flat"), ALONE, Way(3, transport="owner"), ALONE, Way(1)]
    before: Whole | None = None
    differing = 0
    for number, way in enumerate(ways):
        answers = run_threads(way.world, relay, SPECS[spec], way, tmp_path, 2 * number)
        differing += sum(0 if before is None else bits_differing(found, before) for found, _ in answers)
        before = answers[-1][1]
    assert before is not None
    differing += bits_differing(before, run_threads(1, straight, SPECS[spec], 2 * len(ways))[0])
    figure(f"DistMuon -> Muon -> DistMuon -> Muon -> DistMuon, {spec}: {differing} bits differ")
    assert differing == 0


def test_muon_needs_no_process_group(tmp_path: Path) -> None:
    """Saved and loaded in a process that never heard of ranks."""
    spec = SPECS["bfloat16"]
    model, opt = build(spec, ALONE)
    train(model, opt, spec, 0, 2)
    path = checkpoint.save(tmp_path, model, opt, step=2, extra={"epoch": 1})
    again, fresh = build(spec, ALONE, seed=8)
    restored = checkpoint.load(tmp_path, again, fresh)
    assert (restored.step, restored.extra, restored.path) == (2, {"epoch": 1}, path)
    assert bits_differing(whole(model, opt), whole(again, fresh)) == 0


def test_before_the_first_step(tmp_path: Path) -> None:
    """Muon makes its state in the first step; what is saved before is what that step starts from."""
    spec = SPECS["bfloat16"]
    model, opt = build(spec, ALONE)
    start = whole(model, opt)
    checkpoint.save(tmp_path, model, opt, step=0)
    for way in (ALONE, Way(2, "flat")):
        for found in run_threads(way.world, loaded, spec, way, tmp_path):
            assert bits_differing(found, start) == 0


def loaded(rank: int, world: int, spec: Spec, way: Way, folder: Path) -> Whole:
    model, opt = build(spec, way, seed=8)
    train(model, opt, spec, 5, 6, rank, world)
    checkpoint.load(folder, model, opt)
    return whole(model, opt)
