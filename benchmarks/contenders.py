"""Who takes part in the comparison, how each one is built, and what its result must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from distmuon.benchmarks import engines, optimizers
from distmuon.benchmarks.loops import Contender, Replicated
from distmuon.benchmarks.optimizers import Optimizers
from distmuon.benchmarks.owner_gather import newton_schulz
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz

# The one that times are compared with.
RIVAL = "DeepSpeed Muon ZeRO-1"
BALANCED = "DistMuon balanced"
OPT4 = "DistMuon balanced opt4"
ADAMW = "AdamW ZeRO-1 on DistMuon's path"
# DistMuon promises the same bits; where a team sums in another order, a bfloat16 iteration amplifies that, the more the
# fewer directions a gradient has.
_EQUAL, _ROUNDED = 1e-6, 0.1


@dataclass(frozen=True)
class Entry:
    """A contender to be."""

    name: str
    build: Callable[[nn.Module], Contender]
    reference: Callable[[nn.Module], Optimizers]
    """Single-process optimizers that, on the mean gradient, must give the same parameters."""
    tolerance: float
    """Largest legal difference, relative to the reference's update."""
    orthogonalize: Callable[[Tensor], object] | None = None
    """What it does to one matrix; None for AdamW."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Models that it cannot train, and why."""


_PLAIN = partial(optimizers.plain_twin)
_OWNERS = partial(optimizers.owner_gather, alone=True)


def _ours(name: str, tolerance: float = _EQUAL, ns: NewtonSchulz | None = None, **params: Any) -> Entry:
    if ns is not None:
        params["ns"] = ns.model_dump(exclude_defaults=True)
    return Entry(
        name,
        partial(engines.dist_muon, **params),
        _PLAIN if ns is None else partial(optimizers.plain_twin, ns=ns),
        tolerance,
        orthogonalize if ns is None else partial(orthogonalize, ns=ns),
    )


def _rival_muon(name: str, build: Callable[[nn.Module], Contender], **refuses: str) -> Entry:
    return Entry(name, build, _OWNERS, _ROUNDED, newton_schulz, refuses)


ENTRIES = (
    _ours(BALANCED, policy="balanced"),
    _ours("DistMuon flat", policy="flat"),
    _ours("DistMuon team", tolerance=_ROUNDED, policy="team"),
    _ours(OPT4, ns=NewtonSchulz(preset="opt4"), policy="balanced"),
    Entry(
        ADAMW,
        partial(engines.dist_muon, all_adamw=True),
        partial(optimizers.plain_twin, all_adamw=True),
        tolerance=_EQUAL,
    ),
    Entry("DeepSpeed AdamW ZeRO-1", engines.deepspeed_adamw, optimizers.torch_adamw, tolerance=1e-3),
    Entry("DDP, torch AdamW", partial(Replicated, optimizers=optimizers.torch_adamw), optimizers.torch_adamw, 1e-3),
    Entry(
        "DDP, torch Muon",
        partial(Replicated, optimizers=optimizers.torch_muon),
        optimizers.torch_muon,
        _ROUNDED,
        newton_schulz,
    ),
    _rival_muon("DDP, Muon by owners", partial(Replicated, optimizers=optimizers.owner_gather)),
    _rival_muon(RIVAL, partial(engines.deepspeed_muon, stage=1)),
    _rival_muon("DeepSpeed Muon ZeRO-2", partial(engines.deepspeed_muon, stage=2)),
    _rival_muon(
        "DeepSpeed Muon ZeRO-3",
        partial(engines.deepspeed_muon, stage=3),
        moe="DeepSpeed's ZeRO-3 does not support its own MoE layer",
    ),
)


def entrants(model: str) -> tuple[list[Entry], dict[str, str]]:
    """Say who takes part on a model.

    Args:
        model: name of the case.

    Returns:
        Those who do, and why the others do not.
    """
    absent = {entry.name: entry.refuses[model] for entry in ENTRIES if model in entry.refuses}
    return [entry for entry in ENTRIES if entry.name not in absent], absent
