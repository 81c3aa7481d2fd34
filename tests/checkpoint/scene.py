"""What the checkpoint tests train, and an own gatherer of whole parameters and states by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
Whole = dict[str, Tensor]
Figure = Callable[[str], None]
Rename = Callable[[str], str]

ODD: Shapes = {
    "embed": ((24, 6), "adamw"),
    "tall": ((40, 8), "muon"),
    "wide": ((12, 64), "muon"),
    "norm": ((8,), "adamw"),
    "fused": ((12, 10), "muon"),
    "odd": ((5, 7), "muon"),
    "row": ((1, 12), "muon"),
    "column": ((12, 1), "muon"),
    "experts": ((3, 8, 16), "muon"),
    "gain": ((), "adamw"),
    "square": ((16, 16), "muon"),
    "one": ((1,), "adamw"),
}
SMALL: Shapes = {"matrix": ((8, 6), "muon"), "bias": ((6,), "adamw")}
SMALL_MB, LARGE_MB = 0.0006, 25.0


@dataclass(frozen=True)
class Spec:
    """A model and its param groups; plain fields, so that it can travel to another process."""

    shapes: Shapes = field(default_factory=lambda: ODD)
    dtype: str = "float32"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Parameters that have another dtype."""
    splits: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    tied: str = ""
    """A parameter that the model has under a second name as well."""
    apart: tuple[str, ...] = ()
    """Parameters in groups of their own, with an lr of their own."""
    late: tuple[str, ...] = ()
    """Parameters that the optimizer gets by ``add_param_group``."""
    experts: tuple[str, ...] = ()
    """Parameters of the expert group "ep"."""

    def torch_dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        dtype = getattr(torch, self.dtypes.get(name, self.dtype))
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class Way:
    """How an optimizer places the model."""

    world: int = 1
    policy: str = "balanced"
    transport: str = "auto"
    bucket_mb: float = SMALL_MB
    alone: bool = False
    """Muon instead of DistMuon."""


class Model(nn.Module):
    """Parameters ``w.NAME``, buffers of several dtypes, one of them not persistent."""

    running: Tensor
    counts: Tensor

    def __init__(self, spec: Spec, seed: int = 7) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterDict()
        for name, (shape, _) in spec.shapes.items():
            value = (0.05 * torch.randn(shape, generator=source)).to(spec.torch_dtype(name))
            self.w[name] = nn.Parameter(value, requires_grad=name not in spec.frozen)
        if spec.tied:
            self.z = nn.ParameterDict({"alias": self.w[spec.tied]})
        self.register_buffer("running", torch.randn(3, 2, generator=source))
        self.register_buffer("counts", torch.arange(seed, seed + 4))
        self.register_buffer("even", torch.tensor(seed % 2 == 0))
        self.register_buffer("rough", torch.randn(5, generator=source).bfloat16())
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)


def groups(model: Model, spec: Spec) -> list[dict[str, Any]]:
    """Param groups of what the optimizer gets at construction: one a kind, and those apart."""
    found: list[dict[str, Any]] = []
    by_kind: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (name, (_, kind)) in enumerate(spec.shapes.items()):
        if name in spec.late:
            continue
        pair = (f"w.{name}", model.w[name])
        extra: dict[str, Any] = {"split": spec.splits[name]} if name in spec.splits else {}
        extra |= {"expert_group": "ep"} if name in spec.experts else {}
        if name in spec.apart:
            extra |= {"lr": 0.01 * (number + 1), "weight_decay": 0.25}
        if extra:
            found.append({"params": [pair], "kind": kind, **extra})
        elif (kind, "") in by_kind:
            by_kind[kind, ""]["params"].append(pair)
        else:
            by_kind[kind, ""] = {"params": [pair], "kind": kind}
    return [*by_kind.values(), *found]


def settings() -> dict[str, Any]:
    """What Muon and DistMuon share."""
    ns = distmuon.NewtonSchulz.model_validate({"dtype": "float32"})
    return {"lr": 0.125, "adamw_lr": 0.02, "weight_decay": 0.1, "ns": ns}


def optimizer(model: Model, spec: Spec, way: Way, **changes: Any) -> Any:
    """The optimizer under test."""
    if way.alone:
        return distmuon.Muon(groups(model, spec), **{**settings(), **changes})
    placement: dict[str, Any] = {"policy": way.policy, "transport": way.transport, "bucket_mb": way.bucket_mb}
    return distmuon.DistMuon(groups(model, spec), **{**settings(), **placement, **changes})


def join_late(model: Model, spec: Spec, opt: Any) -> None:
    """Add the parameters that came late, one group each."""
    for name in spec.late:
        opt.add_param_group({"params": [(f"w.{name}", model.w[name])], "kind": spec.shapes[name][1]})


def build(spec: Spec, way: Way, seed: int = 7, **changes: Any) -> tuple[Model, Any]:
    """A model and its optimizer, the same on every rank."""
    model = Model(spec, seed)
    return model, optimizer(model, spec, way, **changes)


