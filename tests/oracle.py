"""Single-process reference of the optimizer, written from its formulas; shares no code with the product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PAPERS = (3.4445, -4.7750, 2.0315)
Gradients = Mapping[str, Tensor | None]


def newton_schulz(u: Tensor, dtype: torch.dtype = torch.float64, steps: int = 5) -> Tensor:
    """Orthogonalize ``[..., rows, cols]``: cast if 16-bit, normalised in float64, iterated in ``dtype``."""
    if dtype in (torch.bfloat16, torch.float16):
        u = u.to(dtype)
    exact = u.to(torch.float64)
    norm = exact.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    x = (exact / torch.where(norm == 0, torch.ones_like(norm), norm)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))
    a, b, c = PAPERS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(u.shape)


def polar(u: Tensor, rtol: float = 1e-10) -> Tensor:
    """Exact polar factor of one matrix, in float64; singular values below ``rtol * max`` count as zero."""
    left, sigma, right = torch.linalg.svd(u.to(torch.float64), full_matrices=False)
    keep = (sigma > rtol * sigma.max()).to(torch.float64)
    return torch.mm(left * keep, right)


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.to(torch.float64).square().mean().sqrt())


def relative(x: Tensor, reference: Tensor) -> float:
    """Frobenius distance to the reference, relative to the reference's norm."""
    reference = reference.to(torch.float64)
    return float((x.to(torch.float64) - reference).norm() / reference.norm())


def mean_gradients(per_rank: Sequence[Gradients], like: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean over ranks of the gradients, a missing one counting as zero."""
    total = {name: torch.zeros(value.shape, dtype=dtype) for name, value in like.items()}
    for gradients in per_rank:
        for name, gradient in gradients.items():
            if gradient is not None:
                total[name] += gradient.to(dtype)
    return {name: value / len(per_rank) for name, value in total.items()}


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all elements of all gradients."""
    return math.sqrt(sum(float(g.to(torch.float64).square().sum()) for g in gradients.values()))


@dataclass(frozen=True)
class Settings:
    """Settings of one parameter; the defaults are those of the product."""

    kind: str = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@dataclass
class State:
    """One parameter: its master copy and the moments."""

    settings: Settings
    master: Tensor
    first: Tensor
    second: Tensor
    age: int = 0


@dataclass
class OracleMuon:
    """Muon with AdamW for the parameters of kind "adamw", on the mean gradient of all ranks.

    ``dtype`` is the precision of everything but Newton-Schulz, which runs in ``ns_dtype``.
    A 16-bit parameter is the cast of its master; other parameters are the master at their own precision.
    """

    initial: Mapping[str, Tensor]
    settings: Mapping[str, Settings]
    max_grad_norm: float | None = None
    ns_dtype: torch.dtype = torch.float64
    ns_steps: int = 5
    dtype: torch.dtype = torch.float64
    states: dict[str, State] = field(init=False)
    skipped_steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.states = {
            name: State(
                self.settings[name],
                value.detach().to(self.dtype).clone(),
                torch.zeros(value.shape, dtype=self.dtype),
                torch.zeros(value.shape, dtype=self.dtype),
            )
            for name, value in self.initial.items()
        }

    @property
    def masters(self) -> dict[str, Tensor]:
        """The unrounded parameters."""
        return {name: state.master for name, state in self.states.items()}

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters in the dtype they were given in."""
        return {name: state.master.to(self.initial[name].dtype) for name, state in self.states.items()}

    def set_lr(self, factor: float) -> None:
        """Multiply every learning rate, as a scheduler does."""
        for state in self.states.values():
            state.settings = replace(state.settings, lr=state.settings.lr * factor)

    def step(self, per_rank: Sequence[Gradients], scale: float = 1.0) -> float:
        """One step on every rank's gradients, which carry the loss scale; returns the raw global norm."""
        mean = mean_gradients(per_rank, self.initial, self.dtype)
        if not all(bool(g.isfinite().all()) for g in mean.values()):
            self.skipped_steps += 1
            return math.nan
        gradients = {name: g / scale for name, g in mean.items()}
        norm = global_norm(gradients)
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        for name, state in self.states.items():
            update = self._muon if state.settings.kind == "muon" else self._adamw
            update(state, gradients[name] * clip)
        return norm

    def _muon(self, state: State, gradient: Tensor) -> None:
        s = state.settings
        state.first = s.momentum * state.first + gradient
        u = gradient + s.momentum * state.first if s.nesterov else state.first
        direction = newton_schulz(u, self.ns_dtype, self.ns_steps).to(self.dtype)
        scale = 0.2 * math.sqrt(max(u.shape[-2:]))
        state.master = state.master - s.lr * (scale * direction + s.weight_decay * state.master)

    def _adamw(self, state: State, gradient: Tensor) -> None:
        s = state.settings
        state.age += 1
        beta1, beta2 = s.betas
        state.first = beta1 * state.first + (1 - beta1) * gradient
        state.second = beta2 * state.second + (1 - beta2) * gradient.square()
        first = state.first / (1 - beta1**state.age)
        second = state.second / (1 - beta2**state.age)
        state.master = state.master * (1 - s.lr * s.weight_decay) - s.lr * first / (second.sqrt() + s.eps)
