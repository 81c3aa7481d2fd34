"""DeepSpeed checkpoints of DistMuon: bit-exact resumption, partial loads, and foreign files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.scenario import digest
from tests.ds.engines import BF16, DTYPES, advance, bits, build, config, shard_parts, weights
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


@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ep", [1, 2])
def test_08_resuming_is_bit_exact(ds2: RankPool, tmp_path: Path, ep: int, dtype: str, policy: str) -> None:
    """Silent failure 8: float32 momentum restored beside 16-bit gradients crashed or lost its precision."""
    settings = config(
        gradient_accumulation_steps=2,
        scheduler=SCHEDULER,
        params={"policy": policy, "bucket_mb": 0.004},
        **DTYPES[dtype],
    )
    for before, after in ds2.run(2, resume, settings, ep, str(tmp_path)):
        assert after == before


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


STRANGERS: dict[str, tuple[dict[str, Any], str]] = {
    "AdamW": ({"optimizer": STOCK["AdamW"]}, "not saved by DistMuon"),
    "stock Muon": ({"optimizer": STOCK["Muon"]}, "not saved by DistMuon"),
    "policy": ({"params": {"policy": "flat"}}, "another plan"),
    "buckets": ({"params": {"bucket_mb": 0.002}}, "another plan"),
    "router": ({"params": {"router": "adamw"}}, "another plan"),
}


def foreign(rank: int, world: int, group: Any, changes: dict[str, Any], folder: str) -> tuple[Any, bool]:
    """Load what another optimizer or plan saved; parameters are DeepSpeed's to load, before the optimizer."""
    other = build(config(**changes), 1)
    advance(other, 0, 2)
    other.save_checkpoint(folder)
    engine = build(config(), 1)
    advance(engine, 0, 1)
    before = digest(engine.optimizer.state_dict())
    error = attempt(lambda: engine.load_checkpoint(folder))
    return error, digest(engine.optimizer.state_dict()) == before


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_foreign_checkpoint_is_refused(ds2: RankPool, tmp_path: Path, stranger: str) -> None:
    changes, reason = STRANGERS[stranger]
    for error, unchanged in ds2.run(2, foreign, changes, str(tmp_path)):
        assert error is not None
        assert {"StateError", "ValueError"} <= set(error[0]), error
        assert reason in error[1]
        assert unchanged


def swapped(rank: int, world: int, group: Any, case: str) -> tuple[Any, bool]:
    """Hand the optimizer a list of shards that does not hold this rank's."""
    engine = build(config(), 1)
    advance(engine, 0, 1)
    own = engine.optimizer.state_dict()
    table: dict[str, list[Any]] = {"missing": [None, None], "short": [], "other": [own, own]}
    before = bits(engine)
    error = attempt(lambda: engine.optimizer.load_state_dict(table[case]))
    return error, bits(engine) == before


@pytest.mark.parametrize(("case", "failing"), [("missing", {0, 1}), ("short", {0, 1}), ("other", set())])
def test_shards_that_are_not_there(ds2: RankPool, case: str, failing: set[int]) -> None:
    for rank, (error, unchanged) in enumerate(ds2.run(2, swapped, case)):
        assert unchanged
        assert (error is not None) == (rank in failing)
        assert error is None or ("StateError" in error[0] and f"rank {rank}" in error[1])


def skipped(rank: int, world: int, group: Any) -> bool:
    """Hand the optimizer an older state that it is told not to load."""
    engine = build(config(), 1)
    older = copy.deepcopy(engine.optimizer.state_dict())
    advance(engine, 0, 1)
    before = bits(engine)
    engine.optimizer.load_state_dict([older] * world, load_optimizer_states=False)
    return bits(engine) == before


def test_optimizer_states_are_left_alone_if_told_so(ds2: RankPool) -> None:
    assert ds2.run(2, skipped) == [True, True]


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


@pytest.mark.parametrize("ep", [1, 2])
def test_12_state_is_there_before_the_first_step(ds2: RankPool, ep: int) -> None:
    """Silent failure 12: lazy state differed by rank and was lost at resumption."""
    first, second = ds2.run(2, keys, ep)
    assert first["names"] == second["names"]
    assert first["moments"] == second["moments"]
    assert first["same"]
    assert second["same"]
    assert first["filled"]
    assert second["filled"]
    assert all("master" in names and "first_moment" in names for names in first["names"].values())


def world_change(rank: int, world: int, group: Any, folder: str) -> Any:
    """Save on two ranks, or load on four what two saved."""
    engine = build(config(), 1)
    if world == 2:
        engine.save_checkpoint(folder)
        return None
    return attempt(lambda: engine.load_checkpoint(folder))


def test_another_world_size_is_refused(ds2: RankPool, ds4: RankPool, tmp_path: Path) -> None:
    """DeepSpeed itself looks at the world size first."""
    ds2.run(2, world_change, str(tmp_path))
    for error in ds4.run(4, world_change, str(tmp_path)):
        assert "world size of 2" in error[1]
