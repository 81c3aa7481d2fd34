"""A checkpoint of another model, or a model of another checkpoint: refused by name on every rank, nothing changed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch import nn

from distmuon import checkpoint
from distmuon.errors import CheckpointError, StateError
from tests.checkpoint.scene import Spec, Way, bits_differing, build, train, whole
from tests.ranks import run_threads

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "tall": ((12, 6), "muon"),
    "square": ((8, 8), "muon"),
    "table": ((9, 4), "adamw"),
    "norm": ((7,), "adamw"),
}
SPEC = Spec(SHAPES)


def without(*names: str) -> Spec:
    return Spec({name: entry for name, entry in SHAPES.items() if name not in names})


STRANGERS: dict[str, tuple[Spec, str]] = {
    "a shape": (Spec({**SHAPES, "square": ((8, 9), "muon")}), "w.square"),
    "a transposed shape": (Spec({**SHAPES, "tall": ((6, 12), "muon")}), "w.tall"),
    "more dimensions": (Spec({**SHAPES, "tall": ((1, 12, 6), "muon")}), "w.tall"),
    "a dtype": (replace(SPEC, dtypes={"square": "bfloat16"}), "w.square"),
    "all dtypes": (replace(SPEC, dtype="bfloat16"), "w."),
    "a kind": (Spec({**SHAPES, "square": ((8, 8), "adamw")}), "w.square"),
    "another kind": (Spec({**SHAPES, "table": ((9, 4), "muon")}), "w.table"),
    "a name": (Spec({**{n: e for n, e in SHAPES.items() if n != "norm"}, "gain": ((7,), "adamw")}), "w."),
    "one more": (Spec({**SHAPES, "more": ((3, 3), "muon")}), "w.more"),
    "one less": (without("square"), "w.square"),
    "frozen": (replace(SPEC, frozen=("table",)), "w.table"),
}


@pytest.fixture(scope="module")
def saved() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        run_threads(2, write, SPEC, Path(name))
        yield Path(name)


def write(rank: int, world: int, spec: Spec, folder: Path) -> None:
    model, opt = build(spec, Way(world))
    train(model, opt, spec, 0, 2, rank, world)
    checkpoint.save(folder, model, opt, step=2)


def attempt(rank: int, world: int, spec: Spec, way: Way, folder: Path, own: dict[int, Spec]) -> tuple[str, str, int]:
    """Class and text of the error, and bits that changed; some ranks may have models of their own."""
    spec = own.get(rank, spec)
    model, opt = build(spec, way, seed=8)
    train(model, opt, spec, 5, 6, rank, world)
    before = whole(model, opt)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    try:
        checkpoint.load(folder, model, opt)
    except (StateError, CheckpointError) as error:
        differing = bits_differing(whole(model, opt), before)
        assert settings == [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
        return type(error).__name__, str(error), differing
    return "", "", 0


@pytest.mark.parametrize("way", [Way(1, alone=True), Way(2), Way(3, "flat")], ids=["Muon", "2", "3"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_model_is_refused(saved: Path, stranger: str, way: Way) -> None:
    spec, name = STRANGERS[stranger]
    answers = run_threads(way.world, attempt, spec, way, saved, {})
    assert len({message for _, message, _ in answers}) == 1
    for kind, message, differing in answers:
        assert kind == "StateError"
        assert name in message
        assert differing == 0


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, stranger: str) -> None:
    """The other way round."""
    spec, name = STRANGERS[stranger]
    run_threads(2, write, spec, tmp_path)
    for kind, message, differing in run_threads(2, attempt, SPEC, Way(2), tmp_path, {}):
        assert (kind, differing) == ("StateError", 0)
        assert name in message


def test_a_missing_setting_is_refused(saved: Path, tmp_path: Path) -> None:
    """One group of the optimizer, two of the checkpoint with settings of their own, or the reverse."""
    apart = replace(SPEC, apart=("norm",))
    run_threads(2, write, apart, tmp_path)
    for kind, message, differing in run_threads(2, attempt, SPEC, Way(2), tmp_path, {}):
        assert (kind, differing) == ("StateError", 0)
        assert "w.norm" in message or "w.table" in message


def test_settings_follow_names(saved: Path) -> None:
    """Groups may be divided further: each gets the settings that its parameters had."""
    model, opt = build(replace(SPEC, apart=("norm",)), Way(alone=True), seed=8)
    assert opt.param_groups[2]["lr"] != 0.02
    checkpoint.load(saved, model, opt)
    assert [group["lr"] for group in opt.param_groups] == [0.125, 0.02, 0.02]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.1, 0.1]


def experts_differ(rank: int, world: int, folder: Path, failing: int) -> tuple[str, str, int]:
    """One rank asks for a tensor that nobody has saved: by its own names."""
    model, opt = build(SPEC, Way(world), seed=8)
    before = whole(model, opt)
    rename = {"w.norm": "w.unknown"} if rank == failing else None
    try:
        checkpoint.load(folder, model, opt, rename=rename)
    except (StateError, CheckpointError) as error:
        return type(error).__name__, str(error), bits_differing(whole(model, opt), before)
    return "", "", 0


@pytest.mark.parametrize("failing", [0, 2])
def test_what_does_not_fit_one_rank_fits_none(saved: Path, failing: int) -> None:
    answers = run_threads(3, experts_differ, saved, failing)
    assert len({message for _, message, _ in answers}) == 1
    for kind, message, differing in answers:
        assert kind in ("StateError", "CheckpointError")
        assert "w.unknown" in message
        assert differing == 0


def test_buffers_count(saved: Path) -> None:
    model, opt = build(SPEC, Way(alone=True), seed=8)
    model.register_buffer("more", model.running.clone())
    with pytest.raises(StateError, match="more"):
        checkpoint.load(saved, model, opt)
    model, opt = build(SPEC, Way(alone=True), seed=8)
    del model.running
    with pytest.raises(StateError, match="running"):
        checkpoint.load(saved, model, opt)


def test_an_optimizer_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    model, opt = build(SPEC, Way(alone=True))
    other, _ = build(SPEC, Way(alone=True))
    with pytest.raises(StateError):
        checkpoint.save(tmp_path, other, opt, step=1)
    with pytest.raises(StateError):
        checkpoint.load(saved, other, opt)
    assert not list(tmp_path.glob("step_*"))
    del model


def test_names_come_from_the_model(saved: Path) -> None:
    """Not from what the optimizer was given: a list of tensors has no names."""
    model, _ = build(SPEC, Way(alone=True), seed=8)
    matrices = [p for name, p in model.w.items() if SHAPES[name][1] == "muon"]
    others = [p for name, p in model.w.items() if SHAPES[name][1] == "adamw"]
    import distmuon

    opt = distmuon.Muon([{"params": matrices, "kind": "muon"}, {"params": others, "kind": "adamw"}])
    checkpoint.load(saved, model, opt)
    want, twin = build(SPEC, Way(alone=True))
    checkpoint.load(saved, want, twin)
    assert bits_differing(whole(model, opt), whole(want, twin)) == 0


def test_a_wrapped_model_has_other_names(saved: Path) -> None:
    """And ``rename`` gives them back."""
    inner, opt = build(SPEC, Way(alone=True), seed=8)
    wrapped = nn.Sequential(inner)
    with pytest.raises(StateError, match=r"0\.w\."):
        checkpoint.load(saved, wrapped, opt)
    checkpoint.load(saved, wrapped, opt, rename=lambda name: name.removeprefix("0."))
    model, twin = build(SPEC, Way(alone=True))
    checkpoint.load(saved, model, twin)
    assert bits_differing(whole(model, twin), whole(inner, opt)) == 0


def test_order_of_parameters_and_groups_does_not_matter(saved: Path) -> None:
    turned = Spec(dict(reversed(SHAPES.items())))
    model, opt = build(turned, Way(alone=True), seed=8)
    checkpoint.load(saved, model, opt)
    want, twin = build(SPEC, Way(alone=True))
    checkpoint.load(saved, want, twin)
    assert bits_differing(whole(model, opt), whole(want, twin)) == 0


def test_two_names_of_one(tmp_path: Path) -> None:
    model, opt = build(SPEC, Way(alone=True))
    with pytest.raises(CheckpointError, match="w.norm"):
        checkpoint.save(tmp_path, model, opt, step=1, rename={"w.table": "w.norm"})
    assert not list(tmp_path.glob("step_*"))


def test_the_checkpoint_survives_being_refused(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    run_threads(2, attempt, without("norm"), Way(2), copy, {})
    assert checkpoint.verify(copy).step == 2


def diverge(rank: int, world: int, folder: Path, name: str) -> str:
    """Ranks whose models are not equal: what is saved of them is one rank's."""
    spec = replace(SPEC, frozen=("norm",))
    model, opt = build(spec, Way(world))
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    tensor.data.view(-1)[0] = rank
    try:
        checkpoint.save(folder, model, opt, step=1)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_frozen_weight_that_differs_by_rank_is_refused(tmp_path: Path) -> None:
    messages = run_threads(3, diverge, tmp_path, "w.norm")
    assert len(set(messages)) == 1
    assert "w.norm" in messages[0]
    assert not list(tmp_path.glob("step_*"))


def test_a_buffer_that_differs_by_rank_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Running statistics are nobody's fault; that one rank's are kept has to be said."""
    with caplog.at_level(logging.WARNING, "distmuon"):
        assert run_threads(3, diverge, tmp_path, "running") == [""] * 3
    assert any("running" in record.getMessage() for record in caplog.records)
    assert not any("counts" in record.getMessage() for record in caplog.records)
    model, opt = build(SPEC, Way(alone=True), seed=8)
    checkpoint.load(tmp_path, model)
    assert model.running[0, 0] == 0
    del opt
