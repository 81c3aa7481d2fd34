"""The models that the optimizers are compared on: a dense GPT, and the mixture of experts of the training system.

Shapes: B sequences, T positions, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmuon.benchmarks import places

_INIT_STD = 0.02


class Block(nn.Module):
    """Pre-norm attention with fused q, k and v, and an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        qkv_BTD = self.qkv(self.attention_norm(x_BTD))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv_BTD.chunk(3, dim=-1))
        mixed_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTC.transpose(1, 2).flatten(2))
        hidden = F.silu(self.up(self.mlp_norm(x_BTD)))
        return x_BTD + torch.as_tensor(self.down(hidden))


class DenseGPT(nn.Module):
    """Decoder-only language model without biases.

    Args:
        width: D.
        layers: number of blocks.
        heads: of each block.
        vocabulary: V.
    """

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=_INIT_STD, generator=generator)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean next-token loss."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.lm_head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


@dataclass(frozen=True)
class Case:
    """A model to compare on."""

    name: str
    title: str
    vocabulary: int
    positions: int
    """Tokens of a rank's micro-batch, in one sequence."""
    build: Callable[[], nn.Module]
    """Makes the model, with the same weights on every call and rank."""
    most_ranks: int = 8
    """Number of ranks up to which all contenders together fit a machine of 24 GiB."""
    turns: float = 1.0
    """Part of the rounds of other models that it is timed for."""

    def tokens(self, generator: torch.Generator) -> Tensor:
        """Draw a micro-batch.

        Args:
            generator: of this rank.

        Returns:
            [1, T + 1] token ids: inputs and targets.
        """
        return torch.randint(0, self.vocabulary, (1, self.positions + 1), generator=generator)


def show(rows: Sequence[dict[str, Any]], models: Sequence[str], table: Callable[[list[dict[str, Any]]], str]) -> None:
    """Print a table for every model.

    Args:
        rows: of all models.
        models: names of cases, in the order of the tables.
        table: formats the rows of one.
    """
    for model in models:
        print(f"\n{CASES[model].title}:\n{table([row for row in rows if row['model'] == model])}")


def objective(model: Callable[[Tensor, Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Compute the loss of a micro-batch.

    Args:
        model: a case's model, or what wraps it.
        tokens: [B, T + 1].

    Returns:
        Scalar with a gradient.
    """
    output = model(tokens[:, :-1], tokens[:, 1:])
    loss: Tensor = getattr(output, "objective", output)
    return loss


def _build_moe() -> nn.Module:
    from distmuon.train.config import ModelConfig, read_toml
    from distmuon.train.model import MoETransformer

    config = ModelConfig(**read_toml(places.ROOT / "configs" / "models" / "moe_mini.toml"))
    return MoETransformer(config, 4096, seed=0)


# Whose figures do not change with their size, as bytes in proportion do not.
SMALL = ("dense", "moe")
CASES = {
    case.name: case
    for case in (
        Case(
            "dense", "dense GPT, 4 blocks of width 256, 3.7 M parameters", 1024, 64, lambda: DenseGPT(256, 4, 4, 1024)
        ),
        Case("moe", "moe_mini: 4 blocks of 8 experts, 3.9 M parameters", 4096, 64, _build_moe),
        Case(
            *("wide", "dense GPT, 2 blocks of width 768, 15.7 M parameters", 1024, 64),
            lambda: DenseGPT(768, 2, 12, 1024),
            most_ranks=2,
            turns=1 / 3,
        ),
    )
}
