"""DeepSpeed checkpoints of DistMuon: bit-exact resumption, partial loads, and foreign files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.scenario import digest
from tests.ds.engines import BF16, DTYPES, advance, bits, build, config, forward, shard_parts, weights
from tests.ds.session import STOCK, attempt
from tests.ranks import RankPool

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.05, "warmup_num_steps": 6}}
Snapshot = tuple[Any, ...]


def snapshot(engine: Any) -> Snapshot:
    """Everything that training depends on."""
    counters = engine.global_steps, engine.global_samples, engine.skipped_steps
    schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler else None
    return *bits(engine), engine.get_lr(), counters, schedule


def resume(rank: int, world: int, group: Any, settings: Any, ep: int, folder: str) -> tuple[Snapshot, Snapshot]:
    """Save, go on, and go on once more from a fresh engine that loads."""
    first = build(settings, ep)
    advance(first, 0, 3)
    first.save_checkpoint(folder)
    advance(first, 3, 6)
    second = build(settings, ep)
    advance(second, 7, 8)  # state to be overwritten
    path, _ = second.load_checkpoint(folder)
    assert path is not None
    advance(second, 3, 6)
    return snapshot(first), snapshot(second)


@pytest.mark.fault("S8", "F8")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ep", [1, 2])
def test_08_resuming_is_bit_exact(
    ds2: RankPool, tmp_path: Path, ep: int, dtype: str, policy: str, figure: Callable[[str], None]
) -> None:
    """Silent failure 8: float32 momentum restored beside 16-bit gradients crashed or lost its precision."""
    settings = config(
        gradient_accumulation_steps=2,
        scheduler=SCHEDULER,
        params={"policy": policy, "bucket_mb": 0.004},
        **DTYPES[dtype],
    )
    ranks = ds2.run(2, resume, settings, ep, str(tmp_path))
    equal = sum(after == before for before, after in ranks)
    figure(f"DeepSpeed, {dtype}, {policy}, ep_size {ep}: {equal} of 2 ranks equal an uninterrupted run in every bit")
    assert equal == 2


def partial(rank: int, world: int, group: Any, settings: Any, folder: str, how: dict[str, bool]) -> dict[str, Any]:
    """Load a checkpoint without its optimizer state."""
    first = build(settings, 2)
    advance(first, 0, 3)
    first.save_checkpoint(folder)
    second = build(settings, 2)
    path, _ = second.load_checkpoint(folder, **how)
    assert path is not None
    masters = shard_parts(second, "master")
    flat = {name: p.detach().float().flatten() for name, p in second.named.items()}
    result = {
        "weights": digest(weights(second)) == digest(weights(first)),
        "moments": sum(float(part.abs().sum()) for _, _, part in shard_parts(second, "first_moment")),
        "masters": all(torch.equal(part, flat[n][at : at + part.numel()]) for n, at, part in masters),
        "steps": second.global_steps,
    }
    advance(second, 3, 4)
    result["moved"] = digest(weights(second)) != digest(weights(first))
    return result


@pytest.mark.parametrize("how", ["load_module_only", "load_optimizer_states"])
def test_loading_weights_only_starts_from_fresh_state(ds2: RankPool, tmp_path: Path, how: str) -> None:
    for seen in ds2.run(2, partial, config(**BF16), str(tmp_path), {how: how == "load_module_only"}):
        assert seen == {
            **{"weights": True, "moments": 0.0, "masters": True, "moved": True},
            "steps": 0 if how == "load_module_only" else 3,
        }


def from_16_bit(rank: int, world: int, group: Any, folder: str, exact: bool) -> tuple[bool, bool, bool]:
    """Resume with or without the saved master weights."""
    settings = config(**BF16, zero_optimization={"stage": 1, "load_from_fp32_weights": exact})
    first = build(settings, 1)
    advance(first, 0, 3)
    first.save_checkpoint(folder)
    second = build(settings, 1)
    second.load_checkpoint(folder)
    flat = {name: p.detach().float().flatten() for name, p in second.named.items()}
    found, saved = shard_parts(second, "master"), shard_parts(first, "master")
    rounded = all(torch.equal(part, flat[n][at : at + part.numel()]) for n, at, part in found)
    kept = all(torch.equal(a[2], b[2]) for a, b in zip(found, saved, strict=True))
    moments = zip(shard_parts(second, "first_moment"), shard_parts(first, "first_moment"), strict=True)
    return rounded, kept, all(torch.equal(a[2], b[2]) for a, b in moments)


@pytest.mark.parametrize("exact", [True, False])
def test_load_from_fp32_weights(ds2: RankPool, tmp_path: Path, exact: bool) -> None:
    """Off, the master weights restart from the 16-bit parameters; the moments are restored either way."""
    for rounded, kept, moments in ds2.run(2, from_16_bit, str(tmp_path), exact):
        assert (rounded, kept, moments) == (not exact, exact, True)


STRANGERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "AdamW": ({"optimizer": STOCK["AdamW"]}, "CheckpointError", "not saved by DistMuon"),
    "stock Muon": ({"optimizer": STOCK["Muon"]}, "CheckpointError", "not saved by DistMuon"),
    "router": ({"params": {"router": "adamw"}}, "StateError", "gate.wg.weight"),
}


def foreign(rank: int, world: int, group: Any, changes: dict[str, Any], folder: str) -> tuple[Any, bool]:
    """Load what another optimizer, or one with other rules, saved."""
    other = build(config(**changes), 1)
    advance(other, 0, 2)
    other.save_checkpoint(folder)
    engine = build(config(), 1)
    advance(engine, 0, 1)
    before = bits(engine)
    error = attempt(lambda: engine.load_checkpoint(folder))
    return error, bits(engine) == before


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_foreign_checkpoint_is_refused(ds2: RankPool, tmp_path: Path, stranger: str) -> None:
    changes, kind, reason = STRANGERS[stranger]
    for error, unchanged in ds2.run(2, foreign, changes, str(tmp_path)):
        assert error is not None
        assert {kind, "ValueError"} <= set(error[0]), error
        assert reason in error[1]
        assert unchanged


def keys(rank: int, world: int, group: Any, ep: int) -> dict[str, Any]:
    """Names, shapes and sums of the state before the first step and after it."""
    engine = build(config(**BF16), ep)
    before = engine.optimizer.state_dict()["state"]
    names = {index: sorted(entry) for index, entry in before.items()}
    shapes = {i: {k: tuple(v.shape) for k, v in e.items() if hasattr(v, "shape")} for i, e in before.items()}
    advance(engine, 0, 1)
    after = engine.optimizer.state_dict()["state"]
    return {
        "names": names,
        "moments": {index: entry["first_moment"].shape for index, entry in before.items()},
        "same": names == {index: sorted(entry) for index, entry in after.items()}
        and shapes == {i: {k: tuple(v.shape) for k, v in e.items() if hasattr(v, "shape")} for i, e in after.items()},
        "filled": all(bool(entry["first_moment"].abs().sum() > 0) for entry in after.values()),
    }


@pytest.mark.fault("S12", "F13")
@pytest.mark.parametrize("ep", [1, 2])
def test_12_state_is_there_before_the_first_step(ds2: RankPool, ep: int, figure: Callable[[str], None]) -> None:
    """Silent failure 12: lazy state differed by rank and was lost at resumption."""
    first, second = ds2.run(2, keys, ep)
    figure(f"DeepSpeed, ep_size {ep}: {first['same'] + second['same']} of 2 ranks have all state before the first step")
    assert first["names"] == second["names"]
    assert first["moments"] == second["moments"]
    assert first["same"]
    assert second["same"]
    assert first["filled"]
    assert second["filled"]
    assert all("master" in names and "first_moment" in names for names in first["names"].values())


def train_exactly(engine: Any, first: int, last: int, ep: int) -> None:
    """Steps whose mean gradients are exact functions of step and global name, whatever the ranks."""
    for step in range(first, last):
        loss = torch.zeros(())
        for name, parameter in engine.named.items():
            source = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
            noise = torch.randint(-8, 9, parameter.shape, generator=source) / 64
            # Experts are summed over the ranks that have them and divided by all.
            share = 1 if getattr(parameter, "allreduce", True) else ep
            loss = loss + (parameter.float() * noise * share).sum()
        forward(engine, step, 0)
        engine.backward(loss)
        engine.step()


def named_state(engine: Any) -> dict[str, list[float]]:
    """This rank's state: section, global name and first element, to values."""
    sections = engine.optimizer.reductions[0].bucket.state().keys() - {"second_moment"}
    return {
        f"{section}/{name}/{first + number}": value
        for section in sections
        for name, first, part in shard_parts(engine, section)
        for number, value in enumerate(part.flatten().tolist())
    }


