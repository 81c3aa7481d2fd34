"""How long a collective takes: the alpha-beta model, for ranks on nodes.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
sections 4.1 to 4.5; the hops between and within nodes are added up as NCCL's tuning model does (src/graph/tuning.cc).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal, get_args

from distmuon.errors import ConfigError

Collective = Literal["reduce_scatter", "all_gather", "all_reduce", "owner_reduce", "owner_broadcast", "all_to_all"]


@dataclass(frozen=True)
class Link:
    """How a group of ranks is connected; bandwidths are what a rank sends, in bytes per second.

    With the defaults every rank is a node of its own and only ``bandwidth``, ``latency`` and ``overhead`` matter.
    """

    bandwidth: float
    """Between ranks of one node; without ``inter_bandwidth`` between any two ranks."""
    latency: float = 0.0
    """Seconds a message takes to the next rank of the same node, or to any without ``inter_latency``."""
    overhead: float = 0.0
    """Seconds that a call takes whatever it sends."""
    ranks_per_node: int = 1
    """Members of the group on each node."""
    inter_bandwidth: float | None = None
    """Between nodes, for each rank of a node; None is ``bandwidth``."""
    inter_latency: float | None = None
    """Seconds a message takes to another node; None is ``latency``."""

    def nodes(self, world: int) -> int:
        """Number of nodes that a group of ``world`` ranks is spread over."""
        return -(-world // self.ranks_per_node)

    def inter_share(self, world: int, kind: Collective) -> float:
        """Part of the bytes sent that leaves a node, averaged over the ranks.

        Args:
            world: ranks of the group.
            kind: the collective; a ring leaves a node once, an all-to-all goes everywhere.

        Returns:
            From 0, all within nodes, to 1.
        """
        if world == 1 or self.nodes(world) == 1:
            return 0.0
        if kind == "all_to_all":
            return (world - self.ranks_per_node) / (world - 1)
        return self.nodes(world) / world


def collective_seconds(kind: Collective, numel_bytes: float, world: int, link: Link, least: float = 0.0) -> float:
    """Predict how long a collective takes.

    Args:
        kind: "reduce_scatter", "all_gather": rings; "all_reduce": a ring or a tree, what is faster. "owner_reduce",
            "owner_broadcast": pieces of any lengths, each reduced to or sent from its owner along a ring, in one group
            call. "all_to_all": every rank sends a part of its buffer to every other rank, directly.
        numel_bytes: bytes of the full buffer, which every rank has (or gets); for "all_to_all" the bytes of a rank's
            send buffer, or of the busiest one's.
        world: ranks of the group.
        link: how they are connected.
        least: "owner_reduce", "owner_broadcast" only: bytes of the smallest piece; the other bytes pass its owner.

    Returns:
        Seconds; 0 for one rank.

    Raises:
        ConfigError: no such collective.
    """
    if kind not in get_args(Collective):
        raise ConfigError(f"collective {kind!r} is not known; use one of {', '.join(get_args(Collective))}.")
    if world == 1:
        return 0.0
    inter_bandwidth, inter_latency = link.inter_bandwidth or link.bandwidth, link.inter_latency
    nodes, local = link.nodes(world), min(link.ranks_per_node, world)
    inter_hops = (nodes - 1) if inter_latency is not None else 0
    latency = (world - 1 - inter_hops) * link.latency + inter_hops * (inter_latency or 0.0)
    moved = numel_bytes * (world - 1) / world
    if kind == "all_to_all":
        within = numel_bytes * (local - 1) / world / link.bandwidth
        between = numel_bytes * (world - local) / world / inter_bandwidth
        return link.overhead + latency + max(within, between)
    # A ring through n ranks of a node is n rings over one network port each: it leaves the node n times as fast.
    bandwidth = link.bandwidth if nodes == 1 else inter_bandwidth * local
    if nodes > 1 and local > 1:
        bandwidth = min(bandwidth, link.bandwidth)
    if kind == "all_reduce":
        # What is short goes up and down a tree, which has fewer hops than a ring.
        tree = ceil(log2(local)) * link.latency + ceil(log2(nodes)) * (inter_latency or link.latency)
        return link.overhead + 2 * min(latency + moved / bandwidth, tree + numel_bytes / bandwidth)
    if kind in ("owner_reduce", "owner_broadcast"):
        moved = numel_bytes - least
    return link.overhead + latency + moved / bandwidth
