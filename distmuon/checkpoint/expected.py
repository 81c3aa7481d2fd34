"""What a model and its optimizer want of a checkpoint, and whether the checkpoint has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distmuon.checkpoint.holdings import sections
from distmuon.checkpoint.manifest import Manifest, State
from distmuon.checkpoint.names import ModelTensors
from distmuon.checkpoint.snapshot import NOT_SETTINGS
from distmuon.config import plain
from distmuon.errors import StateError
from distmuon.groups import check_group


class Wanted(NamedTuple):
    """A tensor as the model has it."""

    key: str
    shape: tuple[int, ...]
    dtype: str


def wanted(tensors: ModelTensors, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Wanted]:
    """List the tensors to be loaded.

    Args:
        tensors: the model's.
        groups: the optimizer's param groups; none leaves its state out.
        names: of the parameters, by ``id``.

    Returns:
        Name, shape and dtype of each; those without elements are not stored.
    """
    named = [("weight", name, value) for name, value in tensors.parameters.items()]
    named += [("buffer", name, value) for name, value in tensors.buffers.items()]
    found = [Wanted(f"{section}/{name}", tuple(value.shape), plain(value.dtype)) for section, name, value in named]
    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                for section in sections(group["kind"], parameter.dtype):
                    found.append(Wanted(f"{section}/{names[id(parameter)]}", tuple(parameter.shape), "float32"))
    return [tensor for tensor in found if 0 not in tensor.shape]


def unknown_keys(manifest: Manifest, tensors: Sequence[Wanted], with_state: bool) -> list[str]:
    """What a checkpoint has beyond what one rank wants.

    Args:
        manifest: of the checkpoint.
        tensors: what the rank wants.
        with_state: whether the optimizer's state is wanted.

    Returns:
        Names, in order.
    """
    own = {want.key for want in tensors}
    kinds = ("weight/", "buffer/", *(("first_moment/", "second_moment/", "master/") if with_state else ()))
    return sorted(key for key in manifest.tensors if key.startswith(kinds) and key not in own)


def check_tensors(manifest: Manifest, tensors: Sequence[Wanted], unknown: Sequence[str], strict: bool) -> list[Wanted]:
    """Make sure that a checkpoint has exactly what is wanted.

    Args:
        manifest: of the checkpoint.
        tensors: what this rank wants.
        unknown: what the checkpoint has and no rank wants.
        strict: whether the names must be the same.

    Returns:
        What can be loaded: all of it if strict.

    Raises:
        StateError: names a tensor that is missing, unknown, or of another shape or dtype.
    """
    found = []
    for want in tensors:
        stored = manifest.tensors.get(want.key)
        if stored is None:
            if strict:
                raise StateError(f'the checkpoint lacks "{want.key}", which is here; "rename" maps names that differ.')
            continue
        if (stored.shape, stored.dtype) != (want.shape, want.dtype):
            raise StateError(
                f'"{want.key}" is {stored.dtype} {stored.shape} in the checkpoint and {want.dtype} {want.shape} here.'
            )
        found.append(want)
    if unknown and strict:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise StateError(f'the checkpoint has "{unknown[0]}"{more}, which this model and optimizer do not have.')
    return found


def match_groups(
    state: State, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> Iterator[tuple[dict[str, Any], int]]:
    """Find the saved settings of each param group by the names of its parameters.

    Args:
        state: of the checkpoint.
        groups: the optimizer's param groups.
        names: of the parameters, by ``id``.

    Yields:
        For each group its new settings and its parameters' number of updates.

    Raises:
        StateError: parameters of one group were saved with different settings or numbers of updates.
        ConfigError: a setting is out of range.
    """
    for number, group in enumerate(groups):
        # Those without elements have no state.
        stateful = [parameter for parameter in group["params"] if parameter.requires_grad and parameter.numel()]
        trained = [names[id(parameter)] for parameter in stateful]
        missing = [name for name in trained if name not in state.parameters]
        if missing:
            raise StateError(f'the checkpoint has no settings for "{missing[0]}".')
        found = {name: state.parameters[name] for name in trained}
        for name, parameter in found.items():
            first = next(iter(found.values()))
            if parameter.group >= len(state.groups):
                raise StateError(f'the checkpoint has no param group {parameter.group}, which "{name}" was in.')
            same = state.groups[parameter.group] == state.groups[first.group]
            if not same or parameter.updates != first.updates:
                raise StateError(
                    f'"{name}" and "{trained[0]}" share param group {number} and were saved with different settings or '
                    "numbers of updates; build the param groups as they were."
                )
        settings: dict[str, Any] = {}
        updates = 0
        if trained:
            settings = _like(group, state.groups[found[trained[0]].group])
            updates = found[trained[0]].updates
        check_group({**group, **settings})
        yield settings, updates


def _like(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings in the types that the group has: JSON has no tuples."""
    found = {}
    for key, value in saved.items():
        if key not in NOT_SETTINGS:
            found[key] = tuple(value) if isinstance(value, list) and not isinstance(group.get(key), list) else value
    return found
