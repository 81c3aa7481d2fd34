"""Odd but legal ways to use the optimizer, and the order of calls it refuses."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import distmuon
from distmuon.errors import SynchronizationError
from tests.distributed.scenario import (
    EXACT_NS,
    LARGE_MB,
    MODEL,
    SMALL_MB,
    Case,
    Gradients,
    Run,
    accumulate,
    backward,
    digest,
    gradients,
    optimizer,
    oracle,
    parameters,
    plain,
    train,
    update_error,
)
from tests.oracle import relative
from tests.ranks import run_threads

Figure = Callable[[str], None]


def test_second_backward_is_refused() -> None:
    """A forgotten no_sync is named, with the parameter, on every rank; zero_grad makes it usable."""

    def body(rank: int, world: int) -> tuple[str, Run]:
        params = parameters()
        opt = optimizer(params, Case())
        backward(params, gradients(Case(), 5, 0, rank, world))
        with pytest.raises(SynchronizationError) as caught:
            backward(params, gradients(Case(), 6, 0, rank, world))
        opt.zero_grad()
        backward(params, gradients(Case(), 0, 0, rank, world))
        opt.step()
        return str(caught.value), Run(plain(params))

    results = run_threads(2, body)
    assert all(any(name in message for name in MODEL) and "no_sync" in message for message, _ in results)
    against = oracle(Case())
    against.step([gradients(Case(), 0, 0, rank, 2) for rank in range(2)])
    assert update_error(results[0][1], against) < EXACT_NS


@pytest.mark.parametrize("bucket_mb", [SMALL_MB, LARGE_MB])
@pytest.mark.parametrize("quiet", [False, True])
def test_abandoned_backward(quiet: bool, bucket_mb: float) -> None:
    """zero_grad throws an abandoned pass away, reduced or not, whole or partial."""
    some = ("wide", "embed")

    def body(rank: int, world: int) -> Run:
        params = parameters()
        opt = optimizer(params, Case(bucket_mb=bucket_mb))
        left = {name: g for name, g in gradients(Case(), 9, 0, rank, world).items() if not quiet or name in some}
        if quiet:
            with opt.no_sync():
                backward(params, left)
        else:
            backward(params, left)
        opt.zero_grad()
        backward(params, gradients(Case(), 0, 0, rank, world))
        opt.step()
        return Run(plain(params))

    against = oracle(Case())
    against.step([gradients(Case(), 0, 0, rank, 3) for rank in range(3)])
    for run in run_threads(3, body):
        assert update_error(run, against) < EXACT_NS


def test_gradient_accumulated_without_no_sync_on_fewer_parameters() -> None:
    """Micro-batches that touch different parameters add up when all but the last are behind no_sync."""
    case = Case(accumulation=2, clip=1.0)

    def source(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
        full = gradients(case, step, micro, rank, world)
        return {name: g if (list(MODEL).index(name) + micro + rank) % 2 else None for name, g in full.items()}

    against = oracle(case)
    for step in range(case.steps):
        against.step([accumulate([source(case, step, m, rank, 2) for m in range(2)]) for rank in range(2)])
    for run in run_threads(2, train, case, None, source):
        assert update_error(run, against) < EXACT_NS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_not_modified(dtype: torch.dtype) -> None:
    def body(rank: int, world: int) -> None:
        params = parameters(dtype)
        opt = optimizer(params, Case(clip=0.1))
        given = gradients(Case(dtype=str(dtype).removeprefix("torch.")), 0, 0, rank, world)
        backward(params, given)
        assert digest([p.grad for p in params.values()]) == digest(list(given.values()))
        opt.step()
        assert digest([p.grad for p in params.values()]) == digest(list(given.values()))

    run_threads(2, body)


def test_closure() -> None:
    """The closure runs once, with gradients enabled, and its loss comes back."""

    def body(rank: int, world: int) -> Run:
        params = parameters()
        opt = optimizer(params, Case())
        calls = []

        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            backward(params, gradients(Case(), 0, 0, rank, world))
            return 4.5

        assert opt.step(closure) == 4.5
        assert calls == [True]
        opt.zero_grad()
        assert all(p.grad is None for p in params.values())
        return Run(plain(params))

    against = oracle(Case())
    against.step([gradients(Case(), 0, 0, rank, 2) for rank in range(2)])
    assert update_error(run_threads(2, body)[0], against) < EXACT_NS


@pytest.mark.parametrize("by_hand", [False, True])
def test_gradients_that_stay(by_hand: bool) -> None:
    """As in torch.optim: without zero_grad they add up, and a step without backward uses them again."""
    case = Case(clip=1.0)

    def body(rank: int, world: int) -> Run:
        params = parameters()
        opt = optimizer(params, case)
        for step in range(2):
            if by_hand:
                for name, gradient in total(rank, step).items():
                    params[name].grad = gradient
            else:
                backward(params, gradients(case, step, 0, rank, world))
            opt.step()
        opt.step()
        return Run(plain(params))

    def total(rank: int, step: int) -> Gradients:
        return accumulate([gradients(case, earlier, 0, rank, 2) for earlier in range(step + 1)])

    against = oracle(case)
    for step in (0, 1, 1):
        against.step([total(rank, step) for rank in range(2)])
    for run in run_threads(2, body):
        assert update_error(run, against) < EXACT_NS


class Tied(nn.Module):
    """Embedding and output share one weight; one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=source))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of predicting the same tokens."""
        logits = self.head(self.frozen(self.hidden(self.embed(tokens)).tanh()))
        return nn.functional.cross_entropy(logits, tokens)


@pytest.mark.fault("F13", "F16")
@pytest.mark.parametrize("give", ["named_parameters", "param_groups"])
def test_tied_and_frozen_parameters(give: str, figure: Figure) -> None:
    """Two ranks learn what one rank learns from both batches, whatever order backward comes in."""

    def batch(rank: int, step: int) -> torch.Tensor:
        return torch.randint(0, 12, (16,), generator=torch.Generator().manual_seed(10 * step + rank))

    def body(rank: int, world: int) -> tuple[str, torch.Tensor, float, float]:
        model = Tied()
        given = model.named_parameters() if give == "named_parameters" else distmuon.param_groups(model)
        opt = distmuon.DistMuon(given, lr=0.1, bucket_mb=SMALL_MB, ns=distmuon.NewtonSchulz(dtype="float32"))
        frozen = digest(list(model.frozen.parameters()))
        losses = []
        for step in range(10):
            mine = [batch(rank, step)] if world == 2 else [batch(0, step), batch(1, step)]
            loss = model(torch.cat(mine))
            losses.append(float(loss.detach()))
            loss.backward()
            opt.step()
            opt.zero_grad()
        assert digest(list(model.frozen.parameters())) == frozen
        assert model.head.weight is model.embed.weight
        moved = torch.cat([p.detach().flatten() for p in model.parameters()])
        return digest(list(model.parameters())), moved, losses[0], losses[-1]

    first, second = run_threads(2, body)
    (alone,) = run_threads(1, body)
    assert first[0] == second[0]
    off = relative(first[1], alone[1])
    figure(f"tied and frozen layers, {give}: 2 equal ranks, {off:.1e} from one rank on both batches")
    assert off < 1e-4
    assert alone[3] < 0.8 * alone[2]


def test_replaced_optimizer_is_forgotten() -> None:
    """A second optimizer over the same parameters takes over once the first is gone."""

    def body(rank: int, world: int) -> Run:
        params = parameters()
        for attempt in range(2):
            opt = optimizer(params, Case())
            for step in range(1 + attempt):
                backward(params, gradients(Case(), step, 0, rank, world))
                if attempt:
                    opt.step()
                for p in params.values():
                    p.grad = None
            del opt
            gc.collect()
        return Run(plain(params))

    against = oracle(Case())
    for step in range(2):
        against.step([gradients(Case(), step, 0, rank, 2) for rank in range(2)])
    for run in run_threads(2, body):
        assert update_error(run, against) < EXACT_NS


@pytest.mark.fault("F16")
def test_one_parameter_on_four_ranks(figure: Figure) -> None:
    """Fewer elements than ranks, and more ranks than matrices."""

    def body(rank: int, world: int) -> list[float]:
        w, b = Parameter(torch.ones(3, 2)), Parameter(torch.ones(1))
        groups = [{"params": [("w", w)], "kind": "muon"}, {"params": [("b", b)], "kind": "adamw"}]
        opt = distmuon.DistMuon(groups, lr=0.1, ns=distmuon.NewtonSchulz(dtype="float32"))
        for _ in range(2):
            ((w * (rank + 1)).sum() + b.sum()).backward()
            opt.step()
            opt.zero_grad()
        return [*w.flatten().tolist(), *b.tolist()]

    alone = run_threads(1, lambda rank, world: body(1, 1))[0]
    ranks = run_threads(4, body)
    worst = max(abs(a / b - 1) for values in ranks for a, b in zip(values, alone, strict=True))
    figure(f"one matrix and one element on 4 ranks: values within {worst:.1e} of one rank's")
    assert worst < 1e-5


@pytest.mark.fault("F16")
def test_empty_parameter(figure: Figure) -> None:
    """A parameter without elements is carried along."""

    def body(rank: int, world: int) -> list[str]:
        params = {"wide": Parameter(torch.ones(8, 32)), "nothing": Parameter(torch.zeros(0, 4))}
        opt = optimizer(params, Case())
        for step in range(2):
            params["wide"].square().sum().mul(1.0 + step).backward()
            opt.step()
            opt.zero_grad()
        return [digest(params), digest(params["wide"])]

    results = run_threads(2, body)
    assert results[0] == results[1]
    figure(f"beside a parameter without elements: {len({rank for rank, _ in results})} set of bits on 2 ranks")
    assert results[0][1] != digest(torch.ones(8, 32))
