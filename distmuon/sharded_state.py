"""This rank's shard of the optimizer state as a dict, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distmuon.errors import StateError
from distmuon.groups import check_entry
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
        index: {**reduction.bucket.state(), "updates": dict(reduction.bucket.updates)}
        for index, reduction in enumerate(reductions)
    }
    header = {"format": FORMAT, "rank": rank, "plans": [plan.digest for plan in plans]}
    return {"state": state, "param_groups": packed_groups, "shard": header}


def check(
    state_dict: Mapping[str, Any],
    reductions: Sequence[BucketReduction],
    plans: Sequence[Plan],
    rank: int,
) -> None:
    """Make sure that the shard of a state dict fits before anything is changed.

    Args:
        state_dict: what ``save`` returned.
        reductions: the optimizer's reductions.
        plans: the plans they belong to.
        rank: this rank.

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
    entries = state_dict.get("state")
    entries = entries if isinstance(entries, Mapping) else {}
    for index, reduction in enumerate(reductions):
        own = {**reduction.bucket.state(), "updates": reduction.bucket.updates}
        check_entry(f"bucket {index}", entries.get(index), own)


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
        reduction.bucket.updates = {group: int(count) for group, count in saved["updates"].items()}
