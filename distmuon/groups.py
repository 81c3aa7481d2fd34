"""From what a user passes as ``params`` to checked param groups."""

from __future__ import annotations

import copy
import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from distmuon.bricks import Kind
from distmuon.config import GroupSettings, ShardSettings, UpdateSettings, parse, plain, printable
from distmuon.errors import ConfigError, ParameterError, StateError

log = logging.getLogger(__name__)

_NAMED_LIKE_A_TABLE = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b", re.IGNORECASE)

# What a group says about its parameters; it is the optimizer's own, not a saved group's.
STRUCTURE = ("params", "param_names", "positions", "split", "expert_group", "kind")
# What torch's schedulers and DeepSpeed keep in a group.
_KEPT = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "moe"}
_KNOWN = frozenset({*GroupSettings.model_fields, *STRUCTURE, *_KEPT})
_OF_THE_OPTIMIZER = frozenset(ShardSettings.model_fields) - _KNOWN
# Options of torch's optimizers; one that is off says what is done here anyway.
_NOT_SUPPORTED = {"amsgrad", "capturable", "dampening", "differentiable", "foreach", "fused", "maximize"}
# Finds one wrong letter in names of four and more, and lets "id", "bias", "max_lr" and the like of others pass.
_TYPO = 0.85

Params = Iterable[Any]


def to_groups(params: Params) -> list[dict[str, Any]]:
    """Turn ``named_parameters()``, a list of tensors, or a list of groups into a list of groups with a kind.

    Args:
        params: what the user passed.

    Returns:
        One dict a group with "params" and "kind"; without kinds given, matrices go to Muon and the rest to AdamW.

    Raises:
        ConfigError: nothing was passed.
        ParameterError: something else than parameters was passed.
    """
    items = _in_order(params)
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
        alone = isinstance(given["params"], Tensor)
        given["params"] = members = [given["params"]] if alone else _in_order(given["params"])
        if "kind" in given:
            for member in members:
                _named_tensor(member)
            groups.append({"positions": list(range(before, before + len(members))), **given})
        else:
            groups += _by_shape(given, before)
        before += len(members)
    return groups


