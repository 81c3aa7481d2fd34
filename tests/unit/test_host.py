"""Which matrix products run where, and what is said if the ones that were asked for cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distmuon.kernels import cpu_float32, host
from distmuon.kernels.cpu import CpuProducts
from distmuon.kernels.products import TorchProducts

REPO = Path(__file__).resolve().parents[2]
CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
PROBE = """
import sys
import torch
import distmuon.newton_schulz as ns
from distmuon.ns_settings import NewtonSchulz
ns.orthogonalize(torch.ones(4, 6))
ns.orthogonalize(torch.ones(4, 6), NewtonSchulz(kernels="torch", dtype="float32"))
print([name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("distmuon.kernels.triton")])
"""
INTERPRETED = """
import os
import torch
from distmuon.kernels import host
from distmuon.kernels.triton_ops import momentum_cast
cpu = torch.device("cpu")
print(type(host.products(cpu, "triton")).__name__, type(host.products(cpu, "auto")).__name__)
assert host.fused_momentum(cpu, "triton") is momentum_cast
os.environ["DISTMUON_KERNELS"] = "triton"
print(type(host.products(cpu, "auto")).__name__, type(host.products(cpu, "torch")).__name__)
"""
VARIABLE = "DISTMUON_KERNELS"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without findings or settings from elsewhere."""
    monkeypatch.delenv(VARIABLE, raising=False)
    caches: tuple[Any, ...] = (host._missing, host._say_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("device", "choice", "found"),
    [(CPU, "auto", CpuProducts), (CPU, "torch", TorchProducts), (META, "torch", TorchProducts)],
)
def test_choices(device: torch.device, choice: Any, found: type) -> None:
    assert type(host.products(device, choice)) is found
    assert host.fused_momentum(device, choice) is None


@pytest.mark.parametrize(("value", "found"), [("auto", CpuProducts), ("torch", TorchProducts)])
def test_the_environment_decides_for_auto(monkeypatch: pytest.MonkeyPatch, value: str, found: type) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert type(host.products(CPU, "auto")) is found


def test_the_environment_does_not_decide_for_other_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("triton", "cuda", ""):
        monkeypatch.setenv(VARIABLE, value)
        assert type(host.products(CPU, "torch")) is TorchProducts


@pytest.mark.parametrize("value", ["", "cuda", "TORCH", "torch "])
def test_illegal_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    for ask in (host.products, host.fused_momentum):
        with pytest.raises(ValueError, match=f'^{VARIABLE} = "{value}" is not legal; use one of auto, torch, triton.$'):
            ask(CPU, "auto")


def test_triton_is_refused_on_a_cpu_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "cannot run on cpu: Triton runs on a CPU only in its interpreter, TRITON_INTERPRET=1; use"
    for ask in (host.products, host.fused_momentum):
        with pytest.raises(ValueError, match=f'^kernels = "triton" {reason} "auto" or "torch".$'):
            ask(CPU, "triton")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=f'^{VARIABLE} = "triton" {reason} "auto" or "torch".$'):
        host.products(CPU, "auto")


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    for device in (CPU, META):
        with pytest.raises(ValueError, match=f"cannot run on {device}: Triton 3.4 or later is not installed"):
            host.products(device, "triton")
    assert type(host.products(CPU, "auto")) is CpuProducts


def test_a_device_without_kernels_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert type(host.products(META, "auto")) is TorchProducts
            assert host.fused_momentum(META, "auto") is None
    assert [(record.name, record.levelname) for record in caplog.records] == [("distmuon.kernels.host", "WARNING")]
    assert "there are none for meta devices" in caplog.text
    assert "torch computes Newton-Schulz on meta" in caplog.text
    with pytest.raises(
        ValueError, match='^kernels = "triton" cannot run on meta: there are none for meta devices; use'
    ):
        host.products(META, "triton")


def test_what_can_run_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        host.products(CPU, "auto")
        host.products(META, "torch")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("hip", "properties", "found"),
    [
        (None, {"major": 8, "minor": 0}, True),
        (None, {"major": 9, "minor": 0}, True),
        (None, {"major": 10, "minor": 0}, True),
        (None, {"major": 7, "minor": 0}, False),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-", "major": 9, "minor": 4}, True),
        ("6.4", {"gcnArchName": "gfx906", "major": 9, "minor": 0}, False),
    ],
)
def test_cuda_takes_triton_where_its_architecture_has_configurations(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hip: str | None,
    properties: dict[str, Any],
    found: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.WARNING):
        name = type(host.products(CUDA, "auto")).__name__
    assert name == ("TritonProducts" if found else "TorchProducts")
    assert len(caplog.records) == (0 if found else 1)
    if found:
        assert type(host.products(CUDA, "triton")).__name__ == "TritonProducts"
    else:
        with pytest.raises(ValueError, match='^kernels = "triton" cannot run on cuda:0: '):
            host.products(CUDA, "triton")
    assert type(host.products(CUDA, "torch")) is TorchProducts


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPO)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_neither_import_nor_use_on_a_cpu_imports_triton() -> None:
    assert run(PROBE) == "[]"


def test_the_interpreter_runs_triton_on_a_cpu_when_it_is_asked_for() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1").split() == [
        *("TritonProducts", "CpuProducts"),
        *("TritonProducts", "TorchProducts"),
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "switched"),
    [
        (CPU, torch.float32, True),
        (CPU, torch.bfloat16, False),
        (CPU, torch.float16, False),
        (CUDA, torch.float32, False),
    ],
)
def test_only_float32_on_a_cpu_is_switched(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, switched: bool
) -> None:
    monkeypatch.setattr(cpu_float32, "is_exact", lambda: True)
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with host.precision(device, dtype):
        assert (matmul.fp32_precision != before) == switched
    assert matmul.fp32_precision == before
