"""All-gathers left under way: uses that no module's forward announces, torch's own layers, hooks and lifetimes."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distmuon
from distmuon.errors import SynchronizationError
from tests.distributed.overlapped import Net, advance, backward, make, same, values
from tests.distributed.scenario import digest
from tests.ranks import RankPool, run_threads


class Borrower(nn.Module):
    """Multiplies by its own weight and by one that belongs to another module."""

    def __init__(self, own: nn.Module, other: Tensor) -> None:
        super().__init__()
        self.own, self.others = own, (other,)

    def forward(self, x: Tensor) -> Tensor:
        """Both products."""
        return F.linear(self.own(x), *self.others)


@pytest.mark.parametrize("bucket_mb", [0.0002, 25.0])
@pytest.mark.parametrize(("own", "other"), [(0, 3), (3, 0), (None, 1)])
def test_use_without_the_module_is_refused(own: int | None, other: int, bucket_mb: float) -> None:
    """It might have read old values; named in backward, whatever the order of buckets; otherwise legal."""

    def body(rank: int, world: int) -> str:
        model, opt = make(bucket_mb=bucket_mb)
        advance(model, opt, 0, rank)
        borrowed = model.get_parameter(f"layers.{other}.weight")
        use = Borrower(nn.Identity() if own is None else model.layers[own], borrowed)
        with pytest.raises(SynchronizationError) as caught:
            use(torch.ones(8)).sum().backward()
        opt.zero_grad()
        opt.finish_gathers()
        use(torch.ones(8)).sum().backward()
        opt.step()
        return str(caught.value)

    for message in run_threads(2, body):
        assert f'"layers.{other}.weight"' in message
        assert "finish_gathers" in message


def test_without_gradients_everything_is_waited_for() -> None:
    """No backward could tell that what comes next read old values."""

    def body(rank: int, world: int) -> None:
        model, opt = make()
        backward(model, 0, rank)
        before = values(model)
        opt.step()
        with torch.no_grad():
            model.layers[0](torch.ones(8))
        assert not any(same(model, before).values())

    run_threads(2, body)


class Attention(nn.Module):
    """A layer of torch's own, which reads weights of its submodules without calling them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Loss of predicting the same tokens."""
        return F.cross_entropy(self.head(self.encoder(self.embed(tokens))).mT, tokens)


def attend(rank: int, world: int, group: Any, overlap: bool) -> tuple[list[float], str]:
    model = Attention()
    opt = distmuon.DistMuon(distmuon.param_groups(model), 0.1, bucket_mb=0.0002, process_group=group)
    if overlap:
        opt.overlap_forward(model)
    losses = []
    for step in range(3):
        tokens = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = model(tokens)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step == 1:
            with torch.no_grad():
                losses.append(float(model.eval()(tokens)))
            model.train()
        losses.append(float(loss.detach()))
    return losses, digest(model.state_dict())


def test_attention_of_torch(pool: RankPool) -> None:
    """In training and in evaluation, where it takes another path."""
    assert pool.run(2, attend, True) == pool.run(2, attend, False)


def hooks(model: nn.Module) -> list[int]:
    """Number of the hooks that ``overlap_forward`` may set on the modules."""
    kinds = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def test_hooked_again() -> None:
    """The same model has no hook twice, another model's are gone, and nothing under way is lost."""

    def body(rank: int, world: int) -> None:
        model, opt = make()
        once = hooks(model)
        backward(model, 0, rank)
        before = values(model)
        opt.step()
        opt.overlap_forward(model)
        assert not any(same(model, before).values())
        assert hooks(model) == once
        other = Net()
        opt.overlap_forward(other)
        assert set(hooks(model)) == {0}
        assert hooks(other) == once

    run_threads(2, body)


def test_the_optimizer_is_not_kept_alive() -> None:
    """Not by the hooks of its model; on one thread, since two cannot collect garbage at a time."""
    model, opt = make()
    advance(model, opt, 0, 0)
    opt.finish_gathers()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    backward(model, 1, 0)
    model.state_dict()


@pytest.mark.parametrize("read", ["forward", "state_dict"])
def test_the_last_step_outlives_the_optimizer(read: str) -> None:
    """A function that trains and returns the model returns it with its last update."""

    def fit(overlap: bool) -> Net:
        model, opt = make(overlap=overlap)
        advance(model, opt, 0, 0)
        return model

    model, plain = fit(True), fit(False)
    gc.collect()
    if read == "forward":
        with torch.no_grad():
            assert torch.equal(model(torch.arange(20)), plain(torch.arange(20)))
    else:
        assert digest(model.state_dict()) == digest(plain.state_dict())
