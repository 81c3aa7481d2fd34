"""All ranks do something, and learn together whether every one of them could."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from distmuon.comm import Group, Traffic
from distmuon.dist_muon import DistMuon
from distmuon.errors import CheckpointError, CollectiveError, DistMuonError
from distmuon.failures import group_timeout

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


@contextlib.contextmanager
def host_group(main: Group) -> Iterator[Group]:
    """A group for tensors of the host with the ranks of another.

    Args:
        main: the optimizer's ranks.

    Yields:
        The same group where it takes such tensors, otherwise a gloo group for the length of the block.
    """
    if main.size == 1 or dist.get_backend(main.process_group) != "nccl":
        yield Group(main.process_group, Traffic())
        return
    own = new_group(main)
    try:
        yield own
    finally:
        dist.destroy_process_group(own.process_group)


def new_group(main: Group) -> Group:
    """A process group of its own, so that saves in the background do not interleave with training.

    Args:
        main: the optimizer's ranks, all of which call this.

    Returns:
        The group; it takes tensors of the host.
    """
    if main.size == 1:
        return main
    backend = dist.get_backend(main.process_group)
    ranks = list(main.ranks)
    made = dist.new_group(
        ranks,
        backend="gloo" if backend == "nccl" else backend,
        use_local_synchronization=True,
        timeout=group_timeout(main.process_group),
    )
    assert isinstance(made, dist.ProcessGroup)
    return Group(made, Traffic())


def ranks_of(optimizer: torch.optim.Optimizer | None) -> Group:
    """The ranks that save together.

    Args:
        optimizer: a sharded one knows its group; any other, or none, stands for all ranks.

    Returns:
        The group.
    """
    return optimizer.group if isinstance(optimizer, DistMuon) else Group(None, Traffic())


def _cause(error: CheckpointException, rank: int) -> BaseException | None:
    """What went wrong on one rank, if anything did there."""
    failure = error.failures.get(rank)
    return failure[0] if failure else None


def _describe(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, DistMuonError) else f"{type(error).__name__}: {text}"
