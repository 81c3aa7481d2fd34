"""From a collective that failed to an error, on every rank, that says what was going on and which ranks are missing.

A rank that fails writes so into the store that the ranks met by, closes its connections so that those that wait for it
fail too, and reads who else did. That takes up to half a second; collectives that succeed pay nothing. A rank that
waits for one that still computes learns of it when that one comes to its next collective.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distmuon.clock import Place
from distmuon.errors import CollectiveError

# A rank that waits notices within 0.05 s that a connection was closed; one that computes at its next collective.
_HEAR_SECONDS = 0.5
_POLL_SECONDS = 0.01
# A dead rank's connections close at once, and what the living wrote before may arrive a little later.
_GRACE_SECONDS = 0.1
_MOST_NAMED = 8
# No exchange has it.
_PROBE_TAG = 2**20 + 1


class Failures:
    """Explains the failures of the groups of one optimizer.

    Attributes:
        groups: all of them; the first has every rank.
    """

    def __init__(self) -> None:
        self.groups: list[dist.ProcessGroup | None] = []
        self._missing: tuple[list[int], list[int]] | None = None

    def explain(self, place: Place, collective: str, ranks: Sequence[int], error: Exception) -> CollectiveError:
        """Find out who is missing, and let no rank wait for this one.

        Args:
            place: where the collective was launched.
            collective: its name.
            ranks: global ranks that take part.
            error: what was raised.

        Returns:
            The error to raise from ``error``.
        """
        cause = re.sub(r"^(\[[^\]]*\] )+", "", str(error).partition("\n")[0]).partition(". ")[0].rstrip(".")
        if self._missing is None:
            # Once is enough: after it all connections are closed and say nothing.
            self._missing = self._find_missing(timed_out=bool(re.search("time(d )?out", cause.lower())))
        gone, silent = self._missing
        found = [f"{_name(gone)} gone (connection closed)"] if gone else []
        found += [f"no word from {_name(silent, verb=False)}"] if silent else []
        return CollectiveError(
            f"{place}: {collective} of {len(ranks)} ranks failed: {'; '.join(found) or 'all ranks noticed'}; {cause}; "
            "restart all ranks from the last checkpoint.",
            gone,
            silent,
        )

    def _find_missing(self, timed_out: bool) -> tuple[list[int], list[int]]:
        """Ranks that are gone, and ranks that may be alive but said nothing."""
        main, rank = self.groups[0], dist.get_rank()
        peers = _peers(main)
        # A group of gloo that timed out has closed all its connections itself.
        closed = set() if timed_out else {peer for group in self.groups for peer in _closed_by(group)}
        reports = _Reports(f"distmuon/failed/{getattr(main, 'group_name', '')}", rank, sorted(closed), peers)
        reports.sent.wait(_HEAR_SECONDS)
        for group in self.groups:
            _close(group)
        heard = reports.collect()
        closed.update(peer for report in heard.values() for peer in report)
        missing = [peer for peer in peers if peer not in heard]
        return [peer for peer in missing if peer in closed], [peer for peer in missing if peer not in closed]


class _Reports(threading.Thread):
    """This rank's word to the others, and theirs; a thread, since a store whose host stopped never answers.

    Args:
        prefix: of the keys in the store.
        rank: this rank.
        closed: ranks that closed their connections to this one.
        peers: the other ranks.
    """

    def __init__(self, prefix: str, rank: int, closed: list[int], peers: Sequence[int]) -> None:
        super().__init__(name="distmuon-reports", daemon=True)
        self.sent = threading.Event()
        self._store = dist.distributed_c10d._get_default_store()
        self._prefix, self._rank, self._closed, self._peers = prefix, rank, closed, peers
        self._until = time.monotonic() + _HEAR_SECONDS
        self._heard: dict[int, list[int]] = {}
        self.start()

    def collect(self) -> dict[int, list[int]]:
        """What ranks wrote: those whose connections closed for each; waits for it."""
        self.join(max(0.0, self._until - time.monotonic()) + _GRACE_SECONDS)
        return dict(self._heard)

    def run(self) -> None:
        # A host that died takes the store along: then nothing was heard.
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._prefix}/{self._rank}", json.dumps(self._closed))
            self.sent.set()
            earliest = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < self._until:
                # With thousands of ranks there is no time to ask about all.
                for peer in itertools.takewhile(lambda _: time.monotonic() < self._until, self._peers):
                    key = f"{self._prefix}/{peer}"
                    if peer not in self._heard and self._store.check([key]):
                        self._heard[peer] = json.loads(self._store.get(key))
                if time.monotonic() > earliest and not set(self._peers) - set(self._heard) - set(self._closed):
                    break
                time.sleep(_POLL_SECONDS)
        self.sent.set()


def group_timeout(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long collectives of a group may take.

    Args:
        group: the group; None is that of all ranks.

    Returns:
        What ``init_process_group`` or ``new_group`` was given; None if the backend does not say.
    """
    backend = _gloo(group) or _backend(group, "cuda")
    limit = getattr(getattr(backend, "options", None), "_timeout", None)
    return limit if isinstance(limit, timedelta) else None


def _backend(group: dist.ProcessGroup | None, device: str) -> Any:
    whole: Any = group or dist.group.WORLD
    with contextlib.suppress(RuntimeError):
        return whole._get_backend(torch.device(device))
    return None


def _gloo(group: dist.ProcessGroup | None) -> Any:
    backend = _backend(group, "cpu")
    return backend if backend is not None and backend.name() == "gloo" else None


def _closed_by(group: dist.ProcessGroup | None) -> list[int]:
    """Global ranks that closed their connections to this one; only gloo tells."""
    if _gloo(group) is None:
        return []
    closed = []
    for peer in _peers(group):
        try:
            dist.irecv(torch.empty(1), peer, group=group, tag=_PROBE_TAG)
        except RuntimeError:
            closed.append(peer)
    return closed


def _close(group: dist.ProcessGroup | None) -> None:
    """Close a group's connections, so that ranks that wait for this one fail now and not after the timeout.

    ``abort`` of gloo leaves them open, and NCCL's watchdog ends the process by itself. What closes them is a message
    that does not come in time.
    """
    if _gloo(group) is None:
        return
    for peer in _peers(group):
        # Nothing can be received from a rank whose connection is closed; try the next.
        with contextlib.suppress(RuntimeError):
            work: Any = dist.irecv(torch.empty(1), peer, group=group, tag=_PROBE_TAG)
            work.wait(timedelta(milliseconds=1))


def _peers(group: dist.ProcessGroup | None) -> list[int]:
    """Global ranks of the others in a group."""
    return [peer for peer in dist.get_process_group_ranks(group) if peer != dist.get_rank()]


def _name(ranks: Sequence[int], verb: bool = True) -> str:
    text = f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:_MOST_NAMED]))}"
    if len(ranks) > _MOST_NAMED:
        text += f" and {len(ranks) - _MOST_NAMED} more"
    return f"{text} {'are' if len(ranks) > 1 else 'is'}" if verb else text
