"""DistMuon as the DeepSpeed engine wants a ZeRO-1 optimizer to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

from deepspeed.runtime.base_optimizer import ZeROOptimizer

from distmuon.dist_muon import DistMuon


class ZeroDistMuon(DistMuon, ZeROOptimizer):
    """DistMuon driven by a DeepSpeedEngine.

    The engine decides which micro-batch is the last of a step; gradients are reduced while that one's backward runs.
    ``gradient_clipping`` clips raw gradients, before momentum.

    Args:
        engine: the engine under construction.
        groups: DistMuon's param groups.
        **settings: keyword arguments of DistMuon.
    """

    def __init__(self, engine: Any, groups: list[dict[str, Any]], **settings: Any) -> None:
        self._engine = engine
        ZeROOptimizer.__init__(self)
        DistMuon.__init__(
            self,
            groups,
            process_group=engine.seq_data_parallel_group,
            expert_groups=engine.expert_data_parallel_group if engine.has_moe_layers else None,
            **settings,
        )
        # What the engine reads of any ZeRO optimizer.
        self.dp_process_group = engine.seq_data_parallel_group
        self.clip_grad = engine.gradient_clipping()
        self.overflow = False
        self._global_grad_norm = 0.0
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.torch_autocast_gradscaler = None
        self.dynamic_loss_scale = False
        self.loss_scale = self.cur_scale = 1.0
        self.mpu = engine.mpu
        self.round_robin_bit16_groups = [list(group["params"]) for group in self.param_groups]

    def reduces_in_backward(self) -> bool:
        """Whether the engine is at a gradient accumulation boundary and reduces."""
        engine = self._engine
        boundary = engine.is_gradient_accumulation_boundary()
        return bool(boundary and engine.enable_backward_allreduce and not engine.inside_no_sync_ctxt)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Finish the reductions of a step; the engine calls it at the boundary.

        Args:
            pipeline_parallel: always False, since pipelines are refused.
        """
        super().reduce_gradients()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, step, and tell the engine the raw gradient norm and whether the step was skipped.

        Args:
            closure: not used by the engine.

        Returns:
            What ``DistMuon.step`` returns.
        """
        skipped = self.skipped_steps
        self._clip = self.clip_grad or math.inf, None
        result = super().step(closure)
        self._global_grad_norm = self.grad_norm
        self.overflow = self.skipped_steps > skipped
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("the optimizer of an engine is tied to it and cannot be copied; save a checkpoint instead.")

    def refresh_fp32_params(self) -> None:
        """Take the master weights of 16-bit parameters from the parameters."""
        self.finish_gathers()
        for reduction in self._reducer.reductions:
            if reduction.bucket.master is not None:
                reduction.bucket.master.copy_(reduction.bucket.pack_shard())
