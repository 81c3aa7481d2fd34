"""What a run's numbers depend on besides its configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distmuon.routing import Route
from distmuon.train.config import RunConfig
from distmuon.train.metrics import RoutedModule


def environment(run: RunConfig) -> dict[str, Any]:
    """Describe machine, versions and number formats.

    Args:
        run: the configuration.

    Returns:
        Plain values for the run's metadata.
    """
    return {
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "distmuon": _version("distmuon"),
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "cores": os.cpu_count(),
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "git": _git_commit(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "autocast": run.precision.autocast,
        "parameters": run.precision.parameters,
    }


def routing_summary(table: Sequence[Route], model: nn.Module) -> list[RoutedModule]:
    """Condense a routing table to one row per kind and reason.

    Args:
        table: the routes.
        model: the model they belong to.

    Returns:
        Rows for the report.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for route in table:
        elements, tensors = rows.get((route.reason, route.kind), (0, 0))
        rows[route.reason, route.kind] = elements + sizes[route.name], tensors + 1
    return [
        RoutedModule(module=reason, kind=kind, parameters=elements, tensors=tensors)
        for (reason, kind), (elements, tensors) in rows.items()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
