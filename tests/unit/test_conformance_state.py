"""What torch promises of state, kept by Muon and by DistMuon on one rank: it is saved, loaded, copied, hooked."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distmuon import DistMuon, Muon
from tests.distributed.scenario import digest, leaves
from tests.problems import advance, both, descend, keys, lines, loss_of, network


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict(build: Any, dtype: torch.dtype) -> None:
    """The same keys in the same order before the first step, after it, and in another optimizer."""
    found = []
    for _ in range(2):
        params, slopes = lines(dtype)
        optimizer = build(params.items(), lr=0.1)
        found.append(keys(optimizer.state_dict()))
        descend(params, slopes).float().backward()
        optimizer.step()
        found.append(keys(optimizer.state_dict()))
    assert found[0] == found[1] == found[2] == found[3]
    assert sum("moment" in path for path, _ in found[0]) >= 3


@both
@pytest.mark.parametrize("by_file", [False, True])
def test_a_loaded_optimizer_continues_bit_for_bit(build: Any, by_file: bool) -> None:
    """And shares nothing with what was loaded, which stays as it is."""
    model = network()
    optimizer = build(model.named_parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    advance(model, optimizer, 0, 2)
    scheduler.step()
    if by_file:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = copy.deepcopy(optimizer.state_dict())
    before, twin = digest(saved), copy.deepcopy(model)
    advance(model, optimizer, 2, 5)
    again = build(twin.named_parameters(), lr=0.3)
    again.load_state_dict(saved)
    advance(twin, again, 2, 5)
    assert digest(twin.state_dict()) == digest(model.state_dict())
    assert digest(again.state_dict()) == digest(optimizer.state_dict())
    assert digest(saved) == before
    after = digest(again.state_dict())
    for _, leaf in leaves(saved):
        if isinstance(leaf, Tensor):
            leaf.fill_(7.0)
    saved["param_groups"][0]["params"].clear()
    assert digest(again.state_dict()) == after


@both
def test_hooks(build: Any) -> None:
    """In order, the global ones around those of the optimizer; what a hook returns takes effect."""
    model = network()
    optimizer = build(model.named_parameters(), lr=0.05)
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 1")),
        optimizer.register_step_pre_hook(note("pre 2")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        optimizer.step(lambda: seen.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre 1", "pre 2", "closure", "post", "global post"] or seen == [
        *("pre 1", "pre 2", "global pre", "closure", "post", "global post"),
    ]
    optimizer.step()
    assert len(seen) == 6

    seen.clear()
    optimizer.register_state_dict_pre_hook(note("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": len(saved["state"])})
    optimizer.register_state_dict_post_hook(note("after saving"))
    optimizer.register_state_dict_post_hook(note("first of all"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(f"epoch {given.pop('epoch') > 0}"))
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "param_groups": other})
    optimizer.register_load_state_dict_post_hook(note("after loading"))
    saved = optimizer.state_dict()
    other = [{**group, "lr": 0.5} for group in saved["param_groups"]]
    optimizer.load_state_dict(saved)
    assert seen == ["before saving", "first of all", "after saving", "epoch True", "after loading"]
    assert "epoch" in saved
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@both
def test_it_can_be_printed(build: Any) -> None:
    text = repr(build(network().named_parameters(), lr=0.05))
    assert text.startswith(build.__name__)
    assert "weight_decay: 0.1" in text


@both
@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)])
def test_a_copy_of_model_and_optimizer(build: Any, rate: Any) -> None:
    """Both go on alike, and neither moves the other."""
    model = network()
    optimizer = build([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}], lr=rate)
    advance(model, optimizer, 0, 2)
    (loss_of(model) * torch.inf).backward()
    optimizer.step()
    late = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    twin, again = copy.deepcopy((model, optimizer))
    assert type(again) is build
    assert again.settings == optimizer.settings
    assert [again.skipped_steps, again._skipped_in_a_row] == [1, 1]
    assert digest(again.state_dict()) == digest(optimizer.state_dict())
    frozen = digest((twin.state_dict(), again.state_dict()))
    advance(model, optimizer, 2, 4)
    assert digest((twin.state_dict(), again.state_dict())) == frozen
    advance(twin, again, 2, 4)
    assert digest(twin.state_dict()) == digest(model.state_dict())
    assert digest(again.state_dict()) == digest(optimizer.state_dict())
    again.add_param_group({"params": [Parameter(torch.ones(3, 3))]})
    assert len(again.param_groups) == len(optimizer.param_groups) + 1
    assert again.param_groups[-1]["lr"] == optimizer.param_groups[2]["lr"]


def test_pickling() -> None:
    """A single-device optimizer can be pickled with its parameters; a sharded one says what to save instead."""
    model = network()
    optimizer = Muon(model.named_parameters(), lr=0.05, max_grad_norm=0.5)
    advance(model, optimizer, 0, 2)
    twin, again = pickle.loads(pickle.dumps((model, optimizer)))  # noqa: S301
    advance(model, optimizer, 2, 3)
    advance(twin, again, 2, 3)
    assert digest(twin.state_dict()) == digest(model.state_dict())
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(DistMuon(model.named_parameters()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_reduces_in_backward(backend: str) -> None:
    ends = []
    for compiled in (False, True):
        model = network()
        optimizer = DistMuon(model.named_parameters(), lr=0.05, bucket_mb=1e-5)
        assert len(optimizer.reductions) > 1
        run = torch.compile(model, backend=backend) if compiled else model
        for step in range(2):
            optimizer.zero_grad()
            loss_of(run, step).backward()
            assert all(reduction.launched for reduction in optimizer.reductions)
            optimizer.step()
        ends.append(digest(model.state_dict()))
    assert ends[0] == ends[1]
