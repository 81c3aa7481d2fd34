"""Strict configuration models and the one function that turns raw tables into them."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distmuon.errors import ConfigError
from distmuon.ns_settings import NewtonSchulz
from distmuon.strict import Strict

# Policies that leave no choice of transport.
ONLY_TRANSPORT = {"flat": "scatter", "team": "owner"}

# How much of a value a message repeats.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 160

Rate = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class GroupSettings(Strict):
    """Settings of one param group; every group has all of them, whichever kind it is."""

    kind: Literal["muon", "adamw"]
    """Which rule updates the group: "muon" for matrices, "adamw" for everything else."""
    lr: Rate
    """Learning rate, at least 0."""
    weight_decay: Rate
    """Decoupled weight decay, at least 0."""
    momentum: Beta
    """Muon's momentum in [0, 1)."""
    nesterov: bool
    """Whether Muon looks ahead by one momentum step."""
    betas: tuple[Beta, Beta]
    """AdamW's decay rates, each in [0, 1)."""
    eps: Annotated[float, Field(gt=0)]
    """AdamW's denominator floor, above 0."""


class UpdateSettings(Strict):
    """How parameters are updated."""

    lr: Rate = 1e-3
    """Learning rate of the matrices, at least 0."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay, at least 0."""
    momentum: Beta = 0.95
    """Muon's momentum in [0, 1)."""
    nesterov: bool = True
    """Whether Muon looks ahead by one momentum step."""
    adamw_lr: Rate | None = None
    """Learning rate of the AdamW parameters; None takes lr."""
    adamw_betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's decay rates, each in [0, 1)."""
    adamw_eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator floor, above 0."""
    adamw_weight_decay: Rate | None = None
    """Weight decay of the AdamW parameters; None takes weight_decay."""
    adamw_backend: Literal["auto", "torch", "apex"] = "auto"
    """"apex" runs NVIDIA apex's FusedAdam, "auto" takes it on CUDA where it is installed."""
    ns: NewtonSchulz = NewtonSchulz()
    """Newton-Schulz settings."""
    max_skipped_steps: int | None = Field(default=5, ge=1)
    """Raise after this many steps in a row with gradients that are not finite, at least 1; None goes on for ever. Steps
    that a GradScaler drives do not count."""

    def group_defaults(self, kind: Literal["muon", "adamw"]) -> dict[str, Any]:
        """Settings that a param group of a kind starts from.

        Args:
            kind: "muon" or "adamw".

        Returns:
            A new dict with every key of ``GroupSettings``.
        """
        muon = kind == "muon"
        return {
            "kind": kind,
            "lr": self.lr if muon or self.adamw_lr is None else self.adamw_lr,
            "weight_decay": self.weight_decay if muon or self.adamw_weight_decay is None else self.adamw_weight_decay,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "betas": self.adamw_betas,
            "eps": self.adamw_eps,
        }


