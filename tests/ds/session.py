"""DeepSpeed in a process of the pool; knows nothing of distmuon, so that import orders can be tested."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@functools.cache
def deepspeed() -> Any:
    """Import and initialize DeepSpeed without its C++ extensions; returns the package."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
    import deepspeed as package

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    package.init_distributed("gloo", verbose=False)
    return package


def attempt(fn: Callable[[], Any]) -> tuple[list[str], str] | None:
    """Classes and text of the error that ``fn`` raises, None if it raises none."""
    try:
        fn()
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return None


# DeepSpeed takes keys out of these tables; without torch_adam it compiles an extension.
STOCK = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "Muon": {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}},
    "SGD": {"type": "SGD", "params": {"lr": 0.01}},
}


def one_step(optimizer: Any, stage: int) -> tuple[str, str, list[float]]:
    """Wrapper class, wrapped class, and the parameters after a step of a stock engine."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": copy.deepcopy(optimizer),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed().initialize(model=model, model_parameters=model.parameters(), config=settings)
    engine.backward(engine(torch.arange(16.0).view(2, 8)).square().mean())
    engine.step()
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return type(engine.optimizer).__name__, type(inner).__name__, values


def stock_steps() -> dict[str, Any]:
    """One step of each stock optimizer at stages 0 and 1."""
    return {f"{name} {stage}": one_step(table, stage) for name, table in STOCK.items() for stage in (0, 1)}


def import_late(rank: int, world: int, group: Any) -> dict[str, Any]:
    """What stock optimizers and the name DistMuon do before and after distmuon is imported."""
    assert "distmuon" not in sys.modules
    deepspeed()
    seen: dict[str, Any] = {"stock before": stock_steps()}
    seen["refused"] = attempt(lambda: one_step({"type": "DistMuon"}, 1))
    import distmuon  # noqa: F401

    seen["stock after"] = stock_steps()
    seen["late"] = one_step({"type": "DistMuon"}, 1)
    seen["short"] = one_step("DistMuon", 1)
    return seen
