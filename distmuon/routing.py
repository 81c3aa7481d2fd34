"""Which parameter is updated by which rule, decided by module type."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from distmuon.bricks import Kind
from distmuon.errors import ConfigError
from distmuon.splits import Split, check_patterns, find_split, row_blocks

log = logging.getLogger(__name__)

# Gate modules of MoE libraries, by class name so that none has to be imported.
_ROUTER_CLASSES = {"TopKGate"}


@dataclass(frozen=True)
class Route:
    """The decision for one parameter and why it was made."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["muon", "adamw", "frozen"]
    reason: str


class Routes(list[Route]):
    """A routing table; ``print`` shows it."""

    def __str__(self) -> str:
        width = max((len(route.name) for route in self), default=0)
        lines = [
            f"{route.name:<{width}}  {'x'.join(map(str, route.shape)) or 'scalar':>16}  {route.kind:<6}  {route.reason}"
            for route in self
        ]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    router: Kind = "muon",
    overrides: Mapping[str, Kind] | None = None,
    head: nn.Module | None = None,
    splits: Mapping[str, Split] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into a Muon group and an AdamW group.

    Hidden matrices, [A, B] or [E, A, B], go to Muon. Embeddings, the LM head, tied weights, convolutions and everything
    with fewer than two dimensions go to AdamW. The LM head is ``head``, or what ``model.get_output_embeddings()``
    returns, or the last linear layer if it has as many outputs as an embedding has entries.

    Args:
        model: the model; not changed.
        router: rule for the gates of mixture-of-experts layers; the papers use Muon.
        overrides: shell-style patterns of parameter names, each with the kind that its matches get.
        head: the LM head, where it cannot be found as above.
        splits: patterns of the names of parameters that are several matrices on top of each other, each with their
            number, or with the rows of each: ``{"*.qkv.weight": 3}``, ``{"*.gate_up": [1024, 1024]}``.

    Returns:
        Groups for DistMuon or Muon: "params" as (name, parameter) pairs, "kind", "positions" in the model, and "split"
        where parameters are split.

    Raises:
        ConfigError: an option is not legal, or no matrix is left for Muon and none was overridden.
    """
    table = routes(model, router, overrides, head)
    parameters = dict(model.named_parameters())
    check_patterns(splits, [route.name for route in table if route.kind == "muon"])
    members: dict[tuple[str, tuple[int, ...]], list[tuple[int, str]]] = {}
    for position, route in enumerate(table):
        split = find_split(route.name, splits) if route.kind == "muon" else None
        key = route.kind, row_blocks(route.name, route.shape, split)
        members.setdefault(key, []).append((position, route.name))
    groups: list[dict[str, Any]] = []
    # Muon's groups first, frozen parameters in none.
    for (kind, split), chosen in sorted(members.items(), key=lambda item: item[0][0], reverse=True):
        if kind != "frozen":
            params = [(name, parameters[name]) for _, name in chosen]
            group = {"params": params, "kind": kind, "positions": [position for position, _ in chosen]}
            groups.append({**group, "split": split} if split else group)
    if not overrides and not any(group["kind"] == "muon" for group in groups):
        raise ConfigError(
            "the model has no hidden matrix for Muon; build the optimizer before anything flattens its parameters, "
            'or set overrides={"pattern": "muon"}.'
        )
    return groups


def routes(
    model: nn.Module,
    router: Kind = "muon",
    overrides: Mapping[str, Kind] | None = None,
    head: nn.Module | None = None,
) -> Routes:
    """Decide the rule of every parameter; arguments as for ``param_groups``.

    Returns:
        One route a parameter, in the model's order.

    Raises:
        ConfigError: an option is not legal or a pattern matches nothing.
    """
    kinds = {"router": router, **{f'overrides["{k}"]': v for k, v in (overrides or {}).items()}}
    for option, kind in kinds.items():
        if kind not in ("muon", "adamw"):
            raise ConfigError(f'{option} = {kind!r} is not legal: use "muon" or "adamw".')
    names = [name for name, _ in model.named_parameters()]
    for pattern in overrides or {}:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f'overrides["{pattern}"] matches no parameter; names look like "{"".join(names[:1])}".')
    heads = _heads(model, head)
    owners: dict[int, list[nn.Module]] = {}
    routers: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
        if type(module).__name__ in _ROUTER_CLASSES:
            routers.update(id(parameter) for parameter in module.parameters())
    table = Routes()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            table.append(Route(name, shape, "frozen", "does not require a gradient"))
            continue
        override = [kind for pattern, kind in (overrides or {}).items() if fnmatch.fnmatch(name, pattern)]
        if override:
            table.append(Route(name, shape, override[-1], "override"))
        elif id(parameter) in routers and parameter.ndim == 2:
            table.append(Route(name, shape, router, "router"))
        else:
            table.append(Route(name, shape, *_by_owner(parameter, owners[id(parameter)], heads)))
    return table


def _by_owner(parameter: nn.Parameter, owners: list[nn.Module], heads: set[int]) -> tuple[Kind, str]:
    if any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
        return "adamw", "embedding" if len(owners) == 1 else "tied embedding"
    if len(owners) > 1:
        return "adamw", "tied weight"
    if id(parameter) in heads:
        return "adamw", "LM head"
    if parameter.ndim > 1 and isinstance(owners[0], nn.LayerNorm | nn.RMSNorm):
        return "adamw", "norm"
    if isinstance(owners[0], nn.modules.conv._ConvNd):
        return "adamw", "convolution"
    if parameter.ndim == 2:
        return "muon", "hidden matrix"
    if parameter.ndim == 3:
        return "muon", f"{parameter.shape[0]} hidden matrices"
    return "adamw", f"{parameter.ndim}-D"


def _heads(model: nn.Module, head: nn.Module | None) -> set[int]:
    """Ids of the weights of the LM head."""
    getter = getattr(model, "get_output_embeddings", None)
    found = head or (getter() if callable(getter) else None)
    if found is not None:
        return {id(parameter) for parameter in cast(nn.Module, found).parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    shapes = {(table.num_embeddings, table.embedding_dim) for table in tables}
    sizes, widths = {size for size, _ in shapes}, {width for _, width in shapes}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not sizes or not linears:
        return set()
    # A layer back to the model's width is hidden, even if there are as many positions.
    if linears[-1].out_features in sizes - (widths - {max(sizes)}):
        return {id(linears[-1].weight)}
    like_a_head = [linear for linear in linears if (linear.out_features, linear.in_features) in shapes]
    if like_a_head:
        log.warning(
            "%d linear layers have an embedding's shape but are not last; is one the LM head? Then name it: "
            "param_groups(model, head=...)",
            len(like_a_head),
        )
    return set()
