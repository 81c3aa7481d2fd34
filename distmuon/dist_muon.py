"""DistMuon: Muon with ZeRO-1 sharding of its own.

Gradients are reduce-scattered while backward runs; ``step`` runs guard, momentum, completion, Newton-Schulz, apply and
all-gather on this rank's shard. With one rank the same code runs and communication is skipped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distmuon import domains, guard, pipeline, sharded_state
from distmuon.adamw import choose_adamw
from distmuon.bucket import BoundParam
from distmuon.clock import PhaseClock
from distmuon.comm import Group, Traffic, own_process_group
from distmuon.config import ShardSettings, make_settings
from distmuon.errors import ConfigError
from distmuon.forward_overlap import ForwardOverlap
from distmuon.groups import Params, bind, check_group, check_unchanged, complete_group, to_groups
from distmuon.ns_settings import NewtonSchulz
from distmuon.plan import Plan, Policy
from distmuon.planner import TransportChoice
from distmuon.readiness import Readiness, StepSettings, check_clip, find_loss_scale, get_ready
from distmuon.reducer import Reducer

log = logging.getLogger(__name__)


class DistMuon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for everything else, with gradients, state and work sharded over the ranks.

    Do not wrap the model in DistributedDataParallel: gradients are averaged here. Parameters must start equal on all
    ranks. A gradient that is None counts as zero.

    Args:
        params: ``distmuon.param_groups(model)``, ``model.named_parameters()``, a list of tensors, or param groups with
            a "kind" of "muon" or "adamw".
        lr: learning rate of the matrices; with the RMS-matched scale it can be taken over from a tuned AdamW.
        weight_decay: decoupled weight decay.
        momentum: Muon's momentum in [0, 1).
        nesterov: whether Muon looks ahead by one momentum step.
        adamw_lr: learning rate of the AdamW parameters; None takes lr.
        adamw_betas, adamw_eps: AdamW's decay rates and denominator floor.
        adamw_weight_decay: weight decay of the AdamW parameters; None takes weight_decay.
        process_group: data-parallel group, or a DeviceMesh of all ranks with equal parameters, as replicate x shard;
            None makes an own group of all ranks.
        policy: "balanced" keeps matrices whole, "flat" cuts equal contiguous shards as ZeRO-1 does, "team" lets several
            ranks share a matrix that is too large for one.
        reduce_dtype: precision in which gradients are summed over the ranks.
        bucket_mb: least size of a reduce-scatter in MB; None means 25, or 10^6 elements a rank.
        max_grad_norm: clip the global norm of the raw gradients to this; None does not clip.
        ns: Newton-Schulz settings; None means ``NewtonSchulz()``.
        adamw_backend: "auto", "torch" or "apex" (NVIDIA's FusedAdam).
        grad_accum_dtype: torch.float32 accumulates micro-batches in float32 and releases p.grad; None uses p.grad.
        transport: "scatter" for equal shards in every bucket, "owner" for unequal ones, "auto" for the faster.
        expert_groups: expert-data-parallel groups by the name that param groups give as "expert_group".

    Raises:
        ConfigError: a setting is out of range.
        ParameterError: a parameter cannot be optimized as it is.
        RankMismatchError: the ranks disagree about parameters or settings; raised on every rank.

    Source: Moonlight (arXiv 2502.16982), algorithm 1; K. Jordan et al., "Muon", 2024.
    """

    # torch.amp.GradScaler then leaves p.grad alone and, for the length of a step, sets grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        policy: Policy = "balanced",
        reduce_dtype: torch.dtype = torch.float32,
        bucket_mb: float | None = None,
        max_grad_norm: float | None = None,
        ns: NewtonSchulz | None = None,
        *,
        adamw_backend: str = "auto",
        grad_accum_dtype: torch.dtype | None = None,
        transport: TransportChoice = "auto",
        expert_groups: Mapping[str, dist.ProcessGroup] | None = None,
    ) -> None:
        arguments = locals()
        self.clock = PhaseClock()
        self.traffic = Traffic(clock=self.clock)
        self.plans: list[Plan] = []
        self.skipped_steps = 0
        self.grad_norm = 0.0
        self._overlap = ForwardOverlap(self.clock)
        self._synchronize = True
        self._clip: tuple[float, float | None] | None = None
        self._bound: list[BoundParam] = []
        self._frozen: list[BoundParam] = []
        self._main = Group(own_process_group(process_group), self.traffic)
        self._experts = {name: Group(pg, self.traffic) for name, pg in (expert_groups or {}).items()}
        with guard.shared_failure(self._main):
            values = {field: arguments[field] for field in ShardSettings.model_fields}
            self.settings = make_settings(**{**values, "ns": ns or NewtonSchulz()})
            accumulate = grad_accum_dtype is not None
            self._reducer = Reducer(reduce_dtype, self.reduces_in_backward, self._overlap.is_unseen, accumulate)
            # Schedulers that cycle momentum ask the defaults for it.
            super().__init__(to_groups(params), {"momentum": momentum})
            trained, frozen = bind(self.param_groups, 0)
            if not trained:
                raise ConfigError("every parameter is frozen; at least one must require a gradient.")
            self._adamw = choose_adamw(self.settings.adamw_backend, trained[0].tensor.device)
        self._place(trained, frozen)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters as the constructor takes them; every rank must add the same ones."""
        constructing = not self.plans
        before = len(self.param_groups)
        try:
            with contextlib.nullcontext() if constructing else guard.shared_failure(self._main):
                for group in to_groups([param_group]):
                    complete_group(group, self.settings, set(self._experts))
                    super().add_param_group(group)
                trained, frozen = ([], []) if constructing else bind(self.param_groups[before:], before, self._bound)
            if not constructing:
                self._place(trained, frozen)
        except ValueError:
            del self.param_groups[before:]
            raise

    def reduces_in_backward(self) -> bool:
        """Whether a backward pass started now is the one whose gradients are reduced."""
        return self._synchronize

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them; for all micro-batches of a step but the last."""
        before, self._synchronize = self._synchronize, False
        try:
            yield
        finally:
            self._synchronize = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and whatever was reduced of them.

        Args:
            set_to_none: drop p.grad instead of zeroing it.
        """
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def overlap_forward(self, model: torch.nn.Module) -> None:
        """Leave all-gathers under way after ``step()``; see ``ForwardOverlap.hook``. Every rank must call it.

        Args:
            model: has all parameters of this optimizer; replaces one given before. What is read of it otherwise than
                in its modules' forward or by ``state_dict`` needs ``finish_gathers`` first.
        """
        self._overlap.hook(model)

    def finish_gathers(self) -> None:
        """Wait until all parameters have the values of the last step."""
        self._overlap.wait()

    def reduce_gradients(self) -> None:
        """Finish what backward started: wait for reductions and launch those that lacked a gradient."""
        with self.clock("reduce"):
            self._reducer.finish()

    def clip_grad_norm_(self, max_norm: float, loss_scale: float = 1.0) -> float:
        """Clip the raw gradients of the coming step, before momentum; p.grad is left as it is.

        Args:
            max_norm: largest global norm, above 0; infinity only measures.
            loss_scale: what the loss was multiplied by; 1 without a GradScaler.

        Returns:
            The global norm of the mean gradients before clipping, not finite if any gradient is not.

        Raises:
            ConfigError: max_norm is not above 0.
            RankMismatchError: the settings of the ranks disagree.
        """
        self._clip = max_norm, loss_scale
        return self._get_ready(loss_scale).verdict.norm

    def finite_gradients(self, loss_scale: float) -> bool:
        """Whether the mean gradients are finite on all ranks, for ``distmuon.GradScaler``; every rank must ask.

        Args:
            loss_scale: what the loss was multiplied by.
        """
        return self._get_ready(loss_scale).verdict.finite

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; every rank must call it.

        Args:
            closure: re-evaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            The closure's result, or None. If a gradient is not finite on any rank, all ranks leave parameters and
            state as they are and count the step in ``skipped_steps``.

        Raises:
            ParameterError: a parameter was frozen or unfrozen since construction.
            SynchronizationError: GradScaler.unscale_ was used on gradients that were already reduced.
            RankMismatchError: the settings of the ranks disagree; raised on every rank.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.finish_gathers()
        ready = self._get_ready()
        self.grad_norm = ready.verdict.norm
        if ready.verdict.finite:
            rules = ready.settings.groups, ready.coefficient, self.settings.ns, self._adamw
            pipeline.update(self._reducer.reductions, self._waves, *rules, self.clock, self._overlap)
        else:
            self.skipped_steps += 1
            log.warning("gradients are not finite: all ranks skip this step (%d so far)", self.skipped_steps)
        self._forget_gradients()
        return loss

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: momentum, second moments, master weights."""
        tensors = [tensor for reduction in self._reducer.reductions for tensor in reduction.bucket.state().values()]
        return sum(tensor.nbytes for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state, with the plan it belongs to."""
        packed = super().state_dict()["param_groups"]
        return sharded_state.save(self._reducer.reductions, self.plans, self._main.rank, packed)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this rank's shard.

        Args:
            state_dict: what ``state_dict`` returned on the same rank of an equal plan.

        Raises:
            StateError: it belongs to other parameters, ranks or settings; nothing is changed then.
            RankMismatchError: that is so on some ranks only; raised on every rank.
        """
        self.finish_gathers()
        with guard.shared_failure(self._main):
            reductions, rank = self._reducer.reductions, self._main.rank
            loaded = sharded_state.check(state_dict, reductions, self.plans, rank, self.param_groups)
        guard.check_agreement(self._main, [("a state dict", "to load")])
        for group, saved in zip(self.param_groups, loaded, strict=True):
            group.update(saved)
        sharded_state.load(state_dict, self._reducer.reductions)
        self._forget_gradients()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("DistMuon is tied to its ranks and cannot be copied or pickled; save its state_dict() instead.")

    def _place(self, trained: list[BoundParam], frozen: list[BoundParam]) -> None:
        """Agree with the other ranks on parameters, plan them, and start to watch for their gradients."""
        self.finish_gathers()
        plans, reductions = domains.build(trained, self.param_groups, self._main, self._experts, self.settings)
        self._bound, self._frozen = self._bound + trained, self._frozen + frozen
        self.plans += plans
        self._reducer.add(reductions)
        self._waves = pipeline.agree_on_waves(self._main, self._reducer.reductions)

    def _get_ready(self, loss_scale: float | None = None) -> Readiness:
        """Phases 1 and 2: reduced gradients, their global norm, one decision for all ranks."""

        def check() -> StepSettings:
            check_unchanged(self._bound, self._frozen)
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None:
                self._reducer.check_untouched()
            scale = find_loss_scale(getattr(self, "grad_scale", None), found_inf) if loss_scale is None else loss_scale
            limit = check_clip(self._clip, scale, self.settings.max_grad_norm)
            groups = [check_group(group) for group in self.param_groups]
            return StepSettings(groups, scale, limit, self._overlap.active)

        self.reduce_gradients()
        with self.clock("guard"):
            return get_ready(self._main, self._reducer, check)

    def _forget_gradients(self) -> None:
        self._reducer.reset()
        self._clip = None
