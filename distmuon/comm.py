"""Every collective the optimizer issues, and the tally of what they cost.

With one rank, or without an initialized process group, communication is skipped and the same code runs.

A *full* tensor has the shards of all ranks, rank by rank; ``lengths`` are their elements, equal or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distmuon.clock import PhaseClock
from distmuon.errors import ConfigError
from distmuon.exchange import Exchange, exchange
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


class Pending:
    """A collective under way; keeps its buffers alive until waited for.

    Args:
        result: what ``wait`` returns.
        work: what to wait for; None if the result is there.
        buffers: what the collective reads and writes.
        finish: makes the result from what arrived, after the wait.
    """

    def __init__(
        self,
        result: Tensor,
        work: Any = None,
        buffers: Sequence[Tensor] = (),
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._buffers = buffers
        self._finish = finish

    def done(self) -> bool:
        """Whether waiting would return at once."""
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """Wait for the collective and return its result."""
        if self._work is not None:
            self._work.wait()
            self._work, self._buffers = None, ()
        if self._finish is not None:
            self._result, self._finish = self._finish(self._result), None
        return self._result


class Group:
    """A process group as the optimizer uses it."""

    def __init__(self, process_group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.process_group = process_group
        self.traffic = traffic
        self.size: int = dist.get_world_size(process_group) if _initialized() else 1
        self.rank: int = dist.get_rank(process_group) if _initialized() else 0
        self.ranks: tuple[int, ...] = (0,)
        self.device = torch.device("cpu")
        self._exchanges = 0
        if _initialized():
            self.ranks = tuple(dist.get_process_group_ranks(process_group))
            if dist.get_backend(process_group) == "nccl":
                self.device = torch.device("cuda", torch.cuda.current_device())

    def reduce_scatter(self, full: Tensor, lengths: Sequence[int]) -> Pending:
        """Sum a full tensor over the ranks and keep the own shard; asynchronous."""
        if self.size == 1:
            return Pending(full)
        self.traffic.add("reduce_scatter", self.size, full, ring_bytes(_bytes(full), self.size))
        backend = self._backend(full.device)
        if backend == "gloo" or (backend != "nccl" and len(set(lengths)) > 1):
            return self._exchange_and_sum(full, lengths)
        shard = full.new_empty(lengths[self.rank])
        if len(set(lengths)) > 1:
            # One call, which NCCL runs as a group of reduces to the owners.
            parts = list(torch.split(full, list(lengths)))
            work = dist.reduce_scatter(shard, parts, group=self.process_group, async_op=True)
        else:
            collective = _flat_collective("reduce_scatter_single", "reduce_scatter_tensor")
            work = collective(shard, full, group=self.process_group, async_op=True)
        return Pending(shard, self._watched("reduce_scatter", full, work), (full, shard))

    def all_gather(self, full: Tensor, lengths: Sequence[int]) -> Pending:
        """Complete a full tensor whose own shard is in place; asynchronous."""
        if self.size == 1:
            return Pending(full)
        self.traffic.add("all_gather", self.size, full, ring_bytes(_bytes(full), self.size))
        shards = list(torch.split(full, list(lengths)))
        shard = shards[self.rank]
        backend = self._backend(full.device)
        if backend == "gloo":
            works = [self._exchange([shard] * self.size, shards)]
        elif len(set(lengths)) == 1:
            collective = _flat_collective("all_gather_single", "all_gather_into_tensor")
            works = [collective(full, shard, group=self.process_group, async_op=True)]
        elif backend == "nccl":
            # One call, which NCCL runs as a group of broadcasts from the owners.
            works = [dist.all_gather(shards, shard, group=self.process_group, async_op=True)]
        else:
            works = [
                dist.broadcast(part, rank, group=self.process_group, async_op=True)
                for part, rank in zip(shards, self.ranks, strict=True)
                if part.numel()
            ]
        return Pending(full, self._watched("all_gather", full, *works), (full, shard))

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int]) -> Pending:
        """Send consecutive parts of a flat tensor to each rank; asynchronous."""
        received = send.new_empty(sum(receive_counts))
        work = dist.all_to_all_single(
            received, send, receive_counts, send_counts, group=self.process_group, async_op=True
        )
        self.traffic.add("all_to_all", self.size, send, _bytes(send))
        return Pending(received, self._watched("all_to_all", send, work), (send, received))

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
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.process_group)
        longest = max(int(value) for value in lengths)
        padded = torch.cat([data, data.new_zeros(longest - data.numel())])
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self.process_group)
        return [bytes(part[: int(count)].tolist()).decode() for part, count in zip(texts, lengths, strict=True)]

    def _exchange_and_sum(self, full: Tensor, lengths: Sequence[int]) -> Pending:
        """Send every rank its shard and sum there in the order of the ranks, wherever an element lies."""
        own = lengths[self.rank]
        work: Any
        if self._backend(full.device) == "gloo":
            parts = list(torch.split(full, list(lengths)))
            others = list(full.new_empty(self.size - 1, own))
            received = [*others[: self.rank], parts[self.rank], *others[self.rank :]]
            work = self._exchange(parts, received)
        else:
            flat = full.new_empty(self.size * own)
            received = list(flat.view(self.size, own))
            splits = [own] * self.size, list(lengths)
            work = dist.all_to_all_single(flat, full, *splits, group=self.process_group, async_op=True)
        watched = self._watched("reduce_scatter", full, work)
        return Pending(full, watched, [full, *received], lambda _: _sum_in_order(received))

    def _exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Exchange:
        self._exchanges = (self._exchanges + 1) % _TAGS
        return exchange(send, receive, self.rank, self.ranks, self.process_group, self._exchanges)

    def _backend(self, device: torch.device) -> str:
        """What moves tensors of a device; a group may have a backend for each."""
        group: Any = self.process_group or dist.group.WORLD
        try:
            return str(group._get_backend(device).name())
        except RuntimeError:
            return dist.get_backend(group)

    def _all_reduce(self, values: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            work = dist.all_reduce(values, op, group=self.process_group, async_op=True)
            self._watched("all_reduce", values, work).wait()
            self.traffic.add("all_reduce", self.size, values, ring_bytes(2 * _bytes(values), self.size))
        return values

    def _watched(self, collective: str, payload: Tensor, *works: Any) -> Any:
        return self.traffic.clock.collective(collective, *works, bytes=_bytes(payload), ranks=self.size)


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
    group = dist.new_group()
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
