"""A decoder-only mixture-of-experts language model on ``deepspeed.moe.layer.MoE``.

Shapes: B sequences, T positions, D width, H query heads, K key/value heads, C channels per head, F expert hidden width,
V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from distmuon.train.config import ModelConfig

# Standard deviation of initial weights, as in GPT-2.
_INIT_STD = 0.02


class Output(NamedTuple):
    """Losses of one batch; only ``objective`` has a gradient."""

    objective: Tensor
    """Next-token loss plus the weighted load-balancing loss."""
    loss: Tensor
    """Mean next-token loss, in nats."""
    aux_loss: Tensor
    """Load-balancing loss, summed over blocks."""
    expert_counts_LE: Tensor
    """How many tokens chose each expert, [layers, experts]."""


class SwiGLU(nn.Module):
    """Expert with a gated hidden layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        output: Tensor = self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))
        return output


class SiLUMLP(nn.Module):
    """Expert with a plain hidden layer: down(silu(up(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        output: Tensor = self.down(F.silu(self.up(x_TD)))
        return output


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; q, k and v are separate matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        channels = config.width // config.heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * channels, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * channels, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Mix positions.

        Args:
            x_BTD: [B, T, D] normalized residual stream.
            cos_TC: [T, C] cosines of the rotary angles.
            sin_TC: [T, C] sines of the rotary angles.

        Returns:
            [B, T, D].
        """
        q_BHTC = rotate(split_heads(self.q(x_BTD), self.heads), cos_TC, sin_TC)
        k_BKTC = rotate(split_heads(self.k(x_BTD), self.kv_heads), cos_TC, sin_TC)
        v_BKTC = split_heads(self.v(x_BTD), self.kv_heads)
        mixed_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        output: Tensor = self.out(mixed_BHTC.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Pre-norm attention and mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        expert = {"swiglu": SwiGLU, "silu": SiLUMLP}[config.expert](config.width, config.expert_hidden)
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width)
        # Every token reaches its experts, and routing has no randomness: runs are comparable and reproducible.
        self.moe = MoE(
            config.width,
            expert=expert,
            num_experts=config.experts,
            ep_size=config.ep_size,
            k=config.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream, the load-balancing loss, and the tokens per expert."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TC, sin_TC)
        mixed_BTD, aux_loss, counts_E = self.moe(self.moe_norm(x_BTD))
        return x_BTD + mixed_BTD, aux_loss, counts_E


class MoETransformer(nn.Module):
    """The language model; initialized so that weights depend on the seed and their name only.

    Args:
        config: shape of the model.
        vocabulary: number of token ids.
        seed: seed of the initial weights.
        autocast: dtype of mixed-precision matrix products; None computes in the parameters' dtype.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.autocast = autocast
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, vocabulary, bias=False)
        initialize(self, seed)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Output:
        """Compute the losses of a batch.

        Args:
            tokens_BT: [B, T] int64 inputs.
            targets_BT: [B, T] int64 next tokens.

        Returns:
            The losses and the expert counts.
        """
        logits_BTV, aux_loss, counts_LE = self.logits(tokens_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
        objective = loss + self.config.aux_loss_weight * aux_loss
        return Output(objective, loss.detach(), aux_loss.detach(), counts_LE)

    def logits(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [B, T, V] logits, the load-balancing loss, and [L, E] expert counts."""
        enabled = self.autocast is not None
        with torch.autocast(tokens_BT.device.type, dtype=self.autocast or torch.bfloat16, enabled=enabled):
            return self._logits(tokens_BT)

    def _logits(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BTD = self.embedding(tokens_BT) * math.sqrt(self.config.width)
        cos_TC, sin_TC = rotary_angles(tokens_BT.shape[1], self.config, x_BTD.device)
        aux_losses, counts = [], []
        for block in self.blocks:
            x_BTD, aux_loss, counts_E = block(x_BTD, cos_TC, sin_TC)
            aux_losses.append(aux_loss.float())
            counts.append(counts_E)
        head = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x_BTD), head), torch.stack(aux_losses).sum(), torch.stack(counts)


def initialize(model: nn.Module, seed: int) -> None:
    """Draw weights N(0, 0.02) from a generator per parameter, so that ranks and group sizes cannot matter.

    Args:
        model: the model, written in place.
        seed: seed of the run.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{global_name(model, name)}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _INIT_STD)


def global_name(model: nn.Module, name: str) -> str:
    """Name a parameter by its expert's number among all ranks' experts.

    Args:
        model: the model.
        name: a parameter name on this rank.

    Returns:
        The name with the local expert number replaced, or unchanged.
    """
    prefix, marker, rest = name.partition(".deepspeed_moe.experts.deepspeed_experts.")
    if not marker:
        return name
    moe: Any = model.get_submodule(prefix)
    local, _, tail = rest.partition(".")
    # Expert-parallel groups are runs of consecutive ranks; they do not exist yet when weights are drawn.
    rank = dist.get_rank() if dist.is_initialized() else 0
    first = rank % moe.ep_size * moe.num_local_experts
    return f"{prefix}{marker}{first + int(local)}.{tail}"


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, heads * C] to [B, heads, T, C]."""
    batch, length, _ = x_BTD.shape
    return x_BTD.view(batch, length, heads, -1).transpose(1, 2)


def rotary_angles(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embeddings, each [T, C].

    Source: Su et al., "RoFormer" (arXiv 2104.09864), equation 34.
    """
    channels = config.width // config.heads
    frequencies = config.rope_base ** (-torch.arange(0, channels, 2, device=device).float() / channels)
    angles_TC = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles_TC.cos(), angles_TC.sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + C/2) by the position's angles."""
    first, second = x_BHTC.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHTC.float() * cos_TC + turned * sin_TC).to(x_BHTC.dtype)
