"""The machine that times were taken on, in words that name no host."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# From here on other work on the machine shows in the ratios.
BUSY = 1.5


def describe(device: torch.device, threads: int, clock: str) -> dict[str, Any]:
    """Describe what computes.

    Args:
        device: CPU or CUDA.
        threads: CPU threads.
        clock: what is timed.

    Returns:
        A record.
    """
    flags = _cpu_field("flags").split()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_field("model name"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "threads": threads,
        "clock": clock,
        "load_before": load(),
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "triton")},
    }


def load() -> float:
    """Processes that wanted a CPU in the last minute, on average.

    Returns:
        The number.
    """
    return round(os.getloadavg()[0], 2)


def sentence(machine: dict[str, Any]) -> str:
    """Say it.

    Args:
        machine: what ``describe`` returned.

    Returns:
        One line, two where the machine is busy.
    """
    units = ", ".join([machine["instructions"], *machine["bfloat16_units"]])
    said = f"{machine['device']} ({units}), {machine['threads']} thread(s), {machine['clock']}"
    said += f", torch {machine['versions']['torch']}"
    if machine["load_before"] > BUSY:
        said += f"\nThe machine is busy (load {machine['load_before']}): shared caches and memory show in the ratios."
    return said


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == name]
    return found[0] if found else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
