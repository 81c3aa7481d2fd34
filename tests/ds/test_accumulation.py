"""Skipped steps, and the ways in which DeepSpeed lets a user accumulate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ds.engines import DTYPES, advance, batch, bits, build, config, count_orthogonalized, forward, weights
from tests.ds.session import attempt
from tests.ranks import RankPool

MICRO = 2


def managed(engine: Any, step: int) -> None:
    """The engine counts micro-batches."""
    advance(engine, step, step + 1)


def torch_style(engine: Any, step: int) -> None:
    """The user calls backward on the loss; DeepSpeed divides by the number of micro-batches in its hooks."""
    for micro in range(MICRO):
        forward(engine, step, micro).backward()  # type: ignore[no-untyped-call]
        engine.step()


def boundary(engine: Any, step: int) -> None:
    """The user names the last micro-batch, and steps once."""
    for micro in range(MICRO):
        engine.set_gradient_accumulation_boundary(micro + 1 == MICRO)
        engine.backward(forward(engine, step, micro))
    engine.step()


def unmanaged(engine: Any, step: int) -> None:
    """The step is the boundary."""
    for micro in range(MICRO):
        engine.backward(forward(engine, step, micro))
    engine.step()


def no_sync(engine: Any, step: int) -> None:
    """All but the last backward run without reductions; the user divides the loss."""
    with engine.no_sync():
        for micro in range(MICRO - 1):
            engine.backward(forward(engine, step, micro) / MICRO)
    engine.backward(forward(engine, step, MICRO - 1) / MICRO)
    engine.step()


ACCUMULATED = {"gradient_accumulation_steps": MICRO}
# (how a step is taken, configuration)
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch style": (torch_style, ACCUMULATED),
    "boundary": (boundary, ACCUMULATED),
    "unmanaged": (unmanaged, {**ACCUMULATED, "managed_gradient_accumulation": False}),
    "no_sync": (no_sync, {}),
}


def train_both_ways(rank: int, world: int, group: Any, way: str, ep: int, dtype: str) -> tuple[Any, Any]:
    """Bits, norms and step counts after three steps in one way and in the engine's own."""
    take, changes = WAYS[way]
    seen = []
    for step_fn, settings in ((managed, ACCUMULATED), (take, changes)):
        engine = build(config(**settings, **DTYPES[dtype]), ep)
        for step in range(3):
            step_fn(engine, step)
        seen.append((*bits(engine), engine.get_global_grad_norm(), engine.global_steps))
    return seen[0], seen[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_accumulate_gives_the_same_bits(ds2: RankPool, way: str, ep: int, dtype: str) -> None:
    for found, want in ds2.run(2, train_both_ways, way, ep, dtype):
        assert found == want


def repeat(rank: int, world: int, group: Any, gas: int) -> tuple[dict[str, Any], int]:
    """Train on one micro-batch, given ``gas`` times a step."""
    with count_orthogonalized() as batches:
        engine = build(config(gradient_accumulation_steps=gas), 1)
        for step in range(3):
            for _ in range(gas):
                engine.backward(forward(engine, step, 0))
                engine.step()
    return {name: p.numpy() for name, p in weights(engine).items()}, sum(batches)


@pytest.mark.fault("S5")
def test_05_momentum_advances_once_per_step(ds2: RankPool, figure: Callable[[str], None]) -> None:
    """Silent failure 5: ZeRO-3 momentum advanced, and Newton-Schulz ran, with every micro-batch."""
    once, often = ds2.run(2, repeat, 1), ds2.run(2, repeat, 4)
    for (few, calls), (many, same) in zip(once, often, strict=True):
        figure(f"DeepSpeed: {calls} orthogonalizations with 1 micro-batch a step, {same} with 4, in 3 steps")
        assert calls == same
        for name, value in few.items():
            torch.testing.assert_close(torch.tensor(many[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def overflow(rank: int, world: int, group: Any, settings: Any, ep: int, poison: float, at: int) -> dict[str, Any]:
    """Train with one bad gradient on the last rank."""
    engine = build(settings, ep)
    advance(engine, 0, at)
    before, lr, steps = bits(engine), engine.get_lr(), engine.global_steps
    loss = forward(engine, at, 0)
    engine.backward(loss * poison if rank == world - 1 else loss)
    engine.step()
    seen = {
        "same bits": bits(engine) == before,
        "same lr": engine.get_lr() == lr,
        "skipped": engine.skipped_steps,
        "overflow": engine.optimizer.overflow,
        "steps": engine.global_steps - steps,
        "applied": engine.was_step_applied(),
    }
    clean = build(settings, ep)
    advance(clean, 0, at)
    advance(engine, at, at + 2)
    advance(clean, at, at + 2)
    return {**seen, "as if it had not been": bits(engine) == bits(clean), "over": not engine.optimizer.overflow}


@pytest.mark.parametrize(("ep", "dtype"), [(1, "fp32"), (2, "fp32"), (2, "bf16 in fp32")])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(
    ds2: RankPool, at: int, poison: float, ep: int, dtype: str
) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.05}}
    settings = config(scheduler=scheduler, **DTYPES[dtype])
    for seen in ds2.run(2, overflow, settings, ep, poison, at):
        assert seen == {
            **dict.fromkeys(("same bits", "same lr", "overflow", "as if it had not been", "over"), True),
            **{"skipped": 1, "steps": 1, "applied": False},
        }


def two_backwards(rank: int, world: int, group: Any) -> Any:
    """Run a second backward after the one that the engine reduced."""
    engine = build(config(), None)
    engine.backward(forward(engine, 0, 0))
    return attempt(lambda: engine.backward(forward(engine, 0, 1)))


def test_a_backward_after_the_reduction_is_refused(ds2: RankPool) -> None:
    for error in ds2.run(2, two_backwards):
        assert "SynchronizationError" in error[0]
        assert "no_sync" in error[1]


def idle(rank: int, world: int, group: Any) -> tuple[bool, str]:
    """Leave the hidden layer without a gradient on the last rank."""
    engine = build(config(params={"bucket_mb": 0.001}), None)
    before = weights(engine)
    for step in range(2):
        loss = forward(engine, step, 0)
        if dist.get_rank() == world - 1:
            loss = engine.module.head(engine.module.embed(batch(step, 0, rank)[0])).square().mean()
        engine.backward(loss)
        engine.step()
    moved = [not torch.equal(before[name], after) for name, after in weights(engine).items()]
    return all(moved), bits(engine)[0]


def test_a_layer_unused_on_one_rank_is_still_trained(ds2: RankPool) -> None:
    first, second = ds2.run(2, idle)
    assert first == second
    assert first[0]


def coalesced(rank: int, world: int, group: Any) -> Any:
    """Use the engine's context for several backwards with one reduction."""
    engine = build(config(), None)

    def step() -> None:
        with engine.coalesce_grad_reduction():
            engine.backward(forward(engine, 0, 0))
        engine.step()

    return attempt(step)


def test_coalesced_reductions_are_refused(ds2: RankPool) -> None:
    """DeepSpeed names the wrapper; no_sync does the same."""
    for error in ds2.run(2, coalesced):
        assert "NotImplementedError" in error[0]
        assert "ZeroDistMuon" in error[1]
