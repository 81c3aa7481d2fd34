"""A parameter as the plan command sees it, and the model files it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmuon.bricks import ParamSpec

Part = Literal["attention", "dense", "expert", "elementwise"]


@dataclass(frozen=True)
class PlannedParam:
    """One parameter of a rank: what the planner needs, and what tables and pictures say of it."""

    spec: ParamSpec
    part: Part
    """What it belongs to in pictures; "dense" are dense MLPs, shared experts and routers."""
    reason: str
    """Why it is updated by its rule."""
    flops: float
    """Forward FLOPs per token of a rank."""
    expert: bool = False
    """Whether it belongs to the expert-data-parallel group."""
    exists: bool = True
    """False for the product of a tied head, which is no parameter."""
