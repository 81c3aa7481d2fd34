"""What torch promises of state, kept by DistMuon on several ranks: it is saved, loaded, copied; models are compiled."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import distmuon
from distmuon.errors import ConfigError, RankMismatchError
from tests.distributed.scenario import Case, backward, digest, gradients, leaves, optimizer, parameters
from tests.problems import keys, loss_of, network
from tests.ranks import RankPool, run_threads


def step(params: dict[str, Parameter], opt: Any, number: int, rank: int, world: int) -> None:
    opt.zero_grad()
    backward(params, gradients(Case(), number, 0, rank, world))
    opt.step()


def copy_and_go_on(rank: int, world: int, group: Any, case: dict[str, Any]) -> list[str]:
    params = parameters(Case(**case).torch_dtype)
    opt = optimizer(params, Case(**case), group)
    step(params, opt, 0, rank, world)
    opt.add_param_group({"params": [("late", Parameter(torch.ones(6, 8)))]})
    step(params, opt, 1, rank, world)
    backward(params, gradients(Case(), 9, 0, rank, world))
    twins, twin = copy.deepcopy((params, opt))
    opt.zero_grad()
    before = digest((twins, twin.state_dict()))
    assert before == digest((params, opt.state_dict()))
    step(params, opt, 2, rank, world)
    assert digest((twins, twin.state_dict())) == before
    step(twins, twin, 2, rank, world)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    return [digest((params, opt.state_dict())), digest((twins, twin.state_dict())), digest(params), digest(twins)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["balanced", "flat", "team"])
def test_a_copy_goes_on_like_the_original(policy: str, dtype: str) -> None:
    for world in (2, 3):
        results = run_threads(world, copy_and_go_on, None, {"policy": policy, "dtype": dtype})
        assert all(first == second for first, second, _, _ in results)
        assert len({p for ends in results for p in ends[2:]}) == 1


def test_a_copy_in_processes(pool: RankPool) -> None:
    results = pool.run(2, copy_and_go_on, {})
    assert all(first == second for first, second, _, _ in results)


def test_a_copy_shares_nothing_that_changes() -> None:
    def body(rank: int, world: int) -> list[str]:
        params = parameters()
        opt = optimizer(params, Case())
        step(params, opt, 0, rank, world)
        twin = copy.deepcopy(opt)
        # Gradients are not copied, hence no clipping of them; torch forgets that it has warned.
        assert vars(opt).keys() - vars(twin).keys() <= {"_clip", "_warned_capturable_if_run_uncaptured"}
        shared = [key for key, value in vars(twin).items() if value is vars(opt)[key] and value is not None]
        assert twin.group.traffic is not opt.group.traffic
        return [key for key in shared if not isinstance(vars(opt)[key], int | float | str)]

    frozen = ["settings", "_adamw", "_waves"]
    for shared in run_threads(2, body):
        assert set(shared) <= set(frozen)


def test_a_copied_module_that_waited_for_gathers() -> None:
    def body(rank: int, world: int) -> str:
        model = network()
        opt = distmuon.DistMuon(model.named_parameters(), lr=0.1)
        opt.overlap_forward(model)
        loss_of(model).backward()
        opt.step()
        opt.finish_gathers()
        twin, again = copy.deepcopy((model, opt))
        for each, its in ((model, opt), (twin, again)):
            its.zero_grad()
            loss_of(each, 1).backward()
            its.step()
        opt.finish_gathers()
        assert digest(twin.state_dict()) == digest(model.state_dict())
        return digest(model.state_dict())

    assert len(set(run_threads(2, body))) == 1


def test_state_dict_and_hooks() -> None:
    """Equal keys before the first step and after, on every rank; files load with weights_only; hooks in order."""

    def body(rank: int, world: int) -> list[Any]:
        params = parameters()
        opt = optimizer(params, Case())
        seen: list[str] = []
        opt.register_step_pre_hook(lambda *_: seen.append("pre"))
        opt.register_step_post_hook(lambda *_: seen.append("post"))
        opt.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": 1})
        opt.register_load_state_dict_pre_hook(lambda _, saved: seen.append(f"epoch {saved.pop('epoch')}"))
        opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
        before = keys(opt.state_dict())
        step(params, opt, 0, rank, world)
        assert keys(opt.state_dict()) == before
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert keys(saved) == before
        end = digest(opt.state_dict())
        step(params, opt, 1, rank, world)
        assert digest(opt.state_dict()) != end
        opt.load_state_dict(saved)
        assert digest(opt.state_dict()) == end
        for _, leaf in leaves(saved):
            if isinstance(leaf, torch.Tensor):
                leaf.fill_(3.0)
        assert digest(opt.state_dict()) == end
        return [*seen, [path for path, _ in before]]

    results = run_threads(2, body)
    assert results[0] == results[1]
    assert results[0][:-1] == ["pre", "post", "pre", "post", "epoch 1", "loaded"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_illegal_setting_in_a_state_dict(everywhere: bool) -> None:
    def body(rank: int, world: int) -> str:
        opt = optimizer(parameters(), Case())
        before = digest(opt.state_dict())
        saved = copy.deepcopy(opt.state_dict())
        if everywhere or rank == 1:
            saved["param_groups"][1]["eps"] = float("nan")
        with pytest.raises(ConfigError if everywhere else RankMismatchError, match='"eps" = nan') as caught:
            opt.load_state_dict(saved)
        assert digest(opt.state_dict()) == before
        return str(caught.value)

    assert len(set(run_threads(2, body))) == 1


def compiled(rank: int, world: int, group: Any) -> list[Any]:
    ends = []
    for backend in (None, "aot_eager"):
        model = network()
        opt = distmuon.DistMuon(model.named_parameters(), lr=0.05, bucket_mb=1e-5, process_group=group)
        run = torch.compile(model, backend=backend) if backend else model
        launched = []
        for number in range(2):
            opt.zero_grad()
            loss_of(run, 10 * number + rank).backward()
            launched.append(sum(reduction.launched for reduction in opt.reductions) / len(opt.reductions))
            opt.step()
        ends.append((digest(model.state_dict()), launched))
    dist.barrier(group)
    return ends


def test_a_compiled_model_in_processes(pool: RankPool) -> None:
    results = pool.run(2, compiled, timeout=90.0)
    ends = {end for ranks in results for end, _ in ranks}
    assert len(ends) == 1
    assert all(launched == [1.0, 1.0] for ranks in results for _, launched in ranks)
