"""Newton-Schulz methods judged on the matrices of ``distmuon.benchmarks.matrices``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmuon.benchmarks.matrices import HARD, Accuracy, Family, Sample, measure, samples
from distmuon.iteration import Schedule, iterate
from distmuon.kernels.products import Products, TorchProducts
from distmuon.newton_schulz import DTYPES, orthogonalize, prescale
from distmuon.ns_settings import NewtonSchulz


@dataclass(frozen=True)
class Verdict:
    """Accuracies of one method on a set of matrices, in order."""

    each: Sequence[Accuracy]

    @property
    def worst_rms(self) -> float:
        return max(a.rms_resolved for a in self.each)

    @property
    def mean_rms(self) -> float:
        return sum(a.rms_resolved for a in self.each) / len(self.each)

    @property
    def sigma_max(self) -> float:
        return max(a.sigma_max for a in self.each)


@functools.cache
def drawn(families: tuple[Family, ...]) -> list[Sample]:
    return samples(families)


def judge(function: Callable[[Tensor], Tensor], families: tuple[Family, ...] = HARD) -> Verdict:
    return Verdict([measure(one, function(one.x_MN)) for one in drawn(families)])


@functools.cache
def judge_settings(ns: NewtonSchulz, families: tuple[Family, ...] = HARD) -> Verdict:
    return judge(lambda x: orthogonalize(x, ns), families)


@functools.cache
def judge_gram(ns: NewtonSchulz, products: type[TorchProducts]) -> Verdict:
    """The Gram form on other products; without restarts, its polynomials in the plain form."""
    return judge(lambda x: run_gram(x, ns, products()))


def run_gram(x: Tensor, ns: NewtonSchulz, products: Products) -> Tensor:
    chosen, x_BMN = ns.polynomials("gram"), x.reshape(-1, *x.shape[-2:])
    segments = ns.gram_segments() if ns.form == "gram" else (1,) * len(chosen.quintics)
    assert segments is not None
    schedule = Schedule(chosen.quintics, segments, chosen.start)
    return iterate(prescale(x_BMN, DTYPES[ns.dtype]), schedule, products).reshape(x.shape)


def setting(preset: str = "opt5", form: str = "plain", dtype: str = "bfloat16", **more: Any) -> NewtonSchulz:
    return NewtonSchulz.model_validate({"preset": preset, "form": form, "dtype": dtype, **more})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse_batches() -> Iterator[Tensor]:
    """Matrices that bring wrong Gram iterations down: their products have few terms, whose rounding errors agree."""
    for size, count in ((64, 150), (128, 40), (192, 20), (256, 10)):
        for density in (0.005, 0.01, 0.02):
            kept = torch.rand(count, size, size, generator=torch.Generator().manual_seed(size)) < density
            yield torch.where(kept, random(count, size, size, seed=size + 1), 0.0)
    # One of these brings opt6 with a margin of 5 % beyond 1e7.
    rng = torch.Generator().manual_seed(337)
    kept = torch.rand(500, 48, 48, generator=rng) < 1.3 / 48
    yield torch.where(kept, torch.randn(500, 48, 48, generator=rng), 0.0)


def largest_sigma(o_BMN: Tensor) -> float:
    o_BMN = o_BMN.double()
    return float(torch.linalg.matrix_norm(o_BMN, 2).max()) if o_BMN.isfinite().all() else float("inf")
