"""Loading a checkpoint: everything is checked and read before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distmuon import guard
from distmuon.checkpoint import rng as generators
from distmuon.checkpoint.expected import check_tensors, unknown_keys, wanted
from distmuon.checkpoint.manifest import read_manifest, read_state
from distmuon.checkpoint.names import Rename, model_tensors, names_by_id
from distmuon.checkpoint.snapshot import Optimizer
from distmuon.checkpoint.stage import Source, Staged
from distmuon.checkpoint.together import host_group, ranks_of, same, settle, together
from distmuon.checkpoint.verify import Check, Contents, check_files, check_state, resolve
from distmuon.comm import Group
from distmuon.dist_muon import DistMuon
from distmuon.groups import restore_group


class Restored(NamedTuple):
    """What a checkpoint was of."""

    step: int
    extra: dict[str, Any]
    path: Path


def load(
    directory: Path | str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int | None = None,
    name: str | None = None,
    check: Check = "full",
    rename: Rename = None,
    strict: bool = True,
    rng: bool = True,
    accept: Callable[[Mapping[str, Any]], None] | None = None,
) -> Restored:
    """Load model, optimizer and random state; every rank of the optimizer's group calls it.

    World size, policy, transport, bucket size, splits and expert-parallel size may differ from those of the save.

    Args:
        directory: of all checkpoints of the run, or of one checkpoint.
        model: gets the parameters and persistent buffers.
        optimizer: gets its state and the settings of its param groups; None loads the model only.
        step: of the checkpoint; None takes the latest.
        name: of the checkpoint's directory, instead of a step.
        check: "full" compares the hash of every file, "size" only sizes and headers.
        rename: as for ``save``.
        strict: whether model and checkpoint must have the same tensors.
        rng: whether to restore the random number generators, if there are as many ranks as there were.
        accept: raises a DistMuonError if it does not like the ``extra`` of the checkpoint.

    Returns:
        Step, extra and path of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or not whole.
        StateError: it does not fit model or optimizer. Both are raised on every rank, and nothing is changed then.
    """
    group = host_group(ranks_of(optimizer))
    same(group, "what to load", (step, name, check, strict, rng, optimizer is None))
    settle(optimizer)
    found = _open(Path(directory), step, name, check, group)
    if accept is not None:
        together(group, "accept what else was saved", lambda: accept(found.state.extra))
    tensors = together(group, "name the model's tensors", lambda: model_tensors(model, rename))
    groups = optimizer.param_groups if optimizer is not None else []
    names = together(group, "name the optimizer's parameters", lambda: names_by_id(tensors, groups))
    want = wanted(tensors, groups, names)
    unknown = _nobody_wants(group, unknown_keys(found.manifest, want, optimizer is not None))
    fitting = together(group, "fit the checkpoint", lambda: check_tensors(found.manifest, want, unknown, strict))
    source = Source(found.path, found.manifest, found.state, tensors, names, {tensor.key for tensor in fitting})
    rng_of = group.rank if rng and found.world_size == group.size else None
    staged = together(group, "read its tensors", lambda: source.stage(optimizer, rng_of))
    together(group, "restore the random state", lambda: generators.check(staged.rng) if staged.rng else None)
    _commit(staged, optimizer)
    if isinstance(optimizer, DistMuon):
        optimizer.clock.step = found.step
    if staged.rng:
        generators.restore(staged.rng)
    return Restored(found.step, dict(found.state.extra), found.path)


def _open(directory: Path, step: int | None, name: str | None, check: Check, group: Group) -> Contents:
    """Find a checkpoint and check that it is whole, each rank some of its files."""
    own = together(group, "find the checkpoint", lambda: str(resolve(directory, step, name)))
    path = Path(group.all_gather_text(own)[0])
    manifest = together(group, f"read {path}", lambda: read_manifest(path))
    guard.check_agreement(group, [(f"in {path} the save", manifest.run)])
    together(group, f"check {path}", lambda: check_files(path, manifest, check, (group.rank, group.size)))
    state = together(group, f"read {path}", lambda: read_state(path))
    contents = Contents(path, manifest, state)
    together(group, f"read {path}", lambda: check_state(contents))
    return contents


def _nobody_wants(group: Group, unknown: Sequence[str]) -> list[str]:
    """Names that no rank wants; one has experts that another has not."""
    texts = group.all_gather_text(json.dumps(list(unknown)))
    return sorted(set.intersection(*(set(json.loads(text)) for text in texts)))


@torch.no_grad()
def _commit(staged: Staged, optimizer: Optimizer | None) -> None:
    """Put what was read in place; all of it was checked."""
    for live, values in staged.copies:
        live.copy_(values)
    if optimizer is None:
        return
    for group, (settings, _) in zip(optimizer.param_groups, staged.groups, strict=True):
        restore_group(group, settings)
    if isinstance(optimizer, DistMuon):
        for reduction in optimizer.reductions:
            reduction.bucket.updates = {number: staged.groups[number][1] for number in reduction.bucket.updates}
        optimizer.forget_gradients()
        optimizer.check_agreement()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in staged.states:
                state = staged.states[id(parameter)]
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
