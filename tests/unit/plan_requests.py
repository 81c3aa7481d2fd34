"""What ``distmuon plan`` asks for, made short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distmuon.bricks import ParamSpec
from distmuon.machine import Machine, Workload
from distmuon.ns_settings import NewtonSchulz
from distmuon.planning.model_file import load_model
from distmuon.planning.outcome import Request

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NS = NewtonSchulz()


def request(model: str = "moe_mini", world: int = 4, ep: int = 1, bucket_mb: float = 0.5, **changes: Any) -> Request:
    params = load_model(CONFIGS / "models" / f"{model}.toml").parameters(ep)
    flops = {param.spec.name: param.flops for param in params}
    return replace(
        Request(model, params, world, ep, bucket_mb, "balanced", "auto", Machine(), Workload(flops=flops), NS),
        **changes,
    )


def specs_of(asked: Request, expert: bool | None = None) -> list[ParamSpec]:
    return [p.spec for p in asked.params if p.exists and expert in (None, p.expert)]
