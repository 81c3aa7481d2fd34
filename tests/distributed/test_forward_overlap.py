"""All-gathers left under way after a step: each module's forward waits for its own, and nobody sees old values."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.overlapped import Net, advance, backward, make, same, values
from tests.distributed.scenario import digest
from tests.ranks import RankPool, run_threads

WAYS = [("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto"), ("team", "auto")]


def train(
    rank: int, world: int, group: Any, way: tuple[str, str], overlap: bool
) -> tuple[list[float], str, list[list[str]]]:
    """Losses, the parameters at the end, and which parameters kept their values through each step."""
    model, opt = make(group, way, overlap)
    losses, kept = [], []
    for step in range(3):
        with opt.no_sync():
            losses.append(backward(model, 10 + step, rank))
        losses.append(backward(model, step, rank))
        before = values(model)
        opt.step()
        kept.append([name for name, unchanged in same(model, before).items() if unchanged and "spare" not in name])
        opt.zero_grad()
    opt.finish_gathers()
    return losses, digest(model.state_dict()), kept


def threaded(rank: int, world: int, way: tuple[str, str], overlap: bool) -> tuple[list[float], str, list[list[str]]]:
    return train(rank, world, None, way, overlap)


def check(plain: list[Any], overlapped: list[Any]) -> None:
    """The layer that no forward waits for gets its values of one step at the beginning of the next."""
    used = [name for name, _ in Net().named_parameters() if "spare" not in name]
    for (losses, after, moved), (other_losses, other_after, kept) in zip(plain, overlapped, strict=True):
        assert (losses, after) == (other_losses, other_after)
        assert (moved, kept) == ([[]] * 3, [used] * 3)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bits_and_gathers_under_way(world: int, way: tuple[str, str]) -> None:
    check(run_threads(world, threaded, way, False), run_threads(world, threaded, way, True))


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_on_gloo(pool: RankPool, world: int, way: tuple[str, str]) -> None:
    check(pool.run(world, train, way, False), pool.run(world, train, way, True))


def one_module(rank: int, world: int) -> None:
    model, opt = make()
    backward(model, 0, rank)
    before = values(model)
    opt.step()
    mates = bucket_mates(opt, "layers.2.weight") | bucket_mates(opt, "layers.2.bias")
    assert mates < before.keys()
    model.layers[2](torch.ones(8))
    moved = {name for name, unchanged in same(model, before).items() if not unchanged}
    assert moved == mates
    model.layers[2](torch.ones(8))
    assert {name for name, unchanged in same(model, before).items() if not unchanged} == mates
    opt.finish_gathers()
    assert not any(same(model, before).values())


def bucket_mates(opt: Any, name: str) -> set[str]:
    (plan,) = opt.plans
    names = [spec.name for spec in plan.params]
    return {names[i] for b in plan.buckets if names.index(name) in b.params for i in b.params}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_module_waits_only_for_its_own(world: int) -> None:
    run_threads(world, one_module)


@pytest.mark.parametrize("part", ["", "layers.1"])
def test_state_dicts_hold_new_values(part: str) -> None:
    def body(rank: int, world: int) -> None:
        (model, opt), (plain, other) = make(), make(overlap=False)
        for net, optimizer in ((model, opt), (plain, other)):
            advance(net, optimizer, 0, rank)
        assert digest(model.get_submodule(part).state_dict()) == digest(plain.get_submodule(part).state_dict())
        assert digest(opt.state_dict()["state"]) == digest(other.state_dict()["state"])

    run_threads(2, body)


def test_loaded_values_are_not_overwritten() -> None:
    """An all-gather that is still under way would bring back what load_state_dict replaced."""

    def body(rank: int, world: int) -> None:
        model, opt = make()
        first = values(model)
        advance(model, opt, 0, rank)
        model.load_state_dict(first)
        opt.finish_gathers()
        backward(model, 1, rank)
        assert all(same(model, first).values())

    run_threads(2, body)


def test_next_step_finishes_what_no_module_waited_for() -> None:
    def body(rank: int, world: int) -> None:
        model, opt = make()
        advance(model, opt, 0, rank)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        opt.finish_gathers()
        plain, other = make(overlap=False)
        advance(plain, other, 0, rank)
        for p in plain.parameters():
            p.grad = torch.ones_like(p)
        other.step()
        assert digest(values(model)) == digest(values(plain))

    run_threads(2, body)
