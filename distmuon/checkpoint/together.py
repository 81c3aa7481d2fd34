"""All ranks do something, and learn together whether every one of them could."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from distmuon.comm import Group, Traffic
from distmuon.dist_muon import DistMuon
from distmuon.errors import CheckpointError, CollectiveError, DistMuonError
from distmuon.failures import group_timeout
from distmuon.muon import Muon

Result = TypeVar("Result")


def together(group: Group, what: str, action: Callable[[], Result]) -> Result:
    """Run an action on every rank and agree on its success before anyone goes on.

    Args:
        group: the ranks that do it.
        what: the action, as in "rank 1 could not ...".
        action: what to do; may communicate.

    Returns:
        What the action returned.

    Raises:
        DistMuonError: an error of this kind that every rank raises alike.
        CheckpointError: any rank failed; raised on every rank, naming the first.
    """
    error: BaseException | None = None
    results: list[Result] = []
    try:
        results.append(action())
    except CollectiveError:
        # There is nobody left to agree with.
        raise
    except CheckpointException as problem:
        # torch raises it on every rank; only those that failed have something to tell.
        error = _cause(problem, group.rank)
    except Exception as problem:
        error = problem
    texts = group.all_gather_text("" if error is None else _describe(error))
    failed = [(rank, text) for rank, text in enumerate(texts) if text]
    if isinstance(error, DistMuonError) and len(set(texts)) == 1:
        raise error
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"rank {rank} could not {what}: {text}") from error
    if not results:
        raise CheckpointError(f"no rank could {what}, and none says why.")
    return results[0]


def same(group: Group, what: str, value: object) -> None:
    """Make sure that every rank asks for the same.

    Args:
        group: the ranks.
        what: what they ask for, as in "the ranks disagree about ...".
        value: this rank's.

    Raises:
        CheckpointError: they do not; raised on every rank.
    """
    texts = group.all_gather_text(repr(value))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise CheckpointError(f"the ranks disagree about {what}: rank 0 has {texts[0]} and rank {rank} has {text}.")


def settle(optimizer: torch.optim.Optimizer | None) -> None:
    """Bring an optimizer to where it can be copied: parameters gathered, added groups planned; every rank calls it."""
    if isinstance(optimizer, DistMuon):
        optimizer.finish_gathers()
        optimizer.check_agreement()


def host_group(main: Group) -> Group:
    """A group for tensors of the host with the ranks of another.

    Args:
        main: the optimizer's ranks.

    Returns:
        A group of the same ranks: on NCCL one of its own, made once and kept, since torch cannot make a group of the
        same ranks anew where one was destroyed.
    """
    if main.size == 1 or dist.get_backend(main.process_group) != "nccl":
        return Group(main.process_group, Traffic())
    if main.host is None:
        main.host = new_group(main)
    return main.host


def new_group(main: Group) -> Group:
    """A process group of its own, so that saves in the background do not interleave with training.

    Args:
        main: the optimizer's ranks, all of which call this.

    Returns:
        The group; it takes tensors of the host.
    """
    if main.size == 1:
        return Group(main.process_group, Traffic())
    backend = dist.get_backend(main.process_group)
    settings: dict[str, Any] = {
        "backend": "gloo" if backend == "nccl" else backend,
        "timeout": group_timeout(main.process_group),
    }
    if main.size == dist.get_world_size():
        made = dist.new_group(**settings)
    else:
        made = dist.new_group(list(main.ranks), **settings, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return Group(made, Traffic())


def ranks_of(optimizer: torch.optim.Optimizer | None) -> Group:
    """The ranks that save together.

    Args:
        optimizer: a sharded one knows its group; any other, or none, stands for all ranks.

    Returns:
        The group.

    Raises:
        CheckpointError: it is an optimizer that is not known here.
    """
    if optimizer is not None and not isinstance(optimizer, DistMuon | Muon):
        raise CheckpointError(
            f"a {type(optimizer).__name__} cannot be saved here; give DistMuon, Muon, or None for the model alone."
        )
    return optimizer.group if isinstance(optimizer, DistMuon) else Group(None, Traffic())


def _cause(error: CheckpointException, rank: int) -> BaseException | None:
    """What went wrong on one rank, if anything did there."""
    failure = error.failures.get(rank)
    return failure[0] if failure else None


def _describe(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, DistMuonError) else f"{type(error).__name__}: {text}"
