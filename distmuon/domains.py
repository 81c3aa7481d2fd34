"""From bound parameters to reductions: one plan per process group, dtype and device, and the order of their buckets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distmuon.bricks import ParamSpec
from distmuon.bucket import BoundParam, Bucket
from distmuon.comm import Group
from distmuon.config import GroupSettings, ShardSettings
from distmuon.errors import RankMismatchError
from distmuon.guard import check_agreement, shared_failure
from distmuon.newton_schulz import find_products
from distmuon.plan import Plan
from distmuon.planner import default_bucket_numel, make_plan
from distmuon.reducer import BucketReduction

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Domain(NamedTuple):
    """What parameters of one flat buffer have in common; no name of experts is the data-parallel group."""

    experts: str
    dtype: torch.dtype
    device: torch.device


def build(
    params: Sequence[BoundParam],
    groups: Sequence[Mapping[str, Any]],
    main: Group,
    experts: Mapping[str, Group],
    settings: ShardSettings,
) -> tuple[list[Plan], list[BucketReduction]]:
    """Agree with the other ranks on what is to be optimized, then plan it and allocate its state.

    Args:
        params: parameters in the order of the forward pass.
        groups: all param groups of the optimizer; "expert_group" names the expert-data-parallel group of one.
        main: the data-parallel group; every gradient is averaged over its size.
        experts: expert-data-parallel groups by name.
        settings: the optimizer's settings.

    Returns:
        Plans, and reductions in the order in which backward completes their gradients.

    Raises:
        RankMismatchError: the ranks disagree; raised on every rank.
    """
    agree(params, groups, main, experts, settings)
    domains = _by_domain(params, groups, main, experts)
    plans = _plan(domains, main, experts, settings)
    position = {id(param.tensor): number for number, param in enumerate(params)}
    placed: list[tuple[int, BucketReduction]] = []
    for key, members in domains.items():
        group = experts[key.experts] if key.experts else main
        for bucket in plans[key].buckets:
            reduction = BucketReduction(Bucket(bucket, group.rank, members), group, main.size)
            placed.append((-position[id(members[bucket.params[0]].tensor)], reduction))
    placed.sort(key=lambda item: item[0])
    return [plans[key] for key in domains], [reduction for _, reduction in placed]


def agree(
    params: Sequence[BoundParam],
    groups: Sequence[Mapping[str, Any]],
    main: Group,
    experts: Mapping[str, Group],
    settings: ShardSettings,
) -> None:
    """Make sure that parameters, their values and settings are equal on all ranks that share them.

    Args:
        params, groups, main, experts, settings: as for ``build``.

    Raises:
        RankMismatchError: the ranks disagree; raised on every rank.
    """
    # The main group first and always: it is where a rank that failed in its own checks says so.
    check_agreement(main, [("expert groups called", repr(sorted(experts)))])
    if experts:
        _agree_on_members(main, experts)
    by_group: dict[str, list[BoundParam]] = {}
    for param in params:
        by_group.setdefault(groups[param.group].get("expert_group", ""), []).append(param)
    with shared_failure(main):
        described = describe(by_group.pop("", []), groups, main, settings)
    check_agreement(main, described)
    with shared_failure(main):
        for name, members in sorted(by_group.items()):
            check_agreement(experts[name], describe(members, groups, experts[name], settings))
    if experts:
        # Ranks whose own expert groups agree learn here of groups that do not.
        check_agreement(main, [])


def _agree_on_members(main: Group, experts: Mapping[str, Group]) -> None:
    """Make sure that all members of an expert group list the same members; if not, a collective of it would hang."""
    own = json.dumps({name: group.ranks for name, group in experts.items()})
    lists = [json.loads(text) for text in main.all_gather_text(own)]
    by_rank = dict(zip(main.ranks, lists, strict=True))
    for rank, groups in by_rank.items():
        for name, ranks in groups.items():
            for member in ranks:
                other = by_rank.get(member, groups).get(name)
                if other != ranks:
                    raise RankMismatchError(
                        f'the ranks disagree: rank {rank} has the ranks {ranks} in expert group "{name}" where rank '
                        f"{member} has {other}; build the expert groups alike on every rank."
                    )


def _plan(
    domains: Mapping[Domain, Sequence[BoundParam]], main: Group, experts: Mapping[str, Group], settings: ShardSettings
) -> dict[Domain, Plan]:
    """Plan experts first: what they cost each rank is what the others, which all ranks share, are levelled with."""
    itemsize = _ITEMSIZE[settings.reduce_dtype]
    plans: dict[Domain, Plan] = {}
    own = 0.0
    for key in sorted(domains, key=lambda key: not key.experts):
        group = experts[key.experts] if key.experts else main
        specs = [ParamSpec(p.name, tuple(p.tensor.shape), p.kind, p.split) for p in domains[key]]
        numel = default_bucket_numel(group.size, itemsize)
        if settings.bucket_mb is not None:
            numel = max(1, int(settings.bucket_mb * 1e6) // itemsize)
        loads = () if key.experts else [float(text) for text in main.all_gather_text(repr(own))]
        fraction = find_products(key.device, settings.ns).symmetric_fraction
        how = settings.policy, numel, settings.transport, settings.ns, fraction
        plans[key] = make_plan(specs, group.size, *how, loads)
        own += plans[key].newton_schulz_flops(group.rank)
    return plans


def describe(
    params: Sequence[BoundParam], groups: Sequence[Mapping[str, Any]], group: Group, settings: ShardSettings
) -> list[tuple[str, str]]:
    """Everything that must be equal on all ranks of a group, as (what, value) pairs.

    Args:
        params: the parameters that the group shares.
        groups: all param groups of the optimizer.
        group: the process group.
        settings: the optimizer's settings.

    Returns:
        The pairs, most telling first.

    Raises:
        ConfigError: the matrix products that were asked for cannot run on a parameter's device.
    """
    entries = [("world size", str(group.size))]
    for p in params:
        what = f"{p.kind} {str(p.tensor.dtype).removeprefix('torch.')} {tuple(p.tensor.shape)}"
        what += f" split {p.split}" if p.split else ""
        entries.append((f'parameter "{p.name}"', f"{what} in param group {p.group}"))
        # float64, so that a different element is seldom lost; NaN equals NaN as text.
        start = p.tensor.detach().sum(dtype=torch.float64).item()
        entries.append((f'initial values of "{p.name}" with the sum', repr(start)))
    for field, value in settings.model_dump(mode="json").items():
        entries.append((f'setting "{field}"', repr(value)))
    for device in {p.tensor.device.type: p.tensor.device for p in params}.values():
        entries.append((f"matrix products on {device.type}", type(find_products(device, settings.ns)).__name__))
    for number in sorted({p.group for p in params}):
        for key in GroupSettings.model_fields:
            entries.append((f'setting "{key}" of param group {number}', repr(groups[number][key])))
    return entries


def _by_domain(
    params: Sequence[BoundParam],
    groups: Sequence[Mapping[str, Any]],
    main: Group,
    experts: Mapping[str, Group],
) -> dict[Domain, list[BoundParam]]:
    """Parameters that can share a flat buffer; an expert group of the same ranks as the main one is the main one."""
    found: dict[Domain, list[BoundParam]] = {}
    for param in params:
        name = groups[param.group].get("expert_group", "")
        if name and experts[name].ranks == main.ranks:
            name = ""
        found.setdefault(Domain(name, param.tensor.dtype, param.tensor.device), []).append(param)
    return found
