"""From a run configuration to a DeepSpeed engine."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distmuon.routing import Routes, routes
from distmuon.train.config import OptimizerConfig, RunConfig, ScheduleConfig


def join_ranks(timeout_s: float = 600.0) -> None:
    """Initialize torch.distributed for the ranks that torchrun or deepspeed started, or for one rank alone.

    Args:
        timeout_s: seconds after which a rank that waits for another one ends with an error.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if not torch.cuda.is_available():
        # On a CPU, DeepSpeed would compile a shared-memory extension for about a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        _join_attempt(timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def _join_attempt(timeout: timedelta) -> None:
    """Join the ranks of this attempt only: torchrun's store still has the addresses of those it restarted."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shared = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", shared)  # type: ignore[attr-defined]
    backend = deepspeed.get_accelerator().communication_backend_name()
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, None, timeout, world, rank, store)


def device() -> torch.device:
    """Where this rank's model lives."""
    return torch.device(deepspeed.get_accelerator().current_device_name())


def quiet_deepspeed() -> None:
    """Let DeepSpeed log warnings and errors only."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def build_engine(run: RunConfig, model: nn.Module) -> Any:
    """Wrap a model in a DeepSpeed engine with the run's optimizer and schedule.

    Args:
        run: the configuration.
        model: the model, its weights equal on all ranks.

    Returns:
        The DeepSpeedEngine.
    """
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(run.optimizer, model),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, rate(run.schedule)),
        config=deepspeed_config(run, dist.get_world_size()),
    )
    return engine


def deepspeed_config(run: RunConfig, world: int) -> dict[str, Any]:
    """Express a run as DeepSpeed JSON.

    Args:
        run: the configuration.
        world: number of ranks.

    Returns:
        The DeepSpeed configuration.
    """
    o = run.optimizer
    if o.name == "deepspeed-adamw":
        betas = [o.beta1, o.beta2]
        params: dict[str, Any] = {"lr": o.lr, "betas": betas, "eps": o.eps, "torch_adam": True}
        optimizer = {"type": "AdamW", "params": params}
    else:
        params = {
            "lr": o.lr,
            "weight_decay": o.weight_decay,
            "momentum": o.momentum,
            "nesterov": o.nesterov,
            "adamw_betas": [o.beta1, o.beta2],
            "adamw_eps": o.eps,
            "policy": o.policy,
            "transport": o.transport,
            "bucket_mb": o.bucket_mb,
            "overlap_forward": o.overlap_forward,
            "ns": o.ns.model_dump(),
            "router": o.router,
        }
        optimizer = {"type": "DistMuon", "params": params}
    bf16 = run.precision.parameters == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": run.batch.micro_sequences,
        "gradient_accumulation_steps": run.accumulation(world),
        "gradient_clipping": o.gradient_clipping,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": bf16},
        # 16-bit gradients are accumulated and reduced in float32, which costs bytes and no accuracy.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"} if bf16 else {},
        "optimizer": optimizer,
        "steps_per_print": 2**31 - 1,
    }


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Sort parameters by rule, learning rate and weight decay.

    Args:
        config: the optimizer settings.
        model: the model.

    Returns:
        Groups for ``deepspeed.initialize``. DeepSpeed needs the names when it splits off expert groups.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for route in route_model(config, model):
        parameter = parameters[route.name]
        part = "matrices" if route.kind == "muon" else "gains" if parameter.ndim < 2 else "embeddings"
        if route.reason == "router" and route.kind == "adamw":
            part = "routers"
        group = groups.setdefault(
            part,
            {
                "params": [],
                "name": part,
                "lr": config.embedding_lr if part == "embeddings" else config.lr,
                "weight_decay": 0.0 if part == "gains" else config.weight_decay,
            },
        )
        if config.name != "deepspeed-adamw":
            group["kind"] = "muon" if config.name == "distmuon" and route.kind == "muon" else "adamw"
        group["params"].append(parameter)
    return list(groups.values())


def route_model(config: OptimizerConfig, model: nn.Module) -> Routes:
    """Route a model's parameters as the run's optimizer does.

    Args:
        config: the optimizer settings.
        model: the model.

    Returns:
        The routing table.
    """
    return routes(model, config.router)


def rate(schedule: ScheduleConfig) -> Callable[[int], float]:
    """Linear warm-up and cosine decay.

    Args:
        schedule: the schedule.

    Returns:
        Function from the number of finished updates to the share of the peak learning rate.
    """
    warmup = round(schedule.warmup * schedule.updates)

    def share(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        progress = min(1.0, (update - warmup) / max(1, schedule.updates - warmup))
        return schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return share


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
