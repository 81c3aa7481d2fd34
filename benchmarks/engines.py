"""Contenders driven by a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distmuon.benchmarks.loops import tensors_only
from distmuon.benchmarks.models import objective
from distmuon.benchmarks.optimizers import BETAS, EPS, LR, MOMENTUM, WEIGHT_DECAY

_MOMENTS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
# "standard" runs in bfloat16; the default, "gram", wants float16 and falls back to float32 on a CPU, which is slower.
_MUON = {**_MOMENTS, "momentum": MOMENTUM, "ns_method": "standard"}
# Without it DeepSpeed compiles a fused kernel with g++.
_ADAMW = {**_MOMENTS, "torch_adam": True}


class Engine:
    """A model under ``deepspeed.initialize``.

    Args:
        model: the model.
        optimizer: "type" and "params", as in DeepSpeed's JSON.
        zero: the "zero_optimization" table.
        groups: param groups; None passes the parameters as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Mapping[str, Any],
        zero: Mapping[str, Any],
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        import deepspeed

        self.deepspeed = deepspeed
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()) if groups is None else groups,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": dict(zero),
                "optimizer": dict(optimizer),
                # DeepSpeed's Muon would clip the orthogonalized update.
                "gradient_clipping": 0.0,
                "steps_per_print": 2**31 - 1,
            },
        )

    def forward_backward(self, tokens: Tensor) -> None:
        """Compute the gradients of a micro-batch; the engine reduces them meanwhile."""
        self.engine.backward(objective(self.engine, tokens))

    def step(self) -> None:
        """Update the parameters and drop the gradients."""
        self.engine.step()

    def parameters(self) -> dict[str, Tensor]:
        """Copy the whole parameters, by name; gathers those that ZeRO-3 has cut."""
        found = {}
        for name, parameter in self.engine.module.named_parameters():
            with self.deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name] = parameter.detach().clone()
        return found

    def state(self) -> list[Tensor]:
        """List this rank's moments, master copies of its partitions, and momentum staged for a step."""
        if self.dist_muon is not None:
            return [t for reduction in self.dist_muon._reducer.reductions for t in reduction.bucket.state().values()]
        zero = self.engine.optimizer
        masters = [
            list(getattr(zero, name, ()))
            for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        ]
        return tensors_only([dict(zero.optimizer.state), masters, getattr(zero, "_muon_pending_momentum", {})])

    @property
    def dist_muon(self) -> Any:
        """The DistMuon object; None where another optimizer trains."""
        from distmuon.dist_muon import DistMuon

        return self.engine.optimizer if isinstance(self.engine.optimizer, DistMuon) else None


def dist_muon(model: nn.Module, *, all_adamw: bool = False, **params: Any) -> Engine:
    """Build DistMuon.

    Args:
        model: the model.
        all_adamw: whether matrices take AdamW, too.
        **params: entries of the "params" table.

    Returns:
        The contender.
    """
    table = {
        **{"lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM},
        **{"adamw_betas": list(BETAS), "adamw_eps": EPS},
    }
    groups = [{"params": list(model.parameters()), "name": "all", "kind": "adamw"}] if all_adamw else None
    return Engine(model, {"type": "DistMuon", "params": table | params}, {"stage": 1}, groups)


def deepspeed_adamw(model: nn.Module) -> Engine:
    """Build DeepSpeed's AdamW with ZeRO-1.

    Args:
        model: the model.

    Returns:
        The contender.
    """
    return Engine(model, {"type": "AdamW", "params": _ADAMW}, {"stage": 1})


def deepspeed_muon(model: nn.Module, stage: int) -> Engine:
    """Build DeepSpeed's own Muon.

    Args:
        model: the model.
        stage: of ZeRO.

    Returns:
        The contender.
    """
    # Its stage 3 refuses to run with reduce_scatter.
    zero: dict[str, Any] = {"stage": stage} if stage < 3 else {"stage": 3, "reduce_scatter": False}
    return Engine(model, {"type": "Muon", "params": _MUON}, zero)
