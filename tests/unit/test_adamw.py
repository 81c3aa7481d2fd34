"""The AdamW backends: torch's rule, and NVIDIA apex's FusedAdam by a stand-in that behaves as it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon import DistMuon
from distmuon.adamw import ApexAdamW, choose_adamw
from distmuon.errors import ConfigError
from distmuon.update import adamw_

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class FusedAdam(torch.optim.Optimizer):
    """NVIDIA apex's class: the same signature, the same state, the step counted in the group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if master_weights and not capturable:
            raise RuntimeError("Master weights is currently only supported with the capturable version.")
        values = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, values)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.steps_seen: list[int] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            self.steps_seen.append(group["step"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._kernel(parameter, parameter.grad, self.state[parameter], group)

    def _kernel(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert weight.dtype == grad.dtype == torch.float32
        assert weight.shape == grad.shape
        if len(state) == 0:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.copy_(beta1 * first + (1 - beta1) * grad)
        second.copy_(beta2 * second + (1 - beta2) * grad * grad)
        corrections = [1.0, 1.0]
        if group["bias_correction"]:
            corrections = [1 - beta1 ** group["step"], 1 - beta2 ** group["step"]]
        update = (first / corrections[0]) / ((second / corrections[1]).sqrt() + group["eps"])
        assert self.adam_w_mode
        weight.sub_(group["lr"] * (update + group["weight_decay"] * weight))


def module(name: str, package: bool, **content: Any) -> ModuleType:
    found = ModuleType(name)
    found.__spec__ = ModuleSpec(name, None, is_package=package)
    if package:
        found.__path__ = []
    found.__dict__.update(content)
    return found


@pytest.fixture
def nvidia_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = module("apex.optimizers", package=False, FusedAdam=FusedAdam)
    monkeypatch.setitem(sys.modules, "apex", module("apex", package=True, optimizers=optimizers))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)


def web_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package called apex on PyPI: importable, a package, about something else."""
    monkeypatch.setitem(sys.modules, "apex", module("apex", package=True, RateLimit=object))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)


def other_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apex with optimizers that lacks the one in question."""
    monkeypatch.setitem(sys.modules, "apex", module("apex", package=True))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module("apex.optimizers", package=False))


ABSENT = [no_apex, web_toolkit, other_optimizers]


def values(count: int, numel: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.usefixtures("nvidia_apex")
def test_cpu_takes_torch_even_with_apex(backend: Any) -> None:
    assert choose_adamw(backend, CPU) is adamw_


@pytest.mark.usefixtures("nvidia_apex")
def test_cuda_takes_apex_unless_told_otherwise() -> None:
    assert isinstance(choose_adamw("auto", CUDA), ApexAdamW)
    assert isinstance(choose_adamw("apex", CUDA), ApexAdamW)
    assert isinstance(choose_adamw("apex", CPU), ApexAdamW)
    assert choose_adamw("torch", CUDA) is adamw_


@pytest.mark.parametrize("install", ABSENT)
def test_auto_without_nvidias_apex(
    install: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert choose_adamw("auto", CUDA) is adamw_
    assert choose_adamw("auto", CPU) is adamw_


@pytest.mark.parametrize("install", ABSENT)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_asked_for_and_absent(
    install: Callable[[pytest.MonkeyPatch], None], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match='^adamw_backend = "apex" needs NVIDIA apex, which is not importable here; '):
        choose_adamw("apex", device)


@pytest.mark.parametrize("install", ABSENT)
def test_the_optimizer_names_the_setting(
    install: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match="adamw_backend"):
        DistMuon([torch.nn.Parameter(torch.ones(3))], adamw_backend="apex")


def test_apex_is_torchs_rule() -> None:
    """Several shards through one FusedAdam: each has its own state, length, settings and step number."""
    apex = ApexAdamW(FusedAdam)
    shards = [(40, SETTINGS), (7, SETTINGS | {"lr": 0.5, "weight_decay": 0.0}), (1, SETTINGS | {"betas": (0.5, 0.6)})]
    ours = [[values(1, n)[0], torch.zeros(n), torch.zeros(n)] for n, _ in shards]
    theirs = [[tensor.clone() for tensor in shard] for shard in ours]
    for step in range(1, 6):
        for index, (numel, setting) in enumerate(shards):
            (grad,) = values(1, numel, seed=step)
            before, pointers = grad.clone(), [tensor.data_ptr() for tensor in theirs[index]]
            adamw_(ours[index][0], grad, *ours[index][1:], step=step, **setting)
            apex(theirs[index][0], grad, *theirs[index][1:], step=step, **setting)
            for mine, other in zip(ours[index], theirs[index], strict=True):
                torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-6)
            assert torch.equal(grad, before)
            assert [tensor.data_ptr() for tensor in theirs[index]] == pointers


def test_apex_writes_into_a_view() -> None:
    apex = ApexAdamW(FusedAdam)
    buffer, grad = torch.ones(10), torch.ones(4)
    first, second = torch.zeros(4), torch.zeros(4)
    apex(buffer[3:7], grad, first, second, step=1, **SETTINGS)
    assert bool((buffer[3:7] < 1).all())
    assert torch.equal(buffer[:3], torch.ones(3))
    assert torch.equal(buffer[7:], torch.ones(3))
    torch.testing.assert_close(first, torch.full((4,), 0.1))


def test_apex_counts_as_we_do_after_a_resumption() -> None:
    """FusedAdam adds one to the group's step: starting at update 7 must be corrected as update 7."""
    apex = ApexAdamW(FusedAdam)
    start, grad, first, second = values(4, 9)
    ours = [start.clone(), first.clone(), second.abs()]
    theirs = [tensor.clone() for tensor in ours]
    adamw_(ours[0], grad, ours[1], ours[2], step=7, **SETTINGS)
    apex(theirs[0], grad, theirs[1], theirs[2], step=7, **SETTINGS)
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-6, atol=1e-6)
    assert apex._optimizer.steps_seen == [7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("nvidia_apex")
def test_end_to_end(dtype: torch.dtype) -> None:
    """Two groups with settings of their own, matrices beside them, and a step that is skipped."""
    results = []
    for backend in ("torch", "apex"):
        tensors = [values(1, n, seed=n)[0].to(dtype) for n in (24, 9, 5)]
        params = [torch.nn.Parameter(t) for t in (tensors[0].view(4, 6), *tensors[1:])]
        groups = [
            {"params": params[:1], "kind": "muon"},
            {"params": params[1:2], "kind": "adamw", "lr": 0.5},
            {"params": params[2:], "kind": "adamw", "weight_decay": 0.0},
        ]
        optimizer = DistMuon(groups, lr=0.1, adamw_backend=backend)
        for step in range(4):
            for parameter in params:
                noise = values(1, parameter.numel(), seed=step)[0].view(parameter.shape).to(dtype)
                noise = noise * float("nan") if step == 2 else noise
                (parameter * noise).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == 1
        results.append([p.detach().clone() for p in params])
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5 if dtype == torch.float32 else 0.008, atol=1e-6)
