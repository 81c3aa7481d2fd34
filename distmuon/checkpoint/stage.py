"""Reading a checkpoint into new tensors, so that nothing live changes before all of it has been read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmuon.bucket import within
from distmuon.checkpoint.expected import match_groups
from distmuon.checkpoint.holdings import list_holdings, offset_in, sections
from distmuon.checkpoint.manifest import Manifest, State
from distmuon.checkpoint.names import ModelTensors
from distmuon.checkpoint.rows import cover
from distmuon.checkpoint.snapshot import Optimizer
from distmuon.checkpoint.store import Request, read_tensors
from distmuon.dist_muon import DistMuon


@dataclass
class Staged:
    """Everything to be loaded, read and checked, and where it goes."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Tensors to be overwritten, and their new values."""
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """State of Muon's parameters, by ``id``."""
    groups: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    """New settings and number of updates of each param group."""
    rng: dict[str, Tensor] = field(default_factory=dict)
    """Random state by kind."""


@dataclass
class Source:
    """A checked checkpoint and the names of what is to be loaded from it.

    Attributes:
        path: of the checkpoint.
        manifest: of it.
        state: what of it is not a tensor.
        tensors: the model's.
        names: of the optimizer's parameters, by ``id``.
        fitting: names in the checkpoint of what can be loaded.
    """

    path: Path
    manifest: Manifest
    state: State
    tensors: ModelTensors
    names: dict[int, str]
    fitting: set[str]

    def stage(self, optimizer: Optimizer | None, rng_of: int | None) -> Staged:
        """Read everything.

        Args:
            optimizer: whose state is wanted.
            rng_of: the rank whose random state is wanted; None wants none.

        Returns:
            What was read.

        Raises:
            StateError: settings of the param groups do not fit.
        """
        staged, requests = Staged(), self._of_model()
        staged.copies = [(tensor, request.into) for tensor, request in requests]
        wanted = [request for _, request in requests]
        pieces: list[tuple[Tensor, Tensor]] = []
        if optimizer is not None:
            staged.groups = list(match_groups(self.state, optimizer.param_groups, self.names))
        if isinstance(optimizer, DistMuon):
            of_shards, pieces = self._of_shards(optimizer, staged)
            wanted += of_shards
        elif optimizer is not None:
            wanted += self._of_muon(optimizer, staged)
        for kind in ("torch", "python", "numpy", "cuda") if rng_of is not None else ():
            stored = self.manifest.tensors.get(f"rng/{kind}/{rng_of}")
            if stored is not None:
                staged.rng[kind] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
                wanted.append(Request(f"rng/{kind}/{rng_of}", (0,), staged.rng[kind]))
        read_tensors(self.path, self.manifest, wanted)
        for place, values in pieces:
            place.copy_(values.view(place.shape))
        return staged

    def _of_model(self) -> list[tuple[Tensor, Request]]:
        """Parameters and buffers, which every rank has whole."""
        found = []
        for section, named in (("weight", self.tensors.parameters), ("buffer", self.tensors.buffers)):
            for name, tensor in named.items():
                if f"{section}/{name}" in self.fitting:
                    into = torch.empty(tensor.shape, dtype=tensor.dtype)
                    found.append((tensor.detach(), Request(f"{section}/{name}", (0,) * tensor.ndim, into)))
        return found

    def _of_shards(self, optimizer: DistMuon, staged: Staged) -> tuple[list[Request], list[tuple[Tensor, Tensor]]]:
        """Rectangles that cover this rank's pieces, and where in new shards which of their elements go."""
        shards: dict[tuple[int, str], Tensor] = {}
        for reduction in optimizer.reductions:
            for section, live in reduction.bucket.state().items():
                shards[id(reduction.bucket), section] = torch.zeros(live.shape)
                staged.copies.append((live, shards[id(reduction.bucket), section]))
        requests: list[Request] = []
        places: list[tuple[Tensor, Tensor]] = []
        for holding in list_holdings(optimizer.reductions, self.names):
            for section in holding.sections:
                key = f"{section}/{holding.name}"
                for bucket, piece in holding.pieces[holding.rank] if key in self.fitting else ():
                    box = cover(holding.shape, piece)
                    into = torch.empty(box.sizes)
                    requests.append(Request(key, box.offsets, into))
                    place = within(shards[id(bucket), section], offset_in(section, bucket, piece), piece)
                    places.append((place, into.view(-1)[box.start : box.start + box.length]))
        return requests, places

    def _of_muon(self, optimizer: Any, staged: Staged) -> list[Request]:
        """All of the state of an optimizer on one device."""
        requests = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                state: dict[str, Any] = {"updates": staged.groups[number][1]}
                for section in sections(group["kind"], parameter.dtype):
                    key = f"{section}/{self.names[id(parameter)]}"
                    state[section] = torch.zeros(parameter.shape)
                    if key in self.fitting:
                        requests.append(Request(key, (0,) * parameter.ndim, state[section]))
                staged.states[id(parameter)] = state
        return requests
