"""``distmuon`` loads its names on first use and tells DeepSpeed about itself once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import distmuon
from distmuon.ds.plugin import register

REPO = Path(__file__).resolve().parents[2]
NAMES = [name for name in distmuon.__all__ if name != "__version__"]
BOTH_ORDERS = """
import sys
sys.modules["deepspeed"] = None
import distmuon
assert "torch" not in sys.modules and not any(name.startswith("distmuon.") for name in sys.modules)
del sys.modules["deepspeed"]
import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
method = DeepSpeedEngine._configure_basic_optimizer
assert hasattr(method, "__wrapped__") and not hasattr(method.__wrapped__, "__wrapped__")
importlib = __import__("importlib")
importlib.reload(distmuon)
assert DeepSpeedEngine._configure_basic_optimizer.__wrapped__ is method.__wrapped__
print("registered once")
"""


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name: str) -> None:
    found = getattr(distmuon, name)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert found.__module__.startswith("distmuon.")
    assert name in dir(distmuon)


def test_all_lists_the_public_names() -> None:
    assert {"DistMuon", "Muon", "NewtonSchulz", "orthogonalize", "param_groups", "routes"} <= set(NAMES)
    assert len(NAMES) == len(set(distmuon.__all__)) - 1
    assert set(distmuon.__all__) <= set(dir(distmuon))
    assert dir(distmuon) == sorted(set(dir(distmuon)))


def test_checkpoints_need_no_import_of_their_own() -> None:
    code = "import distmuon; print(callable(distmuon.checkpoint.save))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "True\n"


@pytest.mark.parametrize("name", ["DistMoun", "muon_", "__wrapped__"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'distmuon' has no attribute '{name}'"):
        getattr(distmuon, name)


def test_from_import_of_an_unknown_name() -> None:
    with pytest.raises(ImportError, match="DistMoun"):
        from distmuon import DistMoun  # noqa: F401


def fake_deepspeed() -> Any:
    engine, config = ModuleType("engine"), ModuleType("config")

    def method(self: Any, *args: Any) -> str:
        return "original"

    names = ["_is_supported_optimizer", "_configure_basic_optimizer", "_do_optimizer_sanity_check"]
    names += ["_configure_zero_optimizer", "save_checkpoint", "load_checkpoint"]
    engine.__dict__["DeepSpeedEngine"] = type("DeepSpeedEngine", (), dict.fromkeys(names, method))
    config.__dict__["DeepSpeedConfig"] = type("DeepSpeedConfig", (), {"_initialize_params": method})
    return SimpleNamespace(runtime=SimpleNamespace(engine=engine, config=config))


def test_methods_are_wrapped_once() -> None:
    deepspeed = fake_deepspeed()
    register(deepspeed)
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    config = deepspeed.runtime.config.DeepSpeedConfig
    methods = {**vars(engine), **vars(config)}
    wrapped = {name: method for name, method in methods.items() if hasattr(method, "__wrapped__")}
    assert len(wrapped) == 7
    register(deepspeed)
    assert {name: {**vars(engine), **vars(config)}[name] for name in wrapped} == wrapped


def test_other_optimizers_reach_the_original() -> None:
    deepspeed = fake_deepspeed()
    register(deepspeed)
    engine = deepspeed.runtime.engine.DeepSpeedEngine()
    engine.optimizer_name = lambda: "adamw"
    assert engine._configure_basic_optimizer([]) == "original"
    assert engine._configure_zero_optimizer(object()) == "original"
    engine.optimizer = object()
    assert engine.save_checkpoint("folder") == "original"
    assert engine.load_checkpoint("folder") == "original"
    assert engine._do_optimizer_sanity_check(object()) == "original"
    assert engine._is_supported_optimizer("adamw") == "original"
    assert engine._is_supported_optimizer("distMUON") is True


def test_the_hook_registers_once_when_deepspeed_comes_later() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", BOTH_ORDERS], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.endswith("registered once\n"), done.stderr
