"""Reduce-scatter and all-gather for gloo, of shards of any length, from point-to-point messages.

gloo's own reduce-scatter sends as much as an all-reduce, twice what is needed, and its all-gather takes equal shards
only. It has one connection for a pair of ranks and sends nothing before the receiver's word has come; a word that is
posted after data waits behind them. So all receives are posted first: its own all-to-all and broadcasts, which do not,
take a third longer and twice as long on a slow link.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Exchange:
    """Messages under way. Point-to-point works of gloo cannot be asked whether they are done, so a thread waits.

    Args:
        works: what was posted.
        timeout: how long all of them together may take from now; None leaves the group's own to each.
    """

    def __init__(self, works: Sequence[Any], timeout: timedelta | None = None) -> None:
        self._works = works
        self._deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        self._error: Exception | None = None
        # No daemon: the interpreter waits for it, so that a rank which ends first still sends what others need.
        self._thread = threading.Thread(target=self._wait, name="distmuon-exchange")
        self._thread.start()

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until everything has been sent and received.

        Raises:
            RuntimeError: another rank is gone, or took too long.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait(*self._left())
        except Exception as error:
            self._error = error
        self._works = ()

    def _left(self) -> tuple[()] | tuple[timedelta]:
        if self._deadline is None:
            return ()
        return (timedelta(seconds=max(0.001, self._deadline - time.monotonic())),)


def exchange(
    send: Sequence[Tensor],
    receive: Sequence[Tensor],
    rank: int,
    ranks: Sequence[int],
    group: Any,
    tag: int,
    timeout: timedelta | None = None,
) -> Exchange:
    """Send a part to every other rank and receive one from each.

    Args:
        send: 1-D parts by rank; empty ones and the own are not sent.
        receive: where what comes from each rank goes, as long as the part sent there.
        rank: this rank within the group.
        ranks: global ranks of the group.
        group: the process group, on gloo.
        tag: the same on all ranks, and different from that of exchanges under way.
        timeout: how long it may take; None leaves the group's own to each message.

    Returns:
        The exchange under way; both lists of tensors must live until it is waited for.
    """
    peers = [(rank + distance) % len(ranks) for distance in range(1, len(ranks))]
    works = [
        dist.irecv(receive[peer], ranks[peer], group=group, tag=tag)
        for peer in reversed(peers)
        if receive[peer].numel()
    ]
    works += [dist.isend(send[peer], ranks[peer], group=group, tag=tag) for peer in peers if send[peer].numel()]
    return Exchange(works, timeout)
