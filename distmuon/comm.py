"""Every collective the optimizer issues, and the tally of what they cost.

With one rank, or without an initialized process group, communication is skipped and the same code runs.

A *full* tensor has the shards of all ranks, rank by rank; ``lengths`` are their elements, equal or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distmuon.clock import PhaseClock, Place
from distmuon.errors import ConfigError
from distmuon.exchange import Exchange, exchange
from distmuon.failures import Failures, group_timeout
from distmuon.pending import NamedWork, Pending
from distmuon.plan import ring_bytes

# Tags of exchanges are used again after this many, when the first have long been waited for.
_TAGS = 2**20


class CollectiveKey(NamedTuple):
    """What collectives are tallied by."""

    collective: str
    group_size: int
    dtype: str


@dataclass
class Cost:
    """Calls, bytes handed to the collective, and bytes that this rank sends in the ring model."""

    calls: int = 0
    payload: int = 0
    wire: int = 0


@dataclass
class Traffic:
    """Tally of the collectives issued since the last reset."""

    costs: dict[CollectiveKey, Cost] = field(default_factory=dict)
    clock: PhaseClock = field(default_factory=PhaseClock)

    def add(self, collective: str, group_size: int, tensor: Tensor, wire: int) -> None:
        """Count one call.

        Args:
            collective: name, e.g. "reduce_scatter".
            group_size: number of ranks taking part.
            tensor: the largest tensor of the call.
            wire: bytes that this rank sends.
        """
        key = CollectiveKey(collective, group_size, str(tensor.dtype).removeprefix("torch."))
        cost = self.costs.setdefault(key, Cost())
        cost.calls += 1
        cost.payload += tensor.numel() * tensor.element_size()
        cost.wire += wire

    def wire_bytes(self) -> int:
        """Ring-model bytes sent by this rank since the last reset."""
        return sum(cost.wire for cost in self.costs.values())

    def reset(self) -> None:
        """Start counting from zero."""
        self.costs.clear()


class Group:
    """A process group as the optimizer uses it; every failure of a collective is a ``CollectiveError``.

    Args:
        process_group: the group; None is that of all ranks.
        traffic: counts what is sent.
        main: the group of all ranks of the optimizer, if this is not it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, traffic: Traffic, main: Group | None = None) -> None:
        self.process_group = process_group
        self.traffic = traffic
        self.failures: Failures = Failures() if main is None else main.failures
        self.failures.groups.append(process_group)
        self.size: int = dist.get_world_size(process_group) if _initialized() else 1
        self.rank: int = dist.get_rank(process_group) if _initialized() else 0
        self.ranks: tuple[int, ...] = (0,)
        self.device = torch.device("cpu")
        # The same ranks on a backend for tensors of the host, once that was asked for.
        self.host: Group | None = None
        self._exchanges = 0
        self._timeout = group_timeout(process_group) if self.size > 1 else None
        if _initialized():
            self.ranks = tuple(dist.get_process_group_ranks(process_group))
            if dist.get_backend(process_group) == "nccl":
                self.device = torch.device("cuda", torch.cuda.current_device())

    def reduce_scatter(self, full: Tensor, lengths: Sequence[int], bucket: int | None = None) -> Pending:
        """Sum a full tensor over the ranks and keep the own shard; asynchronous. It belongs to phase "reduce"."""
        if self.size == 1:
            return Pending(full)
        self.traffic.add("reduce_scatter", self.size, full, ring_bytes(_bytes(full), self.size))
        place = self.traffic.clock.place._replace(phase="reduce", bucket=bucket)
        backend = self._backend(full.device)
        if backend == "gloo" or (backend != "nccl" and len(set(lengths)) > 1):
            return self._exchange_and_sum(full, lengths, place)
        shard = full.new_empty(lengths[self.rank])
        collective: Any = _flat_collective("reduce_scatter_single", "reduce_scatter_tensor")
        given: Any = full
        if len(set(lengths)) > 1:
            # One call, which NCCL runs as a group of reduces to the owners.
            collective, given = dist.reduce_scatter, list(torch.split(full, list(lengths)))
        work = self._launch("reduce_scatter", full, lambda: [self._async(collective, shard, given)], place)
        return Pending(shard, work, (full, shard))

    def all_gather(self, full: Tensor, lengths: Sequence[int]) -> Pending:
        """Complete a full tensor whose own shard is in place; asynchronous."""
        if self.size == 1:
            return Pending(full)
        self.traffic.add("all_gather", self.size, full, ring_bytes(_bytes(full), self.size))
        shards = list(torch.split(full, list(lengths)))
        shard = shards[self.rank]
        backend = self._backend(full.device)

        def start() -> list[Any]:
            if backend == "gloo":
                return [self._exchange([shard] * self.size, shards)]
            if len(set(lengths)) == 1:
                return [self._async(_flat_collective("all_gather_single", "all_gather_into_tensor"), full, shard)]
            if backend == "nccl":
                # One call, which NCCL runs as a group of broadcasts from the owners.
                return [self._async(dist.all_gather, shards, shard)]
            by_rank = zip(shards, self.ranks, strict=True)
            return [self._async(dist.broadcast, part, rank) for part, rank in by_rank if part.numel()]

        return Pending(full, self._launch("all_gather", full, start), (full, shard))

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int]) -> Pending:
        """Send consecutive parts of a flat tensor to each rank; asynchronous."""
        received = send.new_empty(sum(receive_counts))
        given = received, send, receive_counts, send_counts
        work = self._launch("all_to_all", send, lambda: [self._async(dist.all_to_all_single, *given)])
        self.traffic.add("all_to_all", self.size, send, _bytes(send))
        return Pending(received, work, (send, received))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks, in place."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Largest of each element of a small tensor over the ranks, in place."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def all_gather_text(self, text: str) -> list[str]:
        """Collect one text per rank; texts may differ in length."""
        if self.size == 1:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([data.numel()], device=self.device)
        lengths = self._all_gather(length)
        longest = max(int(value) for value in lengths)
        padded = torch.cat([data, data.new_zeros(longest - data.numel())])
        texts = self._all_gather(padded)
        return [bytes(part[: int(count)].tolist()).decode() for part, count in zip(texts, lengths, strict=True)]

    def _exchange_and_sum(self, full: Tensor, lengths: Sequence[int], place: Place) -> Pending:
        """Send every rank its shard and sum there in the order of the ranks, wherever an element lies."""
        own = lengths[self.rank]
        start: Callable[[], Any]
        if self._backend(full.device) == "gloo":
            parts = list(torch.split(full, list(lengths)))
            others = list(full.new_empty(self.size - 1, own))
            received = [*others[: self.rank], parts[self.rank], *others[self.rank :]]
            start = functools.partial(self._exchange, parts, received)
        else:
            flat = full.new_empty(self.size * own)
            received = list(flat.view(self.size, own))
            splits = [own] * self.size, list(lengths)
            start = functools.partial(self._async, dist.all_to_all_single, flat, full, *splits)
        work = self._launch("reduce_scatter", full, lambda: [start()], place)
        return Pending(full, work, [full, *received], lambda _: _sum_in_order(received))

    def _exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Exchange:
        self._exchanges = (self._exchanges + 1) % _TAGS
        return exchange(send, receive, self.rank, self.ranks, self.process_group, self._exchanges, self._timeout)

    def _backend(self, device: torch.device) -> str:
        """What moves tensors of a device; a group may have a backend for each."""
        group: Any = self.process_group or dist.group.WORLD
        try:
            return str(group._get_backend(device).name())
        except RuntimeError:
            return dist.get_backend(group)

    def _all_reduce(self, values: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            self._launch("all_reduce", values, lambda: [self._async(dist.all_reduce, values, op)]).wait()
            self.traffic.add("all_reduce", self.size, values, ring_bytes(2 * _bytes(values), self.size))
        return values

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._launch("all_gather", tensor, lambda: [self._async(dist.all_gather, gathered, tensor)]).wait()
        return gathered

    def _async(self, collective: Any, *args: Any) -> Any:
        return collective(*args, group=self.process_group, async_op=True)

    def _launch(
        self, collective: str, payload: Tensor, start: Callable[[], list[Any]], place: Place | None = None
    ) -> NamedWork:
        """Start a collective; its failure, now or later, says what was going on: here, or at ``place``."""
        clock = self.traffic.clock
        explain = functools.partial(self.failures.explain, place or clock.place, collective, self.ranks)
        try:
            works = start()
        except RuntimeError as error:
            raise explain(error) from error
        return NamedWork(clock.collective(collective, *works, bytes=_bytes(payload), ranks=self.size), explain)


def own_process_group(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """Give the optimizer a group of its own, so that a user's collectives between backward and step cannot interleave.

    Args:
        process_group: the user's group, used as it is; a mesh for all its ranks, whatever its dimensions, since all
            that hold equal gradients share the work; None for all ranks.

    Returns:
        ``process_group``, or a new group of all ranks, or None if there is only one rank.
    """
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim == 1:
            return process_group.get_group()
        if process_group.size() < dist.get_world_size():
            if process_group.mesh_dim_names is None:
                raise ConfigError(
                    f"process_group is a mesh of shape {tuple(process_group.shape)} without names for some of "
                    f"{dist.get_world_size()} ranks; give it mesh_dim_names, or pass a process group."
                )
            return process_group._flatten().get_group()
        process_group = None
    if process_group is not None or not _initialized() or dist.get_world_size() == 1:
        return process_group
    # A new group would otherwise have the backend's default of many minutes.
    group = dist.new_group(timeout=group_timeout(None))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Sum over the ranks in float32, each element in the same order whatever its place."""
    total_N = parts[0].to(torch.float32, copy=True)
    for part_N in parts[1:]:
        total_N += part_N
    return total_N


def _flat_collective(name: str, before_2_13: str) -> Any:
    """Look a collective up by its name in this release of torch, at call time so that tracers see it."""
    return getattr(dist, name, None) or getattr(dist, before_2_13)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
