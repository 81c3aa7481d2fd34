"""What the distributed tests train: parameters of awkward shapes, chosen gradients, and the reference."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import distmuon
from tests.oracle import OracleMuon, Settings

MODEL: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((24, 6), "adamw"),
    "tall": ((32, 8), "muon"),
    "norm": ((8,), "adamw"),
    "wide": ((8, 32), "muon"),
    "odd": ((5, 7), "muon"),
    "row": ((1, 12), "muon"),
    "column": ((12, 1), "muon"),
    "experts": ((3, 8, 16), "muon"),
    "gain": ((), "adamw"),
    "square": ((16, 16), "muon"),
    "head": ((24, 8), "adamw"),
}
SMALL_MB, LARGE_MB = 0.0006, 25.0
"""600 bytes hold less than most of the matrices above; 25 MB hold the model many times over."""

EXACT_NS = 1e-6
"""What fp32 rounding leaves between a total update and its float64 reference; 4e-7 was measured."""

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One training run; every field is plain so that a case can travel to another process."""

    policy: str = "balanced"
    dtype: str = "float32"
    ns: str = "float32"
    clip: float | None = None
    accumulation: int = 1
    bucket_mb: float = SMALL_MB
    steps: int = 3
    exact: bool = False
    nesterov: bool = True
    reduce_dtype: str = "float32"
    lr: float = 0.1
    adamw_lr: float = 0.02
    weight_decay: float = 0.1

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    """Fresh parameters, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: Parameter((0.05 * torch.randn(shape, generator=generator)).to(dtype))
        for name, (shape, _) in MODEL.items()
    }


def groups(params: Mapping[str, Parameter], **settings: Any) -> list[dict[str, Any]]:
    """One group per kind, with names."""
    kinds = {name: MODEL[name][1] if name in MODEL else "muon" for name in params}
    return [
        {"params": [(name, p) for name, p in params.items() if kinds[name] == kind], "kind": kind, **settings}
        for kind in ("muon", "adamw")
        if kind in kinds.values()
    ]


def optimizer(params: Mapping[str, Parameter], case: Case, group: Any = None, **extra: Any) -> Any:
    """The optimizer under test."""
    return distmuon.DistMuon(
        groups(params),
        **{
            "lr": case.lr,
            "adamw_lr": case.adamw_lr,
            "weight_decay": case.weight_decay,
            "nesterov": case.nesterov,
            "process_group": group,
            "policy": case.policy,
            "bucket_mb": case.bucket_mb,
            "max_grad_norm": case.clip,
            "reduce_dtype": getattr(torch, case.reduce_dtype),
            "ns": distmuon.NewtonSchulz.model_validate({"dtype": case.ns}),
            **extra,
        },
    )


def gradients(case: Case, step: int, micro: int, rank: int, world: int) -> Gradients:
    """Gradient of one micro-batch; an exact one has the same mean on any world and adds up without error."""
    source = torch.Generator().manual_seed(1000 * step + 10 * micro + (0 if case.exact else rank) + 3)
    result: Gradients = {}
    for name, (shape, _) in MODEL.items():
        if case.exact:
            whole = torch.randint(-8, 9, shape, generator=source) / 16 / case.accumulation
            sign = (-1) ** rank if rank < world - world % 2 else 0
            result[name] = (whole + sign * (1 + rank // 2) / 4).to(case.torch_dtype)
        else:
            result[name] = torch.randn(shape, generator=source).to(case.torch_dtype)
    return result


def backward(params: Mapping[str, Parameter], grads: Mapping[str, Tensor | None], scale: float | Any = 1.0) -> None:
    """Run a backward pass that adds exactly ``grads``, and nothing where they are None."""
    given = [(p, grads.get(name)) for name, p in params.items()]
    terms = [(p * gradient).sum().float() for p, gradient in given if gradient is not None]
    if terms:
        torch.autograd.backward(torch.stack(terms).sum() * scale)


def accumulate(per_micro: list[Gradients]) -> Gradients:
    """What ``p.grad`` holds after these micro-batches, summed in the gradient's own dtype."""
    total: Gradients = dict(per_micro[0])
    for grads in per_micro[1:]:
        for name, gradient in grads.items():
            held = total.get(name)
            total[name] = gradient if held is None else held if gradient is None else held + gradient
    return total


