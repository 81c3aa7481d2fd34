"""distmuon: a reduce-scatter/all-gather sharded Muon optimizer and its DeepSpeed plug-in.

Names are loaded on first use. The one thing importing does is to ask that ``"optimizer": "DistMuon"`` be made known to
DeepSpeed once DeepSpeed is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from distmuon.bricks import ParamSpec
    from distmuon.dist_muon import DistMuon
    from distmuon.grad_scaler import GradScaler
    from distmuon.muon import Muon
    from distmuon.newton_schulz import orthogonalize
    from distmuon.ns_settings import NewtonSchulz
    from distmuon.planner import make_plan
    from distmuon.routing import param_groups, routes

__version__ = "0.1.0"

_HOMES = {
    "DistMuon": "distmuon.dist_muon",
    "GradScaler": "distmuon.grad_scaler",
    "Muon": "distmuon.muon",
    "NewtonSchulz": "distmuon.ns_settings",
    "ParamSpec": "distmuon.bricks",
    "make_plan": "distmuon.planner",
    "orthogonalize": "distmuon.newton_schulz",
    "param_groups": "distmuon.routing",
    "routes": "distmuon.routing",
}

__all__ = [
    "DistMuon",
    "GradScaler",
    "Muon",
    "NewtonSchulz",
    "ParamSpec",
    "__version__",
    "make_plan",
    "orthogonalize",
    "param_groups",
    "routes",
]


def __getattr__(name: str) -> Any:
    if name == "checkpoint":
        return importlib.import_module("distmuon.checkpoint")
    if name not in _HOMES:
        raise AttributeError(f"module 'distmuon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register_with_deepspeed(deepspeed: Any) -> None:
    importlib.import_module("distmuon.ds.plugin").register(deepspeed)


register_post_import_hook(_register_with_deepspeed, "deepspeed")
