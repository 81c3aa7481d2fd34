"""What runs inside the pool's processes: a small mixture-of-experts model, its batches, and DeepSpeed engines."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distmuon
from distmuon import newton_schulz
from tests.distributed.scenario import digest
from tests.ds import session

Config = dict[str, Any]

VOCAB, WIDTH, HIDDEN, EXPERTS, LENGTH = 50, 16, 32, 4, 8
LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 0.01, 0.1
MATRICES = 2 + 2 * EXPERTS
"""The hidden layer, the gate, and two matrices an expert."""

LOUD = 8.0
"""Makes gradient norms so large that DeepSpeed's default clipping at 1.0 acts."""

PARAMS = {"lr": LR, "adamw_lr": ADAMW_LR, "weight_decay": WEIGHT_DECAY, "ns": {"dtype": "float32"}}
BF16 = {"bf16": {"enabled": True}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
"""16-bit parameters, everything that is summed in float32."""
DTYPES: dict[str, Config] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "bf16 in fp32": BF16}

_EXPERT = re.compile(r"deepspeed_experts\.(\d+)\.")


class Net(nn.Module):
    """Embedding, hidden layer, DeepSpeed's mixture of experts unless ``ep`` is None, LM head.

    The experts drop no token and draw no random number.
    """

    def __init__(self, ep: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.moe = None if ep is None else _experts(ep)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a micro-batch."""
        h, auxiliary = F.silu(self.hidden(self.embed(x))), torch.zeros(())
        if self.moe is not None:
            out, auxiliary, _ = self.moe(h)
            h = h + out
        loss = F.cross_entropy(self.head(h).float().view(-1, VOCAB), y.view(-1)) + 0.01 * auxiliary.float()
        return LOUD * loss


def _experts(ep: int) -> Any:
    from deepspeed.moe.layer import MoE

    expert = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.SiLU(), nn.Linear(HIDDEN, WIDTH, bias=False))
    fixed = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
    return MoE(WIDTH, expert=expert, num_experts=EXPERTS, ep_size=ep, k=2, **fixed)


def network(ep: int | None) -> Net:
    """The model, each weight a function of its global name; ``ep`` None has no experts."""
    assert distmuon.__version__  # registered before DeepSpeed is imported
    session.deepspeed()
    model = Net(ep)
    with torch.no_grad():
        for name, parameter in named(model, ep).items():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return model


def named(model: nn.Module, ep: int | None) -> dict[str, nn.Parameter]:
    """Parameters under names that count experts over all ranks."""
    local = EXPERTS // (ep or 1)
    first = dist.get_rank() % (ep or 1) * local

    def rename(name: str) -> str:
        return _EXPERT.sub(lambda found: f"deepspeed_experts.{first + int(found[1])}.", name)

    return {rename(name): parameter for name, parameter in model.named_parameters()}


def rule(name: str) -> str:
    """Update rule that a parameter must get."""
    return "adamw" if name in ("embed.weight", "head.weight", "hidden.bias") else "muon"


def config(**changes: Any) -> Config:
    """A DeepSpeed configuration; ``params`` changes the optimizer's table."""
    params = {**PARAMS, **changes.pop("params", {})}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "DistMuon", "params": params},
        "steps_per_print": 10**9,
        **changes,
    }


def build(settings: Any, ep: int | None = 1, **arguments: Any) -> Any:
    """An engine over a fresh model; ``engine.named`` holds its parameters by global name."""
    model = arguments.pop("model", None) or network(ep)
    make_groups: Callable[[nn.Module], Any] | None = arguments.pop("groups", None)
    given = list(model.parameters()) if make_groups is None else make_groups(model)
    engine, *_ = session.deepspeed().initialize(model=model, model_parameters=given, config=settings, **arguments)
    engine.named = named(engine.module, ep)
    return engine


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens of one micro-batch and what follows them."""
    source = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    x = torch.randint(0, VOCAB, (2, LENGTH), generator=source)
    return x, (x * 7 + 3) % VOCAB


def forward(engine: Any, step: int, micro: int) -> Tensor:
    """Loss of this rank's micro-batch."""
    loss = engine(*batch(step, micro, dist.get_rank()))
    assert isinstance(loss, Tensor)
    return loss


def advance(engine: Any, first: int, last: int) -> list[float]:
    """Train the steps from ``first`` up to ``last``; returns the losses."""
    losses = []
    for step in range(first, last):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = forward(engine, step, micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in engine.named.items()}


def bits(engine: Any) -> tuple[str, str]:
    """Hashes of all parameters and of all optimizer state on this rank."""
    return digest(weights(engine)), digest(engine.optimizer.state_dict())


def shard_parts(engine: Any, key: str) -> list[tuple[str, int, Tensor]]:
    """(Global name, first element, values) of this rank's part of the master weights or the momentum."""
    names = {id(parameter): name for name, parameter in engine.named.items()}
    parts = []
    for reduction in engine.optimizer._reducer.reductions:
        bucket = reduction.bucket
        for piece in bucket.plan.pieces[bucket.rank]:
            values = bucket.state()[key][piece.offset : piece.offset + piece.length]
            parts.append((names[id(bucket.params[piece.param].tensor)], piece.start, values))
    return parts


@contextmanager
def count_orthogonalized() -> Iterator[list[int]]:
    """Batch sizes of the matrices given to Newton-Schulz inside."""
    batches: list[int] = []

    def counting(x: Tensor, *args: Any) -> Tensor:
        batches.append(x.shape[0])
        return newton_schulz.orthogonalize(x, *args)

    with mock.patch("distmuon.batches.orthogonalize", counting):
        yield batches
