"""From what a user passes as ``params`` to checked param groups."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from distmuon.bricks import Kind
from distmuon.bucket import BoundParam, form
from distmuon.config import GroupSettings, UpdateSettings, parse
from distmuon.errors import ConfigError, ParameterError
from distmuon.splits import row_blocks

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMED_LIKE_A_TABLE = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b", re.IGNORECASE)

Params = Iterable[Any]


def to_groups(params: Params) -> list[dict[str, Any]]:
    """Turn ``named_parameters()``, a list of tensors, or a list of groups into a list of groups with a kind.

    Args:
        params: what the user passed.

    Returns:
        One dict a group with "params" and "kind"; without kinds given, matrices go to Muon and the rest to AdamW.

    Raises:
        ConfigError: nothing was passed.
    """
    items = list(params)
    if not items:
        raise ConfigError("params is empty; pass model.named_parameters() or distmuon.param_groups(model).")
    if not isinstance(items[0], Mapping):
        return _by_shape({"params": items}, 0)
    groups: list[dict[str, Any]] = []
    before = 0
    for item in items:
        if not isinstance(item, Mapping) or "params" not in item:
            raise ParameterError(
                f'params mixes groups with {type(item).__name__}; every group is a dict with "params".'
            )
        given = dict(item)
        given["params"] = members = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
        if "kind" in given:
            groups.append({"positions": list(range(before, before + len(members))), **given})
        else:
            groups += _by_shape(given, before)
        before += len(members)
    return groups


def complete_group(group: dict[str, Any], settings: UpdateSettings, experts: Set[str] = frozenset()) -> None:
    """Fill a group's missing settings and check them all, in place.

    Args:
        group: a param group with "kind".
        settings: the optimizer's settings.
        experts: names that the group's "expert_group" may have.

    Raises:
        ConfigError: a setting is out of range; the group is unchanged then.
    """
    kind = group.get("kind")
    if kind not in ("muon", "adamw"):
        raise ConfigError(f'param group "kind" = {kind!r} is not legal: use "muon" or "adamw".')
    if group.get("expert_group", "") not in {"", *experts}:
        raise ConfigError(
            f'param group "expert_group" = {group["expert_group"]!r} is not legal: expert_groups has {sorted(experts)}.'
        )
    full = {**settings.group_defaults(kind), **group}
    check_group(full)
    group.update(full)


def check_group(group: Mapping[str, Any]) -> GroupSettings:
    """Read a group's settings as plain numbers.

    Args:
        group: a complete param group; lr may be a one-element tensor.

    Returns:
        The settings.

    Raises:
        ConfigError: a setting is out of range.
    """
    plain = {key: group[key] for key in GroupSettings.model_fields}
    plain["betas"] = tuple(plain["betas"])
    plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in plain.items()}
    return parse(GroupSettings, plain, "param group")


def bind(
    groups: list[dict[str, Any]], first: int, others: Sequence[BoundParam] = ()
) -> tuple[list[BoundParam], list[BoundParam]]:
    """Check the parameters of groups and list them in the order of the forward pass.

    Args:
        groups: complete param groups.
        first: index of groups[0] among the optimizer's groups.
        others: parameters that the optimizer has already.

    Returns:
        Parameters to optimize, sorted by the groups' "positions" where given, and frozen parameters.

    Raises:
        ParameterError: names a parameter that cannot be optimized as it is.
    """
    found: list[tuple[int, BoundParam]] = []
    for number, group in enumerate(groups, start=first):
        tensors = group["params"]
        names = group.get("param_names") or [f"group{number}.param{i}" for i in range(len(tensors))]
        positions = group.get("positions") or [0] * len(tensors)
        for name, tensor, position in zip(names, tensors, positions, strict=True):
            split = row_blocks(name, tensor.shape, group.get("split"))
            if split and group["kind"] != "muon":
                raise ParameterError(f'parameter "{name}" has kind "adamw" and cannot be split; leave "split" out.')
            found.append((position, BoundParam(name, tensor, group["kind"], number, form(tensor), split)))
    found.sort(key=lambda item: item[0])
    params = [param for _, param in found]
    trained = [param for param in params if param.tensor.requires_grad]
    for param in trained:
        _check(param)
    _check_storage([*others, *trained])
    return trained, [param for param in params if not param.tensor.requires_grad]


def check_unchanged(trained: list[BoundParam], frozen: list[BoundParam]) -> None:
    """Make sure that parameters are still what they were when the optimizer was built.

    Args:
        trained: parameters that required a gradient.
        frozen: parameters that did not.

    Raises:
        ParameterError: names one that changed.
    """
    for param in trained:
        if not param.tensor.requires_grad:
            raise ParameterError(
                f'parameter "{param.name}" was frozen after the optimizer was built; freeze it before.'
            )
        if form(param.tensor) != param.form:
            raise ParameterError(
                f'parameter "{param.name}" was {param.form} when the optimizer was built and is {form(param.tensor)}; '
                "cast, move or reshape the model before."
            )
    for param in frozen:
        if param.tensor.requires_grad:
            raise ParameterError(
                f'parameter "{param.name}" was frozen when the optimizer was built and is not any more; '
                "build the optimizer after unfreezing it."
            )


def _by_shape(group: dict[str, Any], before: int) -> list[dict[str, Any]]:
    """Split a group without a kind: matrices to Muon, all else to AdamW; their order stays that of the list."""
    members = group.pop("params")
    split: dict[Kind, list[Any]] = {"muon": [], "adamw": []}
    positions: dict[Kind, list[int]] = {"muon": [], "adamw": []}
    by_name: list[str] = []
    for position, member in enumerate(members, start=before):
        name, tensor = member if isinstance(member, tuple) else ("", member)
        if not isinstance(tensor, Tensor):
            raise ParameterError(f"params holds a {type(tensor).__name__}; it takes tensors or (name, tensor) pairs.")
        table = bool(_NAMED_LIKE_A_TABLE.search(name))
        if tensor.ndim == 2 and table:
            by_name.append(name)
        kind: Kind = "muon" if tensor.ndim in (2, 3) and not table else "adamw"
        split[kind].append(member)
        positions[kind].append(position)
    if by_name:
        log.warning(
            "routed to AdamW by name, since parameters carry no module types: %s; distmuon.param_groups(model) "
            "routes by module type",
            ", ".join(by_name),
        )
    return [
        {**group, "params": chosen, "kind": kind, "positions": positions[kind]}
        for kind, chosen in split.items()
        if chosen
    ]


def _check(param: BoundParam) -> None:
    tensor = param.tensor
    problem = None
    if tensor.dtype not in _DTYPES:
        problem = f"has dtype {tensor.dtype}; float32, bfloat16 and float16 are supported"
    elif tensor.layout != torch.strided:
        problem = f"has layout {tensor.layout}; make it dense"
    elif not tensor.is_contiguous():
        problem = f"is not contiguous (strides {tuple(tensor.stride())}); call .contiguous() on it first"
    elif not tensor.is_leaf:
        problem = "is not a leaf of the autograd graph; pass nn.Parameters"
    elif param.kind == "muon" and tensor.ndim not in (2, 3):
        problem = f'has {tensor.ndim} dimensions and kind "muon", which takes [A, B] or [E, A, B]; give it kind "adamw"'
    if problem:
        raise ParameterError(f'parameter "{param.name}" {problem}.')


def _check_storage(params: list[BoundParam]) -> None:
    """Refuse parameters whose memory overlaps: updating one would change the other behind its back."""
    extents = sorted(
        (p.tensor.data_ptr(), p.tensor.data_ptr() + p.tensor.numel() * p.tensor.element_size(), p.name)
        for p in params
        if p.tensor.numel()
    )
    for (_, end, name), (start, _, other) in zip(extents, extents[1:], strict=False):
        if start < end:
            raise ParameterError(
                f'parameters "{name}" and "{other}" share storage; tie weights by using one Parameter in both places.'
            )
