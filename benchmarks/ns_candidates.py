"""What is timed beside each other: published Newton-Schulz functions and ours.

Shapes: B matrices, M rows, N columns.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distmuon.coefficients import Quintic, Start
from distmuon.kernels import host
from distmuon.newton_schulz import DTYPES, orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.published import PAPERS
from distmuon.schedule import make_schedule

DEFAULT = NewtonSchulz().preset
EAGER, STOCK, DEEPSPEED = "papers' triple, eager", "torch.optim.Muon", "DeepSpeed"
ONE_BY_ONE = f"{DEFAULT}, one by one"
# Ours, and settings that differ from the preset's own.
SETTINGS: dict[str, dict[str, Any]] = {
    "papers": {"preset": "papers"},
    "papers plain": {"preset": "papers", "form": "plain"},
    "papers plain, torch": {"preset": "papers", "form": "plain", "kernels": "torch"},
    "polar_express": {"preset": "polar_express"},
    "opt4": {"preset": "opt4"},
    "opt4 gram": {"preset": "opt4", "form": "gram"},
    "opt5": {"preset": "opt5"},
    "opt5 plain": {"preset": "opt5", "form": "plain"},
    "opt5 gram": {"preset": "opt5", "form": "gram"},
    "opt5 gram, torch": {"preset": "opt5", "form": "gram", "kernels": "torch"},
    "opt6": {"preset": "opt6"},
    "papers float32": {"preset": "papers", "dtype": "float32"},
}
# What shows the worth of one measure alone: the same without it.
TWINS = {"papers plain": "papers plain, torch", "opt5 gram": "opt5 gram, torch"}
BATCHED = ("papers", "opt4", "opt5", "opt6")


@dataclass(frozen=True)
class Shape:
    """Size of a batch of matrices."""

    batch: int
    rows: int
    cols: int

    def __str__(self) -> str:
        sizes = (self.rows, self.cols) if self.batch == 1 else (self.batch, self.rows, self.cols)
        return "x".join(map(str, sizes))


@dataclass(frozen=True)
class Candidate:
    """A function to time and what it must compute."""

    name: str
    function: Callable[[Tensor], Tensor]
    """Takes [B, M, N], or [M, N] where B is 1."""
    quintics: tuple[Quintic, ...]
    """(a, b, c) of every step."""
    start: Start = "frobenius"
    """Norm that matrices are divided by first."""
    segments: tuple[int, ...] = ()
    """Steps between restarts; all ones, or nothing, is the plain form."""
    dtype: torch.dtype = torch.bfloat16
    """What it computes in."""
    loop: bool = False
    """Whether the function is called for one [M, N] after the other."""
    twin: str | None = None
    """Name of the same without one measure."""

    @property
    def form(self) -> str:
        """The form in words."""
        return "plain" if max(self.segments, default=1) == 1 else f"gram {'+'.join(map(str, self.segments))}"

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute.

        Args:
            x: as ``function`` takes it.

        Returns:
            The matrices one by one, or all of them in one tensor.
        """
        return [self.function(x_MN) for x_MN in x] if self.loop else [self.function(x)]

    def result(self, x: Tensor) -> Tensor:
        """Compute.

        Args:
            x: as ``function`` takes it.

        Returns:
            The same shape.
        """
        found = self(x)
        return torch.stack(found) if self.loop else found[0]


def candidates(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """List what runs on a shape.

    Args:
        shape: the batch.
        device: where it runs.
        dtype: of the input.

    Returns:
        Candidates with distinct names, the baseline first.
    """
    single = shape.batch == 1
    found = [
        Candidate(EAGER, eager, (PAPERS,) * 5, loop=not single),
        Candidate(STOCK, stock, (PAPERS,) * 5, loop=not single),
        *deepspeed(shape),
    ]
    if single:
        found += [ours(name, shape, device, TWINS.get(name)) for name in SETTINGS]
    else:
        found.append(replace(ours(DEFAULT, shape, device), name=ONE_BY_ONE, loop=True))
        found += [ours(name, shape, device, ONE_BY_ONE if name == DEFAULT else None) for name in BATCHED]
    return [candidate for candidate in found if candidate.dtype != torch.float32 or dtype == torch.float32]


def ours(name: str, shape: Shape, device: torch.device, twin: str | None = None) -> Candidate:
    """Our own function.

    Args:
        name: a key of ``SETTINGS``.
        shape: decides the form.
        device: decides the matrix products, hence the form.
        twin: see ``Candidate``.

    Returns:
        The candidate.
    """
    ns = NewtonSchulz.model_validate(SETTINGS[name])
    fraction = host.products(device, ns.kernels).symmetric_fraction
    short, long = sorted((shape.rows, shape.cols))
    schedule = make_schedule(ns, short, long, fraction)
    return Candidate(
        name,
        lambda x: orthogonalize(x, ns),
        schedule.quintics,
        schedule.start,
        schedule.segments,
        DTYPES[ns.dtype],
        twin=twin,
    )


def eager(x: Tensor) -> Tensor:
    """Newton-Schulz as published and as most code has it, step by step in bfloat16.

    Args:
        x: [..., M, N].

    Returns:
        [..., M, N] bfloat16.

    Source: K. Jordan et al., "Muon", 2024, zeropower_via_newtonschulz5.
    """
    a, b, c = PAPERS
    tall = x.shape[-2] > x.shape[-1]
    y: Tensor = x.bfloat16()
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        polynomial = b * gram + c * gram @ gram
        y = a * y + polynomial @ y
    return y.mT if tall else y


def stock(x_MN: Tensor) -> Tensor:
    """Call torch.optim.Muon's function.

    Args:
        x_MN: [M, N].

    Returns:
        [M, N] bfloat16.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    # It divides a bfloat16 input in place; its own optimizer passes float32, which is copied by the cast.
    x_MN = x_MN.clone() if x_MN.dtype == torch.bfloat16 else x_MN
    o_MN: Tensor = _zeropower_via_newtonschulz(x_MN, PAPERS, 5, 1e-7)
    return o_MN


def deepspeed(shape: Shape) -> list[Candidate]:
    """DeepSpeed's functions, which take batches.

    Args:
        shape: decides what its Gram form does.

    Returns:
        Its standard and its Gram form; nothing where DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return []
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.runtime.zero.muon import original_muon

    # Compiling takes minutes on a CPU, and the compiler's guards take time in every call of a small matrix.
    standard: Any = inspect.unwrap(original_muon.zeropower_via_newtonschulz5)
    gram: Any = inspect.unwrap(original_muon.zeropower_via_gram_newtonschulz)
    segments = (1,) * 5 if shape.rows == shape.cols else (2, 3)
    dtypes = [original_muon.ns_compute_dtype(form) for form in ("standard", "gram")]
    five = (PAPERS,) * 5
    return [
        Candidate(DEEPSPEED, lambda x: standard(x, steps=5), five, dtype=dtypes[0]),
        Candidate(f"{DEEPSPEED}, its gram", lambda x: gram(x, steps=5), five, segments=segments, dtype=dtypes[1]),
    ]
