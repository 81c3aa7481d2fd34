"""From the parameters that DeepSpeed hands over to DistMuon's param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distmuon.errors import ConfigError
from distmuon.plan import Kind
from distmuon.routing import routes


def to_param_groups(
    model: nn.Module, model_parameters: Iterable[Tensor | Mapping[str, Any]], router: Kind
) -> list[dict[str, Any]]:
    """Split DeepSpeed's groups by update rule, keeping their settings.

    Args:
        model: the engine's module; its module types decide the rule.
        model_parameters: tensors, or groups as DeepSpeed makes them: expert groups have "moe" and "name". A group with
            a "kind" of its own keeps it.
        router: rule for the gates of mixture-of-experts layers.

    Returns:
        Groups for DistMuon; expert groups name their expert-data-parallel group.

    Raises:
        ConfigError: a parameter is not the model's, or nothing is left for Muon.
    """
    table = routes(model, router)
    positions = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    groups: list[dict[str, Any]] = []
    for source in _as_groups(model_parameters):
        settings = {key: value for key, value in source.items() if key not in ("params", "param_names", "positions")}
        if settings.get("moe"):
            settings["expert_group"] = settings["name"]
        split: dict[str, list[tuple[int, tuple[str, Tensor]]]] = {}
        for parameter in source["params"]:
            position = positions.get(id(parameter))
            if position is None:
                raise ConfigError(
                    f"model_parameters holds a tensor of shape {tuple(parameter.shape)} that is not a parameter of the "
                    "model; pass parameters of the model given to deepspeed.initialize."
                )
            route = table[position]
            kind = settings.get("kind", "muon" if route.kind == "muon" else "adamw")
            split.setdefault(kind, []).append((position, (route.name, parameter)))
        for kind, members in sorted(split.items(), reverse=True):
            params = [member for _, member in members]
            positions_of = [position for position, _ in members]
            groups.append({**settings, "kind": kind, "params": params, "positions": positions_of})
    _check_some_muon(groups, model_parameters)
    return groups


def _as_groups(model_parameters: Iterable[Tensor | Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    items = list(model_parameters)
    if items and isinstance(items[0], Mapping):
        return [item for item in items if isinstance(item, Mapping)]
    return [{"params": items}]


def _check_some_muon(groups: list[dict[str, Any]], given: Iterable[Tensor | Mapping[str, Any]]) -> None:
    asked = any(isinstance(item, Mapping) and "kind" in item for item in given)
    if not asked and not any(group["kind"] == "muon" for group in groups):
        raise ConfigError(
            "the model has no hidden matrix for Muon; build it without zero.Init, or use an AdamW optimizer type."
        )
