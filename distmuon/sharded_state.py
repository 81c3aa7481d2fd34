"""This rank's shard of the optimizer state as a dict, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distmuon.errors import StateError
from distmuon.groups import check_group
from distmuon.plan import Plan
from distmuon.reducer import Lane

FORMAT = "distmuon-shard-1"


def save(
    lanes: Sequence[Lane], plans: Sequence[Plan], rank: int, packed_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Describe the shard.

    Args:
        lanes: the optimizer's lanes.
        plans: the plans they belong to.
        rank: this rank.
        packed_groups: param groups with indices in place of tensors.

    Returns:
        Dict of tensors and plain values; the tensors are the live state, not copies.
    """
    state = {index: {**lane.bucket.state(), "updates": lane.bucket.updates} for index, lane in enumerate(lanes)}
    header = {"format": FORMAT, "rank": rank, "plans": [plan.digest for plan in plans]}
    return {"state": state, "param_groups": packed_groups, "shard": header}


def check(
    state_dict: Mapping[str, Any],
    lanes: Sequence[Lane],
    plans: Sequence[Plan],
    rank: int,
    groups: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Make sure that a state dict fits before anything is changed.

    Args:
        state_dict: what ``save`` returned.
        lanes: the optimizer's lanes.
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
    if list(header["plans"]) != [plan.digest for plan in plans]:
        raise StateError(
            "the state dict belongs to another plan; load it with the world size, parameters, policy, bucket_mb and "
            "reduce_dtype it was saved with."
        )
    if header["rank"] != rank:
        raise StateError(f"the state dict is rank {header['rank']}'s shard and this is rank {rank}; load the own one.")
    saved = [{k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]]
    if len(saved) != len(groups):
        raise StateError(f"the state dict has {len(saved)} param groups and the optimizer has {len(groups)}.")
    for settings in saved:
        check_group(settings)
    for index, lane in enumerate(lanes):
        if not isinstance(state_dict["state"].get(index, {}).get("updates"), int):
            raise StateError(f'state "updates" of bucket {index} is missing; the state dict is not complete.')
        for key, tensor in lane.bucket.state().items():
            found = state_dict["state"][index].get(key)
            if found is None or found.shape != tensor.shape:
                shape = None if found is None else tuple(found.shape)
                raise StateError(f'state "{key}" of bucket {index} is {shape}; {tuple(tensor.shape)} is needed.')
    return saved


def load(state_dict: Mapping[str, Any], lanes: Sequence[Lane]) -> None:
    """Copy a checked state dict into the lanes.

    Args:
        state_dict: what ``check`` accepted.
        lanes: the optimizer's lanes.
    """
    for index, lane in enumerate(lanes):
        saved = state_dict["state"][index]
        for key, tensor in lane.bucket.state().items():
            tensor.copy_(saved[key])
        lane.bucket.updates = int(saved["updates"])
