"""What a cluster can do, and what a step asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from distmuon.link import Link
from distmuon.strict import Strict
from distmuon.waves import GPU_NUMEL, IN_FLIGHT_BYTES

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Workload:
    """What happens between two optimizer steps, and in which precision."""

    tokens_per_rank: int = 8192
    """Tokens that a rank's last forward and backward work on."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Forward FLOPs per token of a rank by parameter name, in forward order; empty: two per element of a matrix."""
    reduce_itemsize: int = 4
    """Bytes per element of the gradient reduction."""
    param_itemsize: int = 4
    """Bytes per element of the parameters, hence of the all-gather."""
    piece_itemsize: int = 2
    """Bytes per element of the pieces that complete cut matrices, and of teams' Gram matrices."""
    wave_numel: int = GPU_NUMEL
    """Elements of matrices per rank that are orthogonalized together at least."""
    in_flight_bytes: float = IN_FLIGHT_BYTES
    """Bytes of all-gathers under way beyond which ranks wait for the first; without effect with ``overlap_forward``."""
    overlap_forward: bool = False
    """Whether the next forward starts before all parameters are gathered."""


class Machine(Strict):
    """A cluster; the defaults are nodes of 8 H100 with one 400 Gbit/s port each, see configs/machines/h100_ib.toml."""

    name: str = "8 x H100 SXM a node, InfiniBand NDR 400 Gbit/s a GPU"
    """What it is called in tables."""
    peak_flops: Positive = 989.4e12
    """Matrix products of one rank at best, FLOP/s."""
    model_efficiency: Share = 0.4
    """Part of the peak that forward and backward reach."""
    newton_schulz_efficiency: Share = 0.6
    """Part of the peak that Newton-Schulz reaches."""
    memory_bandwidth: Positive = 3.35e12
    """Of one rank, bytes/s; momentum, AdamW and casts are bound by it."""
    memory_efficiency: Share = 0.8
    """Part of the memory bandwidth that they reach."""
    ranks_per_node: int = Field(default=8, ge=1)
    """Ranks that share the fast links of a node."""
    intra_bandwidth: Positive = 450e9
    """What a rank sends within its node, bytes/s."""
    inter_bandwidth: Positive = 50e9
    """What a rank sends to other nodes while all ranks of its node do the same, bytes/s."""
    link_efficiency: Share = 0.8
    """Part of both that collectives reach."""
    intra_latency: Seconds = 1.9e-6
    """A hop to the next rank of the node, seconds."""
    inter_latency: Seconds = 4.0e-6
    """A hop to another node, seconds."""
    call_overhead: Seconds = 14.0e-6
    """A collective that sends nothing, seconds."""
    reduce_scatter: Literal["ring", "all_to_all"] = "ring"
    """How the backend sums gradients: NCCL by a ring; DistMuon on gloo by an all-to-all and a sum."""

    @property
    def model_flops(self) -> float:
        """FLOP/s of forward and backward."""
        return self.peak_flops * self.model_efficiency

    @property
    def newton_schulz_flops(self) -> float:
        """FLOP/s of Newton-Schulz."""
        return self.peak_flops * self.newton_schulz_efficiency

    @property
    def memory_bytes(self) -> float:
        """Bytes/s of elementwise updates."""
        return self.memory_bandwidth * self.memory_efficiency

    def link(self, stride: int = 1) -> Link:
        """Connection of a group of ranks.

        Args:
            stride: distance of its ranks: 1 for all ranks, the expert-parallel size for an expert-data-parallel group.

        Returns:
            The link.
        """
        return Link(
            bandwidth=self.intra_bandwidth * self.link_efficiency,
            latency=self.intra_latency,
            overhead=self.call_overhead,
            ranks_per_node=max(1, self.ranks_per_node // stride),
            inter_bandwidth=self.inter_bandwidth * self.link_efficiency,
            inter_latency=self.inter_latency,
        )
