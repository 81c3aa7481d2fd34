"""The single-process reference: an ep 1 replica gives every rank's gradients, the oracle takes the steps."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.ds.engines import (
    ADAMW_LR,
    LR,
    WEIGHT_DECAY,
    advance,
    batch,
    build,
    named,
    network,
    rule,
    shard_parts,
)
from tests.oracle import OracleMuon, Settings

DEFAULT_CLIP = 1.0
"""DeepSpeed's gradient_clipping where the key is absent."""

Rates = Callable[[int, str], float]


def constant(step: int, kind: str) -> float:
    """Learning rates without a schedule."""
    return LR if kind == "muon" else ADAMW_LR


@dataclass
class Reference:
    """The trajectory of all ranks, computed on this one."""

    bf16: bool = False
    sparse: bool = True
    clip: float | None = DEFAULT_CLIP
    rates: Rates = constant
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        ep = 1 if self.sparse else None
        self.model = network(ep)
        if self.model.moe is not None:
            self.model.moe.set_deepspeed_parallelism()
        if self.bf16:
            self.model.bfloat16()
        self.named = named(self.model, ep)
        muon = Settings(lr=LR, weight_decay=WEIGHT_DECAY)
        self.oracle = OracleMuon(
            {name: parameter.detach().clone() for name, parameter in self.named.items()},
            {name: replace(muon, kind=rule(name)) for name in self.named},
            max_grad_norm=self.clip,
        )

    def train(self, steps: int, gas: int) -> None:
        """Take ``steps`` steps of ``gas`` micro-batches a rank."""
        for step in range(steps):
            for state in self.oracle.states.values():
                state.settings = replace(state.settings, lr=self.rates(step, state.settings.kind))
            world = range(dist.get_world_size())
            self.norms.append(self.oracle.step([self._gradients(step, gas, rank) for rank in world]))

    def _gradients(self, step: int, gas: int, rank: int) -> dict[str, Tensor | None]:
        with torch.no_grad():
            for name, value in self.oracle.params.items():
                self.named[name].copy_(value)
        total: dict[str, Tensor | None] = {n: torch.zeros(p.shape) for n, p in self.named.items()}
        for micro in range(gas):
            self.model.zero_grad()
            loss = self.model(*batch(step, micro, rank))
            (loss / gas).backward()
            if rank == dist.get_rank():
                self.losses.append(loss.item())
            for name, parameter in self.named.items():
                if parameter.grad is not None:
                    total[name] = total[name] + parameter.grad.float()  # type: ignore[operator]
        return total


@dataclass
class Distance:
    """How far an engine is from the reference; sums over this rank's part, to be added up over ranks."""

    errors: dict[str, float] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    loss: float = 0.0


def compare(rank: int, world: int, group: Any, settings: Any, ep: int | None, case: dict[str, Any]) -> Distance:
    """Train an engine and the reference alike."""
    steps, gas = case["steps"], settings["gradient_accumulation_steps"]
    engine = build(settings, ep)
    bf16 = bool(settings.get("bf16", {}).get("enabled"))
    rates = case.get("rates", constant)
    reference = Reference(bf16, ep is not None, case["clip"], rates)
    reference.train(steps, gas)
    assert min(reference.norms) > DEFAULT_CLIP, "clipping would not show"
    distance, norms, losses = Distance(), [], []
    for step in range(steps):
        losses += advance(engine, step, step + 1)
        norms.append(engine.get_global_grad_norm())
    distance.norm = _worst(norms, reference.norms)
    distance.loss = _worst(losses, reference.losses)
    key = "master" if bf16 else "first_moment"
    parts = shard_parts(engine, key)
    values = {name: parameter.detach().flatten() for name, parameter in engine.named.items()}
    for name, start, part in parts:
        end = start + part.numel()
        found = (part if bf16 else values[name][start:end]).double()
        want = reference.oracle.masters[name].flatten()[start:end]
        initial = reference.oracle.initial[name].flatten()[start:end].double()
        add(distance.errors, name, float((found - want).square().sum()))
        add(distance.updates, name, float((want - initial).square().sum()))
    return distance


def add(table: dict[str, float], key: str, value: float) -> None:
    """Add to an entry."""
    table[key] = table.get(key, 0.0) + value


def relative_errors(ranks: list[Distance]) -> dict[str, float]:
    """Relative error of every parameter's total update."""
    errors: dict[str, float] = {}
    updates: dict[str, float] = {}
    for distance in ranks:
        for name in distance.errors:
            add(errors, name, distance.errors[name])
            add(updates, name, distance.updates[name])
    return {name: (errors[name] / updates[name]) ** 0.5 for name in errors}


def _worst(found: list[float], want: list[float]) -> float:
    return max(abs(f - w) / abs(w) for f, w in zip(found, want, strict=True))
