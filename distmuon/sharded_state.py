"""This rank's shard of the optimizer state as a dict, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distmuon.config import GroupSettings
from distmuon.errors import StateError
from distmuon.groups import check_group
from distmuon.plan import Plan
from distmuon.reducer import BucketReduction

FORMAT = "distmuon-shard-1"


def save(
    reductions: Sequence[BucketReduction], plans: Sequence[Plan], rank: int, packed_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Describe the shard.

    Args:
        reductions: the optimizer's reductions.
        plans: the plans they belong to.
        rank: this rank.
        packed_groups: param groups with indices in place of tensors.

    Returns:
        Dict of tensors and plain values; the tensors are the live state, not copies.
    """
    state = {
        index: {**reduction.bucket.state(), "updates": reduction.bucket.updates}
        for index, reduction in enumerate(reductions)
    }
    header = {"format": FORMAT, "rank": rank, "plans": [plan.digest for plan in plans]}
    return {"state": state, "param_groups": packed_groups, "shard": header}


def check(
    state_dict: Mapping[str, Any],
    reductions: Sequence[BucketReduction],
    plans: Sequence[Plan],
    rank: int,
    groups: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Make sure that a state dict fits before anything is changed.

    Args:
        state_dict: what ``save`` returned.
        reductions: the optimizer's reductions.
        plans: the plans they belong to.
        rank: this rank.
        groups: the optimizer's param groups.

    Returns:
        The saved settings of each param group, without parameters.

    Raises:
        StateError: names what does not fit.
    """
    header = state_dict.get("shard")
    if not isinstance(header, Mapping) or header.get("format") != FORMAT:
        raise StateError(f'the state dict was not saved by DistMuon: its "shard" is {header!r}, not {FORMAT!r}.')
    if header.get("plans") != [plan.digest for plan in plans]:
        raise StateError(
            "the state dict belongs to another plan; load it with the world size, parameters, splits, policy, "
            "transport, bucket_mb, reduce_dtype, ns and kind of device it was saved with."
        )
    if header.get("rank") != rank:
        raise StateError(
            f"the state dict is rank {header.get('rank')}'s shard and this is rank {rank}; load the own one."
        )
    saved = [{k: v for k, v in group.items() if k != "params"} for group in state_dict.get("param_groups", ())]
    if len(saved) != len(groups):
        raise StateError(f"the state dict has {len(saved)} param groups and the optimizer has {len(groups)}.")
    for settings in saved:
        missing = GroupSettings.model_fields.keys() - settings.keys()
        if missing:
            raise StateError(f"the state dict's param groups lack {sorted(missing)}; it is not complete.")
        check_group(settings)
    for index, reduction in enumerate(reductions):
        if not isinstance(state_dict.get("state", {}).get(index, {}).get("updates"), int):
            raise StateError(f'state "updates" of bucket {index} is missing; the state dict is not complete.')
        for key, tensor in reduction.bucket.state().items():
            found = state_dict["state"][index].get(key)
            if found is None or found.shape != tensor.shape:
                shape = None if found is None else tuple(found.shape)
                raise StateError(f'state "{key}" of bucket {index} is {shape}; {tuple(tensor.shape)} is needed.')
    return saved


def load(state_dict: Mapping[str, Any], reductions: Sequence[BucketReduction]) -> None:
    """Copy a checked state dict into the reductions.

    Args:
        state_dict: what ``check`` accepted.
        reductions: the optimizer's reductions.
    """
    for index, reduction in enumerate(reductions):
        saved = state_dict["state"][index]
        for key, tensor in reduction.bucket.state().items():
            tensor.copy_(saved[key])
        reduction.bucket.updates = int(saved["updates"])