def digest(tree: Any) -> str:
    """Hash of every bit of every tensor and of every plain value in a nest of dicts, lists and tuples."""
    sha = hashlib.sha256()
    for path, leaf in leaves(tree):
        sha.update(path.encode())
        if isinstance(leaf, Tensor):
            sha.update(leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; the counter of skipped steps is left out."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if "skipped" not in str(key):
                yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, tree


Source = Callable[[Case, int, int, int, int], Gradients]


@dataclass
class Run:
    """What one rank saw; plain values only."""

    params: dict[str, list[float]]
    digests: list[str] = field(default_factory=list)
    holders: dict[str, int] = field(default_factory=dict)
    buckets: int = 0
    skipped: int = 0


def plain(params: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Exact values as lists."""
    return {name: p.detach().double().flatten().tolist() for name, p in params.items()}


def advance(params: Mapping[str, Parameter], opt: Any, per_micro: list[Gradients], scale: float = 1.0) -> None:
    """Backward of all micro-batches of one step; reductions only with the last one."""
    for index, grads in enumerate(per_micro):
        with contextlib.ExitStack() as stack:
            if index + 1 < len(per_micro):
                stack.enter_context(opt.no_sync())
            backward(params, grads, scale)


def train(rank: int, world: int, case: Case, group: Any = None, source: Source = gradients) -> Run:
    """Train this rank's copy for ``case.steps`` steps."""
    params = parameters(case.torch_dtype)
    opt = optimizer(params, case, group)
    run = Run({}, buckets=sum(len(plan.buckets) for plan in opt.plans))
    run.holders = {str(i): len(m.holders) for plan in opt.plans for i, m in enumerate(plan.matrices)}
    for step in range(case.steps):
        advance(params, opt, [source(case, step, micro, rank, world) for micro in range(case.accumulation)])
        opt.step()
        opt.zero_grad()
        run.digests.append(digest(params))
    run.params, run.skipped = plain(params), opt.skipped_steps
    return run


def train_in_process(rank: int, world: int, group: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """``train`` for the process pool."""
    return vars(train(rank, world, Case(**fields), group))


def oracle(case: Case, dtype: torch.dtype = torch.float64) -> OracleMuon:
    """The reference with a case's settings, before the first step."""
    muon = Settings(lr=case.lr, weight_decay=case.weight_decay, nesterov=case.nesterov)
    adamw = replace(muon, kind="adamw", lr=case.adamw_lr)
    return OracleMuon(
        {name: p.detach() for name, p in parameters(case.torch_dtype).items()},
        {name: muon if kind == "muon" else adamw for name, (_, kind) in MODEL.items()},
        max_grad_norm=case.clip,
        ns_dtype=torch.float64 if case.ns == "float32" else getattr(torch, case.ns),
        dtype=dtype,
    )


def reference(case: Case, world: int, source: Source = gradients) -> OracleMuon:
    """The reference after ``case.steps`` steps on the gradients of all ranks."""
    result = oracle(case)
    for step in range(case.steps):
        result.step(
            [
                accumulate([source(case, step, micro, rank, world) for micro in range(case.accumulation)])
                for rank in range(world)
            ]
        )
    return result


def flat(params: Mapping[str, list[float]] | Mapping[str, Tensor], names: list[str] | None = None) -> Tensor:
    """All chosen parameters as one float64 vector."""
    parts = [params[name] for name in names or MODEL]
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).detach().flatten() for part in parts])


def update_error(run: Run, against: OracleMuon, names: list[str] | None = None) -> float:
    """Distance of the total update from the reference's, relative to its norm."""
    start = flat(against.initial, names)
    want = flat(against.masters, names) - start
    return float((flat(run.params, names) - start - want).norm() / want.norm())