def reshaped(rank: int, world: int, group: Any, ep: int, folder: str, settings: Any, load: bool) -> tuple[Any, ...]:
    """Train, save and go on; or load what others saved, and go on."""
    engine = build(settings, ep)
    if load:
        train_exactly(engine, 7, 8, ep)
        path, client = engine.load_checkpoint(folder)
        assert path is not None
        assert (client, engine.global_steps) == ({"samples": 8}, 2)
    else:
        train_exactly(engine, 0, 2, ep)
        engine.save_checkpoint(folder, client_state={"samples": 8})
    state = named_state(engine)
    train_exactly(engine, 2, 4, ep)
    return state, {name: digest(value) for name, value in weights(engine).items()}, engine.get_lr()


@pytest.mark.fault("F9")
@pytest.mark.parametrize("dtype", ["fp32", "bf16 in fp32"])
@pytest.mark.parametrize(("before", "after"), [((2, 1), (4, 2)), ((2, 2), (4, 1)), ((4, 2), (2, 1)), ((4, 4), (2, 2))])
def test_world_and_expert_parallel_size_may_change(
    ds2: RankPool, ds4: RankPool, tmp_path: Path, before: Any, after: Any, dtype: str, figure: Any
) -> None:
    settings = config(scheduler=SCHEDULER, params={"bucket_mb": 0.004}, **DTYPES[dtype])
    pools = {2: ds2, 4: ds4}
    saved = pools[before[0]].run(before[0], reshaped, before[1], str(tmp_path), settings, False)
    settings["optimizer"]["params"]["policy"] = "flat"
    loaded = pools[after[0]].run(after[0], reshaped, after[1], str(tmp_path), settings, True)

    def whole(results: list[Any], part: int) -> dict[str, Any]:
        return {key: value for result in results for key, value in result[part].items()}

    assert whole(loaded, 0) == whole(saved, 0)
    assert whole(loaded, 1) == whole(saved, 1)
    assert len({tuple(result[2]) for result in [*saved, *loaded]}) == 1
    figure(
        f"DeepSpeed {before[0]} ranks, ep_size {before[1]} to {after[0]} ranks, ep_size {after[1]}: "
        f"{len(whole(saved, 0))} values of state and 2 more steps, 0 bits differ"
    )


