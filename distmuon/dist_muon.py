"""DistMuon: Muon with ZeRO-1 sharding of its own.

Gradients are reduce-scattered while backward runs; ``step`` runs guard, momentum, completion, Newton-Schulz, apply and
all-gather on this rank's shard. With one rank the same code runs and communication is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distmuon import domains, guard, pipeline, sharded_state
from distmuon.adamw import choose_adamw
from distmuon.binding import bind
from distmuon.checked_optimizer import evaluate
from distmuon.comm import Group, own_process_group
from distmuon.config import ShardSettings, make_settings
from distmuon.errors import ConfigError
from distmuon.gradients import ReducingOptimizer, copied
from distmuon.groups import Params, check_saved, pack_groups, restore_group
from distmuon.ns_settings import NewtonSchulz
from distmuon.plan import Plan, Policy
from distmuon.planner import TransportChoice
from distmuon.reducer import BucketReduction


class DistMuon(ReducingOptimizer):
    """Muon for matrices and AdamW for everything else, with gradients, state and work sharded over the ranks.

    Do not wrap the model in DistributedDataParallel: gradients are averaged here. Parameters must start equal on all
    ranks. A gradient that is None counts as zero.

    Args:
        params: ``distmuon.param_groups(model)``, ``model.named_parameters()``, a list of tensors, or param groups with
            a "kind" of "muon" or "adamw".
        lr: learning rate of the matrices; with the RMS-matched scale it can be taken over from a tuned AdamW. Of a
            one-element tensor every param group gets a copy, which schedulers fill in place.
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
        max_skipped_steps: raise after so many steps in a row with gradients that are not finite; None never does.
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

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adamw_lr: float | Tensor | None = None,
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
        max_skipped_steps: int | None = 5,
        grad_accum_dtype: torch.dtype | None = None,
        transport: TransportChoice = "auto",
        expert_groups: Mapping[str, dist.ProcessGroup] | None = None,
    ) -> None:
        arguments = locals()
        self._connect(own_process_group(process_group), expert_groups or {})
        with guard.shared_failure(self._main):
            values = {field: arguments[field] for field in ShardSettings.model_fields}
            self.settings = make_settings(**{**values, "ns": NewtonSchulz() if ns is None else ns})
            self._watch_gradients()
            self._start(params, lr, adamw_lr)
            trained, frozen = bind(self.param_groups, 0)
            if not trained:
                raise ConfigError("every parameter is frozen; at least one must require a gradient.")
            self._adamw = choose_adamw(self.settings.adamw_backend, trained[0].tensor.device)
        self._place(trained, frozen)

    @property
    def group(self) -> Group:
        """The data-parallel group."""
        return self._main

    @property
    def plans(self) -> Sequence[Plan]:
        """What lies where: one plan for each process group, dtype and device, and more for groups added later."""
        self._need_placed()
        return tuple(self._plans)

    @property
    def reductions(self) -> Sequence[BucketReduction]:
        """This rank's buckets, in the order of their launch."""
        self._need_placed()
        return tuple(self._reducer.reductions)

    def check_agreement(self) -> None:
        """Place groups added since, and make sure that all ranks have the same parameters, values and settings.

        Every rank must call it.

        Raises:
            RankMismatchError: they disagree; raised on every rank.
        """
        self._meet()
        domains.agree(self._bound, self.param_groups, self._main, self._experts, self.settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters as the constructor takes them; every rank must add the same ones, or the next step raises.

        They are placed when all ranks meet next: in ``step``, ``load_state_dict``, ``check_agreement`` and the like.

        Args:
            param_group: a param group as the constructor takes it.

        Raises:
            ConfigError: a setting is out of range; nothing is added then.
            ParameterError: a parameter cannot be optimized as it is; nothing is added then.
        """
        before = len(self.param_groups)
        try:
            self._enlist(param_group, set(self._experts))
            if self._placed:
                bind(self.param_groups[self._placed :], self._placed, self._bound)
        except ValueError:
            del self.param_groups[before:]
            raise

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
            NonFiniteGradientError: this was the last of ``max_skipped_steps`` in a row; raised on every rank.
            CollectiveError: a rank is gone or did not answer; raised on every other rank.
        """
        loss = evaluate(closure)
        self.finish_gathers()
        ready = self._get_ready()
        self.grad_norm, error = ready.verdict.norm, None
        if ready.verdict.finite:
            rules = ready.settings.groups, ready.coefficient, self.settings.ns, self._adamw
            pipeline.update(self._reducer.reductions, self._waves, *rules, self.clock, self._overlap)
            self._skipped_in_a_row = 0
        else:
            error = self._count_skip(lambda: guard.gather_names(self._main, self._reducer.non_finite()))
        self.clock.step += 1
        self.forget_gradients()
        if error is not None:
            raise error
        return loss

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: momentum, second moments, master weights."""
        tensors = [tensor for reduction in self.reductions for tensor in reduction.bucket.state().values()]
        return sum(tensor.nbytes for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state, with the plan it belongs to; tensors are the live state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        reductions = self.reductions
        state_dict = sharded_state.save(reductions, self.plans, self._main.rank, pack_groups(self.param_groups))
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def __deepcopy__(self, memo: dict[int, Any]) -> DistMuon:
        """Optimize copies of the parameters in the same process groups; each rank that steps one must make one.

        Gradients, hooks and ``overlap_forward`` are not copied.
        """
        self._need_placed()
        self.finish_gathers()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        experts = {name: group.process_group for name, group in self._experts.items()}
        twin._connect(self._main.process_group, experts)
        twin.settings, twin._rates = self.settings, copy.deepcopy(self._rates, memo)
        twin.skipped_steps, twin._skipped_in_a_row = self.skipped_steps, self._skipped_in_a_row
        twin.grad_norm, twin.clock.step = self.grad_norm, self.clock.step
        twin._adamw = choose_adamw(self.settings.adamw_backend, self._bound[0].tensor.device)
        groups = copy.deepcopy(self.param_groups, memo)
        twin.__setstate__({"defaults": copy.deepcopy(self.defaults, memo), "state": {}, "param_groups": groups})
        twin._bound, twin._frozen = copy.deepcopy((self._bound, self._frozen), memo)
        twin._watch_gradients()
        owners = {id(self._main): twin._main}
        owners |= {id(group): twin._experts[name] for name, group in self._experts.items()}
        twin._reducer.add([copied(reduction, owners[id(reduction.group)], memo) for reduction in self.reductions])
        twin._plans, twin._waves, twin._placed = list(self._plans), self._waves, self._placed
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("DistMuon is tied to its ranks and cannot be pickled; save its state_dict() instead.")

    def _restore(self, state_dict: Any) -> None:
        self._meet()
        self.finish_gathers()
        with guard.shared_failure(self._main):
            loaded = check_saved(state_dict, self.param_groups)
            sharded_state.check(state_dict, self._reducer.reductions, self._plans, self._main.rank)
        guard.check_agreement(self._main, [("a state dict", "to load")])
        for group, saved in zip(self.param_groups, loaded, strict=True):
            restore_group(group, saved)
        sharded_state.load(state_dict, self._reducer.reductions)
        self.forget_gradients()