def gradients(spec: Spec, step: int, rank: int, world: int) -> dict[str, Tensor]:
    """Gradients that add up without rounding and have the same mean on any world."""
    source = torch.Generator().manual_seed(1000 * step + 3)
    sign = (-1) ** rank if rank < world - world % 2 else 0
    shift = sign * (1 + rank // 2) / 4
    return {
        name: (torch.randint(-8, 9, shape, generator=source) / 16 + shift).to(spec.torch_dtype(name))
        for name, (shape, _) in spec.shapes.items()
    }


def train(model: Model, opt: Any, spec: Spec, first: int, last: int, rank: int = 0, world: int = 1) -> None:
    """Steps ``first`` up to ``last``; buffers move as well."""
    taken = {id(p) for group in opt.param_groups for p in group["params"]}
    for step in range(first, last):
        grads = gradients(spec, step, rank, world)
        used = [(p, grads[name]) for name, p in model.w.items() if p.requires_grad and id(p) in taken]
        torch.autograd.backward(torch.stack([(p * gradient).sum().float() for p, gradient in used]).sum())
        opt.step()
        opt.zero_grad()
        model.running.mul_(1.25).add_(step)
        model.counts += step


def same_name(name: str) -> str:
    """The model's names are everybody's names."""
    return name


def whole(model: nn.Module, opt: Any, rename: Rename = same_name) -> Whole:
    """Every parameter, buffer and state as a whole tensor, by what it is and its name; collective."""
    if hasattr(opt, "finish_gathers"):
        opt.finish_gathers()
    names = {id(p): rename(name) for name, p in model.named_parameters()}
    found = {f"weight/{names[id(p)]}": p.detach().clone() for p in model.parameters()}
    saved = model.state_dict()
    found |= {f"buffer/{rename(n)}": b.detach().clone() for n, b in model.named_buffers() if n in saved}
    found |= _single(opt, names) if isinstance(opt, distmuon.Muon) else _sharded(opt, names)
    return dict(sorted(found.items()))


def _single(opt: Any, names: Mapping[int, str]) -> Whole:
    """States of Muon; before a parameter's first step they are what that step starts from."""
    found = {}
    for group in opt.param_groups:
        for p in group["params"]:
            if not p.requires_grad or not p.numel():
                continue
            name, state = names[id(p)], opt.state.get(p, {})
            found[f"updates/{name}"] = torch.tensor(state.get("updates", 0))
            found[f"first_moment/{name}"] = state.get("first_moment", torch.zeros_like(p, dtype=torch.float32)).clone()
            if group["kind"] == "adamw":
                second = state.get("second_moment", torch.zeros_like(p, dtype=torch.float32))
                found[f"second_moment/{name}"] = second.clone()
            if p.dtype != torch.float32:
                found[f"master/{name}"] = state.get("master", p.detach().float()).clone()
    return found


def _sharded(opt: Any, names: Mapping[int, str]) -> Whole:
    """States of DistMuon, from the pieces of all ranks; each element must lie on exactly one rank of its group."""
    own: list[tuple[str, tuple[int, ...], Tensor, Tensor]] = []
    updates: dict[str, set[int]] = {}
    opt.check_agreement()
    for reduction in opt.reductions:
        bucket, second = reduction.bucket, 0
        for index in bucket.plan.params:
            param = bucket.params[index]
            updates.setdefault(names[id(param.tensor)], set()).add(int(bucket.updates[param.group]))
        for piece in bucket.plan.pieces[bucket.rank]:
            param = bucket.params[piece.param]
            for key, shard in bucket.state().items():
                offset = second if key == "second_moment" else piece.offset
                if key != "second_moment" or param.kind == "adamw":
                    values = shard[offset : offset + piece.length].clone()
                    name = f"{key}/{names[id(param.tensor)]}"
                    own.append((name, tuple(param.tensor.shape), places(piece), values))
            second += piece.length if param.kind == "adamw" else 0
    ranks: list[Any] = [None] * dist.get_world_size() if dist.is_initialized() else [own]
    if dist.is_initialized():
        dist.all_gather_object(ranks, own)
    assert all(len(counts) == 1 for counts in updates.values()), updates
    found = {f"updates/{name}": torch.tensor(counts.pop()) for name, counts in updates.items()}
    return found | assemble([entry for entries in ranks for entry in entries])


def places(piece: Any) -> Tensor:
    """Which elements of a flat parameter a piece consists of."""
    if not piece.width:
        return torch.arange(piece.start, piece.start + piece.length)
    rows = piece.start + piece.stride * torch.arange(piece.length // piece.width)
    found: Tensor = rows[:, None] + torch.arange(piece.width)
    return found.flatten()


def assemble(entries: list[tuple[str, tuple[int, ...], Tensor, Tensor]]) -> Whole:
    """Whole tensors; what several ranks hold must agree."""
    found: Whole = {}
    held: dict[str, Tensor] = {}
    for name, shape, at, values in entries:
        flat = found.setdefault(name, torch.full((torch.Size(shape).numel(),), torch.nan))
        seen = held.setdefault(name, torch.zeros(flat.numel(), dtype=torch.bool))
        assert torch.equal(flat[at][seen[at]], values[seen[at]]), name
        flat[at] = values
        seen[at] = True
    assert all(bool(seen.all()) for seen in held.values())
    shapes = {name: shape for name, shape, _, _ in entries}
    return {name: flat.view(shapes[name]) for name, flat in found.items()}


def bits_differing(a: Whole, b: Whole) -> int:
    """Number of bits in which two states differ; both must have the same tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    total = 0
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        x, y = (t.contiguous().flatten().view(torch.uint8) for t in (a[name], b[name]))
        total += sum(int(byte).bit_count() for byte in (x ^ y).tolist() if byte)
    return total
