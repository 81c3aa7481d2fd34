"""From the parameters that DeepSpeed hands over to DistMuon's param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distmuon.bricks import Kind
from distmuon.errors import ConfigError
from distmuon.routing import routes
from distmuon.splits import check_patterns, find_split, row_blocks


def to_param_groups(
    model: nn.Module,
    model_parameters: Iterable[Tensor | Mapping[str, Any]],
    router: Kind,
    splits: Mapping[str, int | list[int]] | None = None,
) -> list[dict[str, Any]]:
    """Split DeepSpeed's groups by update rule, keeping their settings.

    Args:
        model: the engine's module; its module types decide the rule.
        model_parameters: tensors, (name, tensor) pairs, or groups of them. A group with a "kind" of its own keeps it.
        router: rule for the gates of mixture-of-experts layers.
        splits: patterns of the names of parameters that are several matrices on top of each other.

    Returns:
        Groups for DistMuon; expert groups name their expert-data-parallel group.

    Raises:
        ConfigError: a parameter is not the model's, or nothing is left for Muon.
    """
    table = routes(model, router)
    check_patterns(splits, [route.name for route in table if route.kind == "muon"])
    positions = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    sources = _as_groups(model_parameters)
    groups: list[dict[str, Any]] = []
    for source in sources:
        settings = {key: value for key, value in source.items() if key not in ("params", "param_names", "positions")}
        split: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, tuple[str, Tensor]]]] = {}
        for member in source["params"]:
            parameter = member[1] if isinstance(member, tuple) else member
            position = positions.get(id(parameter))
            if position is None:
                shape = tuple(getattr(parameter, "shape", ()))
                raise ConfigError(
                    f"model_parameters holds a {type(parameter).__name__} of shape {shape} that is not the model's; "
                    "pass parameters of the model given to deepspeed.initialize."
                )
            route = table[position]
            kind = settings.get("kind", "muon" if route.kind == "muon" else "adamw")
            own = settings.get("split", find_split(route.name, splits)) if kind == "muon" else None
            key = kind, _expert_group(parameter), row_blocks(route.name, parameter.shape, own)
            split.setdefault(key, []).append((position, (route.name, parameter)))
        for (kind, expert_group, blocks), members in sorted(split.items(), key=lambda item: item[0], reverse=True):
            group = {**settings, "kind": kind, "params": [member for _, member in members]}
            group |= {"split": blocks} if blocks else {}
            group["positions"] = [position for position, _ in members]
            groups.append({**group, "expert_group": expert_group} if expert_group else group)
    asked = any("kind" in source for source in sources)
    if not asked and not any(group["kind"] == "muon" for group in groups):
        raise ConfigError(
            "the model has no hidden matrix for Muon; build it without zero.Init, or use an AdamW optimizer type."
        )
    return groups


def _expert_group(parameter: Tensor) -> str:
    """Name of the expert-data-parallel group that DeepSpeed's MoE layer marked a parameter with, or ""."""
    return "" if getattr(parameter, "allreduce", True) else str(getattr(parameter, "group_name", ""))


def _as_groups(model_parameters: Iterable[Tensor | Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    items = list(model_parameters)
    if items and isinstance(items[0], Mapping):
        return [item for item in items if isinstance(item, Mapping)]
    return [{"params": items}]
