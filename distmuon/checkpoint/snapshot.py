"""Everything a checkpoint keeps, copied to the host at the moment of the save."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.bucket import Bucket
from distmuon.checkpoint import rng
from distmuon.checkpoint.holdings import Holding, list_holdings, sections
from distmuon.checkpoint.manifest import ParameterState
from distmuon.checkpoint.moves import copy_state, gather_rows, row_offsets
from distmuon.checkpoint.names import Rename, model_tensors, names_by_id
from distmuon.checkpoint.store import Part
from distmuon.comm import Group
from distmuon.dist_muon import DistMuon
from distmuon.errors import CheckpointError
from distmuon.groups import STRUCTURE
from distmuon.muon import Muon

log = logging.getLogger(__name__)

Optimizer = DistMuon | Muon

# What a param group says of its members and not of their settings.
NOT_SETTINGS = {*STRUCTURE, "name", "moe"}


@dataclass
class Snapshot:
    """Copies of this rank's part of the training state."""

    shared: dict[str, Tensor]
    """Tensors that other ranks may have as well; the first rank that has one writes it."""
    parts: dict[str, Part]
    """Rows that this rank alone writes."""
    holdings: list[Holding] = field(default_factory=list)
    copies: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, ParameterState] = field(default_factory=dict)

    def complete(self, group: Group) -> dict[str, Part]:
        """Exchange what other ranks write; every rank calls it.

        Args:
            group: all ranks, for tensors of the host. The copies that are not needed any more are given up.

        Returns:
            All parts that this rank writes, by the names they are stored under.
        """
        own = {key: repr(values.sum(dtype=torch.float64).item()) for key, values in sorted(self.shared.items())}
        listed = [json.loads(text) for text in group.all_gather_text(json.dumps(own))]
        _compare(listed)
        before: set[str] = set().union(*listed[: group.rank])
        parts = {
            key: Part(tuple(values.shape), (0,) * values.ndim, values)
            for key, values in self.shared.items()
            if key not in before
        }
        found = {**parts, **self.parts, **gather_rows(self.holdings, self.copies, group)}
        self.shared, self.copies = {}, {}
        return {key: part for key, part in found.items() if part.values.numel()}


def take(
    model: nn.Module,
    optimizer: Optimizer | None,
    group: Group,
    rename: Rename,
    with_rng: bool = True,
    with_frozen: bool = True,
) -> Snapshot:
    """Copy the state of a model and its optimizer.

    Args:
        model: the model.
        optimizer: its optimizer, if there is one.
        group: all ranks.
        rename: see ``model_tensors``.
        with_rng: whether to keep the random number generators.
        with_frozen: whether to keep parameters that do not require a gradient.

    Returns:
        The copies; training may go on.
    """
    tensors = model_tensors(model, rename)
    shared = {f"buffer/{name}": _copy(values) for name, values in tensors.buffers.items()}
    snapshot = Snapshot(shared, {})
    if with_rng:
        snapshot.parts = {
            f"rng/{kind}/{group.rank}": Part(tuple(values.shape), (0,), values)
            for kind, values in rng.capture().items()
        }
    written: set[str] = set()
    if optimizer is not None:
        names = names_by_id(tensors, optimizer.param_groups)
        snapshot.groups = [_settings(settings) for settings in optimizer.param_groups]
        if isinstance(optimizer, DistMuon):
            written = _take_shards(snapshot, optimizer, names)
        else:
            _take_whole(snapshot, optimizer, names)
    for name, parameter in tensors.parameters.items():
        if name not in written and (with_frozen or parameter.requires_grad):
            shared[f"weight/{name}"] = _copy(parameter)
    return snapshot


def _take_shards(snapshot: Snapshot, optimizer: DistMuon, names: Mapping[int, str]) -> set[str]:
    """Copy this rank's shards, and its rows of the weights; returns the names of all sharded parameters."""
    buckets = [reduction.bucket for reduction in optimizer.reductions]
    snapshot.holdings = list_holdings(optimizer.reductions, names)
    snapshot.copies = copy_state(buckets)
    updates = updates_by_group(buckets)
    for holding in snapshot.holdings:
        rows, tensor = holding.rows[holding.rank], holding.param.tensor
        if rows.stop > rows.first and tensor.numel():
            own = tensor.detach()[rows.first : rows.stop] if tensor.ndim else tensor.detach()
            offsets = row_offsets(holding.shape, rows.first)
            snapshot.parts[f"weight/{holding.name}"] = Part(holding.shape, offsets, own.to("cpu", copy=True))
        number = holding.param.group
        snapshot.parameters[holding.name] = ParameterState(group=number, updates=updates[number])
    return {holding.name for holding in snapshot.holdings}


def _take_whole(snapshot: Snapshot, optimizer: Muon, names: Mapping[int, str]) -> None:
    """Copy the state of an optimizer that holds all of it."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            name, state = names[id(parameter)], optimizer.state[parameter]
            for section in sections(group["kind"], parameter.dtype):
                snapshot.shared[f"{section}/{name}"] = _copy(state[section])
            snapshot.parameters[name] = ParameterState(group=number, updates=state["updates"])


def updates_by_group(buckets: Sequence[Bucket]) -> dict[int, int]:
    """Number of updates of each param group's parameters.

    Args:
        buckets: the optimizer's.

    Returns:
        Updates by param group.
    """
    return {group: count for bucket in buckets for group, count in bucket.updates.items()}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a param group, as plain values."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if key in NOT_SETTINGS:
            continue
        plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        plain = list(plain) if isinstance(plain, (list, tuple)) else plain
        parts = plain if isinstance(plain, list) else [plain]
        if all(part is None or (isinstance(part, (bool, int, float, str)) and _is_json(part)) for part in parts):
            found[key] = plain
        else:
            log.warning("param group entry %r is not a plain value and is not saved", key)
    return found


def _compare(listed: Sequence[Mapping[str, str]]) -> None:
    """Look for tensors that should be equal on all ranks and have another sum on one."""
    first: dict[str, tuple[int, str]] = {}
    for rank, sums in enumerate(listed):
        for key, total in sums.items():
            before, expected = first.setdefault(key, (rank, total))
            if total == expected:
                continue
            if key.startswith("weight/"):
                raise CheckpointError(f'"{key}" is not the same on rank {rank} as on rank {before}; make it so.')
            log.warning("%s is not the same on rank %d as on rank %d, whose values are saved", key, rank, before)


def _is_json(value: float | str) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