def complete_group(
    group: dict[str, Any],
    settings: UpdateSettings,
    experts: Set[str] = frozenset(),
    rates: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a group's missing settings and check them all, in place.

    Args:
        group: a param group with "kind".
        settings: the optimizer's settings.
        experts: names that the group's "expert_group" may have.
        rates: learning rates by kind where they are tensors; the group gets a copy of its own.

    Raises:
        ConfigError: a setting is out of range or unknown; the group is unchanged then.
    """
    kind = _kind(group)
    if group.get("expert_group", "") not in {"", *experts}:
        raise ConfigError(
            f'param group "expert_group" = {group["expert_group"]!r} is not legal: expert_groups has {sorted(experts)}.'
        )
    rate = (rates or {}).get(kind)
    copied = {} if rate is None else {"lr": rate.detach().clone()}
    full = {**settings.group_defaults(kind), **copied, **group}
    check_keys(full)
    check_group(full)
    group.update(full)


def check_group(group: Mapping[str, Any]) -> GroupSettings:
    """Read a group's settings as plain numbers.

    Args:
        group: a complete param group; numbers may be one-element tensors.

    Returns:
        The settings.

    Raises:
        ConfigError: a setting is missing or out of range.
    """
    _kind(group)
    given = {key: plain(group[key]) for key in GroupSettings.model_fields if key in group}
    return parse(GroupSettings, given, "param group")


def check_keys(group: Mapping[str, Any]) -> None:
    """Let others keep what they like in a group, but nothing that its user takes for a setting.

    Args:
        group: a param group.

    Raises:
        ConfigError: a key is a setting of the whole optimizer, not supported, or a setting misspelt.
    """
    for key in sorted(map(str, group.keys() - _KNOWN)):
        shown = printable(key)
        if key in _OF_THE_OPTIMIZER:
            own = key.removeprefix("adamw_")
            name = f'call it "{own}" there' if own in GroupSettings.model_fields else "pass it to the optimizer"
            raise ConfigError(f'param group: "{shown}" is not a setting of param groups; {name}.')
        value = group.get(key)
        if key in _NOT_SUPPORTED:
            if isinstance(value, Tensor) or value:
                raise ConfigError(f'param group: "{shown}" is not supported; leave it out.')
            continue
        near = difflib.get_close_matches(key.casefold(), GroupSettings.model_fields, n=1, cutoff=_TYPO)
        if near:
            raise ConfigError(f'param group: unknown key "{shown}"; did you mean "{near[0]}"?')


def check_saved(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check the param groups of a state dict as those of a constructor are checked.

    Args:
        state_dict: what the optimizer is to load.
        groups: the optimizer's param groups.

    Returns:
        For each group what ``restore_group`` takes.

    Raises:
        StateError: the state dict has other groups, or lacks settings.
        ConfigError: a setting is out of range or unknown.
    """
    found = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(found, Sequence) or not all(isinstance(group, Mapping) for group in found):
        raise StateError('what is to be loaded has no list "param_groups"; pass what state_dict() returned.')
    if len(found) != len(groups):
        raise StateError(f"the state dict has {len(found)} param groups and the optimizer has {len(groups)}.")
    for number, (saved, group) in enumerate(zip(found, groups, strict=True)):
        missing = sorted(GroupSettings.model_fields.keys() - saved.keys())
        if missing:
            raise StateError(f"the state dict's param groups lack {missing}; it is not complete.")
        check_keys(saved)
        check_group(saved)
        members = saved.get("params")
        given = (saved["kind"], len(members) if isinstance(members, Sequence) else 0)
        if given != (group["kind"], len(group["params"])):
            raise StateError(
                f"param group {number} of the state dict has {given[1]} parameters of kind {given[0]!r} and the "
                f"optimizer's has {len(group['params'])} of kind {group['kind']!r}."
            )
    return [{key: value for key, value in saved.items() if key not in STRUCTURE} for saved in found]


def check_entry(where: str, saved: Any, own: Mapping[str, Any]) -> None:
    """Check one entry of a state dict's "state".

    Args:
        where: what the entry belongs to, for messages.
        saved: the entry, as it was found.
        own: the state that it is to replace: float32 tensors, counts, and counts by key.

    Raises:
        StateError: names what is missing, of another shape or type, or unknown.
    """
    given = saved if isinstance(saved, Mapping) else {}
    for key in [*own, *sorted(given.keys() - own.keys(), key=str)]:
        value, live = given.get(key), own.get(key)
        if isinstance(live, Tensor):
            fits = isinstance(value, Tensor) and value.shape == live.shape and value.is_floating_point()
            needed = f"a float tensor of shape {tuple(live.shape)} is needed"
        elif isinstance(live, Mapping):
            fits = isinstance(value, Mapping) and value.keys() == live.keys() and all(map(_is_count, value.values()))
            needed = f"counts for {sorted(live)} are needed"
        else:
            fits = live is not None and _is_count(value)
            needed = "nothing is needed" if live is None else "a count is needed"
        if not fits:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else printable(repr(value))
            raise StateError(f'state "{printable(str(key))}" of {where} is {found}; {needed}.')


def restore_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Take over saved settings; a number that is kept in a tensor is filled in there, since others may hold the tensor.

    Args:
        group: a param group, changed in place.
        saved: what ``check_saved`` returned for it; not kept.
    """
    for key, value in saved.items():
        held, number = group.get(key), plain(value)
        if isinstance(held, Tensor) and held.numel() == 1 and isinstance(number, int | float):
            held.detach().fill_(number)
        else:
            group[key] = copy.deepcopy(value)


def pack_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Describe param groups for a state dict, as torch does: parameters are numbered through all groups.

    Args:
        groups: the optimizer's param groups.

    Returns:
        New dicts with the groups' own values.
    """
    packed, start = [], 0
    for group in groups:
        end = start + len(group["params"])
        packed.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(range(start, end))})
        start = end
    return packed


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(group: Mapping[str, Any]) -> Kind:
    kind = group.get("kind")
    if not isinstance(kind, str) or kind not in ("muon", "adamw"):
        raise ConfigError(f'param group "kind" = {kind!r} is not legal: use "muon" or "adamw".')
    return kind  # type: ignore[return-value]


def _in_order(params: Any) -> list[Any]:
    if isinstance(params, Tensor | set | frozenset | str) or not isinstance(params, Iterable):
        raise ParameterError(
            f"params is a {type(params).__name__}; pass model.named_parameters(), or a list, which keeps its order."
        )
    return list(params)


def _named_tensor(member: Any) -> tuple[str, Tensor]:
    """Name, "" if it has none, and tensor of one of the things that were passed as parameters."""
    name, tensor = member if isinstance(member, tuple) and len(member) == 2 else ("", member)
    if not isinstance(tensor, Tensor) or not isinstance(name, str):
        raise ParameterError(f"params holds a {type(tensor).__name__}; it takes tensors or (name, tensor) pairs.")
    return name, tensor


def _by_shape(group: dict[str, Any], before: int) -> list[dict[str, Any]]:
    """Split a group without a kind: matrices to Muon, all else to AdamW; their order stays that of the list."""
    members = group.pop("params")
    split: dict[Kind, list[Any]] = {"muon": [], "adamw": []}
    positions: dict[Kind, list[int]] = {"muon": [], "adamw": []}
    by_name: list[str] = []
    for position, member in enumerate(members, start=before):
        name, tensor = _named_tensor(member)
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