def repeated(rank: int, world: int, group: Any, folder: str) -> tuple[Any, ...]:
    """One tag twice, then a schedule of another class, then a directory that one rank does not see."""
    engine = build(config(scheduler=SCHEDULER), 1)
    engine.save_checkpoint(folder, tag="best")
    advance(engine, 0, 1)
    engine.save_checkpoint(folder, tag="best", client_state={"again": True})
    _, client = engine.load_checkpoint(folder, tag="best")
    other = build(config(), 1, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5))
    before = bits(other)
    schedule = attempt(lambda: other.load_checkpoint(folder))
    hidden = attempt(lambda: other.load_checkpoint(folder if rank == 0 else f"{folder}/nothing"))
    return client, schedule, hidden, bits(other) == before


def test_tags_schedules_and_directories(ds2: RankPool, tmp_path: Path) -> None:
    for client, schedule, hidden, unchanged in ds2.run(2, repeated, str(tmp_path)):
        assert client == {"again": True}
        assert "StateError" in schedule[0]
        assert "StepLR needs" in schedule[1]
        assert "CheckpointError" in hidden[0]
        assert "ranks [1] see no checkpoint" in hidden[1]
        assert unchanged


def plateau(rank: int, world: int, group: Any, folder: str) -> tuple[float, float, int]:
    """A schedule whose state has an infinity and one whose keys are numbers."""
    schedules = torch.optim.lr_scheduler
    engine = build(config(), 1, lr_scheduler=lambda optimizer: schedules.MultiStepLR(optimizer, [2, 2, 9]))
    engine.lr_scheduler.best = float("inf")
    engine.save_checkpoint(folder)
    engine.lr_scheduler.best = 0.0
    engine.lr_scheduler.milestones = Counter()
    engine.load_checkpoint(folder)
    return engine.lr_scheduler.best, engine.get_lr()[0], engine.lr_scheduler.milestones[2]


def test_schedules_with_odd_state(ds2: RankPool, tmp_path: Path) -> None:
    for best, rate, twice in ds2.run(2, plateau, str(tmp_path)):
        assert (best, rate, twice) == (float("inf"), 0.02, 2)