class MuonSettings(UpdateSettings):
    """What ``Muon`` is constructed with."""

    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the global norm of the raw gradients to this; None does not clip."""


class PlacementSettings(UpdateSettings):
    """What sharding adds: who holds what, and in which portions it is communicated."""

    policy: Literal["balanced", "flat", "team"] = "balanced"
    """"balanced" keeps matrices whole, "flat" cuts equal contiguous shards as ZeRO-1 does, "team" lets ranks share a
    matrix that is too large for one."""
    transport: Literal["auto", "scatter", "owner"] = "auto"
    """"scatter": equal shards in every bucket; "owner": unequal ones in smaller buckets; "auto": the faster."""
    bucket_mb: float | None = Field(default=None, gt=0, le=1e6)
    """Least size of a reduce-scatter in MB (10^6 bytes of the reduction dtype), above 0 and at most 10^6; None: 25, or
    10^6 elements a rank if that is more."""

    @model_validator(mode="after")
    def _obey_the_rules(self) -> PlacementSettings:
        only = ONLY_TRANSPORT.get(self.policy, self.transport)
        if self.transport not in ("auto", only):
            raise ValueError(f'transport = "{self.transport}" does not go with policy = "{self.policy}"; use "{only}"')
        if self.policy == "team" and self.ns.dtype == "float16":
            raise ValueError('policy = "team" does not support ns.dtype = "float16"; use "bfloat16"')
        return self


class ShardSettings(PlacementSettings, MuonSettings):
    """What ``DistMuon`` is constructed with."""

    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over the ranks."""
    grad_accum_dtype: Literal["float32"] | None = None
    """"float32" accumulates micro-batches in float32 buffers and releases p.grad; None leaves them in p.grad."""


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], table: Mapping[str, Any], where: str) -> Model:
    """Validate a raw table against a configuration model.

    Args:
        model: the configuration model.
        table: nested mapping, e.g. parsed TOML or JSON.
        where: what the table is called in messages, e.g. a file name.

    Returns:
        The validated, frozen model.

    Raises:
        ConfigError: names the first offending field, its value and what is legal.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        problems = error.errors()
        # A key that is missing may be there under a wrong name, which tells more.
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        first = unknown[0] if unknown and problems[0]["type"] == "missing" else problems[0]
        raise ConfigError(f"{where}: {explain(model, first)}") from None


def make_settings(**values: Any) -> ShardSettings:
    """Check DistMuon's arguments.

    Args:
        values: fields of ``ShardSettings``, as objects of torch or plain.

    Returns:
        The settings.

    Raises:
        ConfigError: names the first illegal one.
    """
    return parse(ShardSettings, {key: plain(value) for key, value in values.items()}, "DistMuon")


def plain(value: Any) -> Any:
    """What a setting given as an object of torch stands for.

    Args:
        value: any setting.

    Returns:
        The number in a one-element tensor, the name of a dtype, a tuple for a list; anything else as it is.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.Tensor):
        one = value.numel() == 1 and not value.is_meta
        return value.detach().item() if one else f"a tensor of shape {tuple(value.shape)}"
    return tuple(plain(part) for part in value) if isinstance(value, list | tuple) else value


def explain(model: type[BaseModel], problem: ErrorDetails) -> str:
    """One sentence for one pydantic problem, with the nearest legal name for an unknown key.

    Args:
        model: the model that was validated.
        problem: an entry of ``ValidationError.errors()``.

    Returns:
        The sentence.
    """
    path = _known_path(model, problem["loc"])
    field = ".".join(path) or "the table"
    if problem["type"] == "extra_forbidden":
        unknown, names = str(problem["loc"][-1]), _field_names(model, path)
        near = difflib.get_close_matches(unknown, names, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"legal keys are {', '.join(sorted(names))}."
        return f'unknown key "{".".join([*path, printable(unknown)])}"; {hint}'
    if problem["type"] == "missing":
        return f'"{field}" is missing and has no default; add it.'
    if problem["type"] == "value_error":
        reason = problem["msg"].removeprefix("Value error, ").removesuffix(".")
        return printable(f'"{field}" is not legal: {reason}.' if path else f"{reason}.", 800)
    reason = problem["msg"].replace("Input should be", "it must be").replace("a valid tuple", "a list")
    return f'"{field}" = {printable(_SHORT.repr(problem["input"]), 400)} is not legal: {printable(reason, 400)}.'


def printable(text: str, limit: int = 80) -> str:
    """Text of a user's as it can stand in a message: on one line, and short.

    Args:
        text: any text.
        limit: characters that are kept, of its beginning and its end.

    Returns:
        The text, with escapes for what cannot be printed.
    """
    cut = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


def _known_path(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The part of an error's location that names fields; pydantic adds members of unions to it."""
    path: list[str] = []
    current: Any = model
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
            continue
        current = get_args(current)[1] if get_origin(current) is dict else field_type(current, part)
        if current is None:
            break
        path.append(printable(part))
    return path


def field_type(annotation: Any, name: str) -> Any:
    """Look up the type of a field.

    Args:
        annotation: the type that may have it; only configuration models have fields, also where None may stand instead.
        name: the field.

    Returns:
        Its annotation; None if there is no such field.
    """
    fields = _fields(annotation)
    return fields[name].annotation if name in fields else None


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    members = get_args(annotation) or (annotation,)
    models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    return models[0].model_fields if models else {}


def _field_names(model: type[BaseModel], path: list[str]) -> list[str]:
    return list(_fields(functools.reduce(field_type, path, cast(Any, model))))
