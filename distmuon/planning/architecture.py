"""Shapes of decoder-only transformers for planning: dense or mixture of experts, grouped-query or latent attention.

Parameter names are those of the models' public implementations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from distmuon.bricks import Kind, ParamSpec
from distmuon.planning.parameters import Part, PlannedParam
from distmuon.strict import Strict


class Experts(Strict):
    """A mixture of experts in every block but the first ones."""

    count: int = Field(ge=1)
    """Routed experts per block."""
    top_k: int = Field(ge=1)
    """Routed experts per token."""
    hidden: int = Field(ge=1)
    """Hidden width of a routed expert, and of a shared one."""
    shared: int = Field(default=0, ge=0)
    """Experts that every token uses; they are one MLP of so many times the hidden width."""
    dense_layers: int = Field(default=0, ge=0)
    """First blocks that have a dense MLP instead."""
    router_bias: bool = False
    """Whether the router has one correction per expert (DeepSeek-V3's balancing without an auxiliary loss)."""
    layout: Literal["separate", "stacked"] = "separate"
    """"separate": each expert has matrices of its own; "stacked": the experts of a block are 3-D parameters."""


class LatentAttention(Strict):
    """Multi-head latent attention. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1."""

    q_rank: int | None = Field(default=None, ge=1)
    """Rank of the compressed queries; None: queries are not compressed."""
    kv_rank: int = Field(ge=1)
    """Rank of the compressed keys and values."""
    qk_nope_dim: int = Field(ge=1)
    """Channels of queries and keys per head that have no rotary positions."""
    qk_rope_dim: int = Field(ge=1)
    """Channels of queries per head that have rotary positions; the key's are shared by all heads."""
    v_dim: int = Field(ge=1)
    """Channels of values per head."""


class Architecture(Strict):
    """A model file for planning; unlike a training model file it names the vocabulary."""

    vocabulary: int = Field(ge=1)
    """Rows of the embedding and of the LM head."""
    width: int = Field(ge=1)
    """Width of the residual stream."""
    layers: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Number of query heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Number of key and value heads; None: as many as query heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Channels per head; None: width / heads."""
    hidden: int | None = Field(default=None, ge=1)
    """Hidden width of dense SwiGLU MLPs; None where every block has experts."""
    tie_embeddings: bool = False
    """Whether the embedding is also the LM head."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether queries and keys are normalized per head."""
    attention: LatentAttention | None = None
    """Latent attention; None: grouped-query attention."""
    moe: Experts | None = None
    """Experts; None: every block has a dense MLP."""
    ep: int = Field(default=1, ge=1)
    """Ranks that share the experts of a block, where nothing else is asked for."""

    @model_validator(mode="after")
    def _fit(self) -> Architecture:
        if self.attention is None and self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}; give head_dim")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}")
        if self.moe is not None and self.moe.top_k > self.moe.count:
            raise ValueError(f"moe.top_k = {self.moe.top_k} is more than moe.count = {self.moe.count}")
        dense = self.layers if self.moe is None else self.moe.dense_layers
        if dense and self.hidden is None:
            raise ValueError("hidden is missing, and there are blocks with a dense MLP")
        if dense > self.layers:
            raise ValueError(f"moe.dense_layers = {dense} is more than layers = {self.layers}")
        return self

    def parameters(self, ep: int, router: Kind = "muon") -> Iterator[PlannedParam]:
        """List the parameters that one rank has a copy of, in forward order.

        Args:
            ep: number of ranks that share the experts of a block; divides ``moe.count``.
            router: rule of the router matrices.

        Yields:
            The parameters.
        """
        table = (self.vocabulary, self.width)
        tied = "tied embedding" if self.tie_embeddings else "embedding"
        yield PlannedParam(ParamSpec("model.embed_tokens.weight", table, "adamw"), "elementwise", tied, 0.0)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield _gain(f"{prefix}input_layernorm.weight", self.width)
            yield from self._grouped(prefix) if self.attention is None else self._latent(prefix, self.attention)
            yield _gain(f"{prefix}post_attention_layernorm.weight", self.width)
            if self.moe is not None and layer >= self.moe.dense_layers:
                yield from self._experts(f"{prefix}mlp.", self.moe, ep, router)
            else:
                yield from _mlp(f"{prefix}mlp.", self.width, self.hidden or 0)
        yield _gain("model.norm.weight", self.width)
        head = ParamSpec("lm_head.weight", table, "adamw")
        # A tied head still costs its product, but is no parameter of its own.
        yield PlannedParam(head, "elementwise", "LM head", 2.0 * head.numel, exists=not self.tie_embeddings)

    def _grouped(self, prefix: str) -> Iterator[PlannedParam]:
        dim = self.head_dim or self.width // self.heads
        rows = {
            "q": self.heads * dim,
            "k": (self.kv_heads or self.heads) * dim,
            "v": (self.kv_heads or self.heads) * dim,
        }
        for name, out in rows.items():
            yield _matrix(f"{prefix}self_attn.{name}_proj.weight", out, self.width, "attention")
            if self.qkv_bias:
                yield _gain(f"{prefix}self_attn.{name}_proj.bias", out)
        yield _matrix(f"{prefix}self_attn.o_proj.weight", self.width, self.heads * dim, "attention")
        for name in ("q", "k") if self.qk_norm else ():
            yield _gain(f"{prefix}self_attn.{name}_norm.weight", dim)

    def _latent(self, prefix: str, latent: LatentAttention) -> Iterator[PlannedParam]:
        prefix += "self_attn."
        queries = self.heads * (latent.qk_nope_dim + latent.qk_rope_dim)
        if latent.q_rank is None:
            yield _matrix(f"{prefix}q_proj.weight", queries, self.width, "attention")
        else:
            yield _matrix(f"{prefix}q_a_proj.weight", latent.q_rank, self.width, "attention")
            yield _gain(f"{prefix}q_a_layernorm.weight", latent.q_rank)
            yield _matrix(f"{prefix}q_b_proj.weight", queries, latent.q_rank, "attention")
        compressed = latent.kv_rank + latent.qk_rope_dim
        yield _matrix(f"{prefix}kv_a_proj_with_mqa.weight", compressed, self.width, "attention")
        yield _gain(f"{prefix}kv_a_layernorm.weight", latent.kv_rank)
        keys_values = self.heads * (latent.qk_nope_dim + latent.v_dim)
        yield _matrix(f"{prefix}kv_b_proj.weight", keys_values, latent.kv_rank, "attention")
        yield _matrix(f"{prefix}o_proj.weight", self.width, self.heads * latent.v_dim, "attention")

    def _experts(self, prefix: str, moe: Experts, ep: int, router: Kind) -> Iterator[PlannedParam]:
        gate = ParamSpec(f"{prefix}gate.weight", (moe.count, self.width), router)
        yield PlannedParam(gate, "dense" if router == "muon" else "elementwise", "router", 2.0 * gate.numel)
        if moe.router_bias:
            yield _gain(f"{prefix}gate.e_score_correction_bias", moe.count)
        local = moe.count // ep
        shapes = {"gate_proj": (moe.hidden, self.width), "up_proj": (moe.hidden, self.width)}
        shapes["down_proj"] = (self.width, moe.hidden)
        # The tokens of all ep ranks are spread over the experts.
        tokens = moe.top_k * ep / moe.count
        if moe.layout == "stacked":
            for name, shape in shapes.items():
                stack = ParamSpec(f"{prefix}experts.{name}", (local, *shape), "muon")
                reason = f"{local} hidden matrices"
                yield PlannedParam(stack, "expert", reason, 2.0 * stack.numel * tokens, expert=True)
        else:
            for number in range(local):
                for name, shape in shapes.items():
                    spec = ParamSpec(f"{prefix}experts.{number}.{name}.weight", shape, "muon")
                    yield PlannedParam(spec, "expert", "hidden matrix", 2.0 * spec.numel * tokens, expert=True)
        if moe.shared:
            yield from _mlp(f"{prefix}shared_experts.", self.width, moe.shared * moe.hidden)


def _matrix(name: str, rows: int, cols: int, part: Part) -> PlannedParam:
    return PlannedParam(ParamSpec(name, (rows, cols), "muon"), part, "hidden matrix", 2.0 * rows * cols)


def _gain(name: str, numel: int) -> PlannedParam:
    return PlannedParam(ParamSpec(name, (numel,), "adamw"), "elementwise", "1-D", 0.0)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[PlannedParam]:
    yield _matrix(f"{prefix}gate_proj.weight", hidden, width, "dense")
    yield _matrix(f"{prefix}up_proj.weight", hidden, width, "dense")
    yield _matrix(f"{prefix}down_proj.weight", width, hidden, "dense")
