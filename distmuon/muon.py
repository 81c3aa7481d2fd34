"""Muon on one device: the plain twin of DistMuon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.binding import bind, check_form
from distmuon.bucket import BoundParam
from distmuon.checked_optimizer import CheckedOptimizer, evaluate
from distmuon.clipping import clip_coefficient, judge
from distmuon.config import GroupSettings, MuonSettings, parse, plain
from distmuon.errors import StateError
from distmuon.groups import Params, check_entry, check_group, check_saved, restore_group
from distmuon.newton_schulz import INPUT_DTYPES, find_products, orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.scaling import rms_matched_scale
from distmuon.splits import row_blocks
from distmuon.update import adamw_, apply_, momentum_


class Muon(CheckedOptimizer):
    """Muon for matrices and AdamW for everything else, parameter by parameter, without communication.

    The same mathematics as ``DistMuon``, argument by argument; a gradient that is None counts as zero, and a step with
    a non-finite gradient is skipped.

    Args:
        params: as for ``DistMuon``.
        lr: learning rate of the matrices.
        weight_decay: decoupled weight decay.
        momentum: Muon's momentum in [0, 1).
        nesterov: whether Muon looks ahead by one momentum step.
        adamw_lr: learning rate of the AdamW parameters; None takes lr.
        adamw_betas: AdamW's decay rates.
        adamw_eps: AdamW's denominator floor.
        adamw_weight_decay: weight decay of the AdamW parameters; None takes weight_decay.
        max_grad_norm: clip the global norm of the gradients to this; None does not clip.
        max_skipped_steps: raise after so many steps in a row with gradients that are not finite; None never does.
        ns: Newton-Schulz settings; None means ``NewtonSchulz()``.

    Raises:
        ConfigError: a setting is out of range.
        ParameterError: a parameter cannot be optimized as it is.

    Source: K. Jordan et al., "Muon", 2024; Moonlight (arXiv 2502.16982), equation 4.
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
        max_grad_norm: float | None = None,
        ns: NewtonSchulz | None = None,
        *,
        max_skipped_steps: int | None = 5,
    ) -> None:
        table = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_skipped_steps": max_skipped_steps,
            "ns": NewtonSchulz() if ns is None else ns,
        }
        self.settings: MuonSettings = parse(MuonSettings, {k: plain(v) for k, v in table.items()}, "Muon")
        self.skipped_steps = 0
        self._bound: list[BoundParam] = []
        self._start(params, lr, adamw_lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters.

        Args:
            param_group: a group as the constructor takes it.

        Raises:
            ConfigError: a setting is out of range; nothing is added then.
            ParameterError: a parameter cannot be optimized as it is; nothing is added then.
        """
        before = len(self.param_groups)
        try:
            self._enlist(param_group)
            trained, _ = bind(self.param_groups[before:], before, self._bound)
            for device in {param.tensor.device for param in trained}:
                find_products(device, self.settings.ns)
        except ValueError:
            del self.param_groups[before:]
            raise
        self._bound += trained
        for param in trained:
            self._state(param.tensor, param.kind)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters.

        Args:
            closure: re-evaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            The closure's result, or None. If a gradient is not finite, parameters and state stay as they are.

        Raises:
            ConfigError: a setting was changed to something out of range.
            NonFiniteGradientError: this was the last of ``max_skipped_steps`` in a row.
            ParameterError: a parameter was cast, moved or reshaped since it was added.
        """
        loss = evaluate(closure)
        for param in self._bound:
            check_form(param)
        settings = [check_group(group) for group in self.param_groups]
        trained = [
            (p, p.new_zeros(p.shape, dtype=torch.float32) if p.grad is None else p.grad.float(), number)
            for number, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        verdict = judge(sum(float(grad.double().square().sum()) for _, grad, _ in trained))
        if not verdict.finite:
            error = self._count_skip(self._non_finite)
            if error is not None:
                raise error
            return loss
        self._skipped_in_a_row = 0
        coefficient = clip_coefficient(verdict.norm, self.settings.max_grad_norm)
        for parameter, grad, number in trained:
            split = row_blocks("", parameter.shape, self.param_groups[number].get("split"))
            self._update(parameter, grad if coefficient == 1.0 else grad * coefficient, settings[number], split)
        return loss

    def _non_finite(self) -> list[str]:
        given = [(param.name, param.tensor.grad) for param in self._bound]
        return [name for name, grad in given if grad is not None and not bool(grad.isfinite().all())]

    def __getstate__(self) -> dict[str, Any]:
        own = ("settings", "skipped_steps", "_skipped_in_a_row", "_bound", "_rates")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _restore(self, state_dict: Any) -> None:
        groups = check_saved(state_dict, self.param_groups)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        members = [(tensor, group["kind"]) for group in self.param_groups for tensor in group["params"]]
        entries = state_dict.get("state")
        if not isinstance(entries, Mapping):
            raise StateError('what is to be loaded has no "state"; pass what state_dict() returned.')
        loaded = []
        for place, (number, (tensor, kind)) in enumerate(zip(numbers, members, strict=True)):
            if number in entries or tensor.requires_grad:
                own = self.state.get(tensor) or _new_state(tensor, kind)
                check_entry(f"parameter {place}", entries.get(number), own)
                loaded.append((self._state(tensor, kind), entries[number]))
        for group, saved in zip(self.param_groups, groups, strict=True):
            restore_group(group, saved)
        for state, saved in loaded:
            for key, value in saved.items():
                state[key] = value if key == "updates" else state[key].copy_(value)

    def _update(self, parameter: Tensor, grad: Tensor, hyper: GroupSettings, split: Sequence[int]) -> None:
        state = self._state(parameter, hyper.kind)
        state["updates"] += 1
        weight = state.get("master", parameter)
        written = weight.to(parameter.dtype) != parameter
        weight.copy_(torch.where(written, parameter.float(), weight))
        if hyper.kind == "muon":
            ns = self.settings.ns
            inputs = momentum_(state["first_moment"], grad, hyper.momentum, hyper.nesterov)
            blocks = list(split or parameter.shape[-2:-1])
            for part, own in zip(torch.split(inputs, blocks, dim=-2), torch.split(weight, blocks, dim=-2), strict=True):
                direction = orthogonalize(part.to(INPUT_DTYPES[ns.dtype]), ns)
                apply_(own, direction, hyper.lr, rms_matched_scale(*part.shape[-2:]), hyper.weight_decay)
        else:
            adamw_(
                weight,
                grad,
                state["first_moment"],
                state["second_moment"],
                step=state["updates"],
                lr=hyper.lr,
                betas=hyper.betas,
                eps=hyper.eps,
                weight_decay=hyper.weight_decay,
            )
        parameter.copy_(weight)

    def _state(self, parameter: Tensor, kind: str) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(_new_state(parameter, kind))
        return state


def _new_state(parameter: Tensor, kind: str) -> dict[str, Any]:
    """State of a parameter before its first step, float32 throughout."""
    state: dict[str, Any] = {"updates": 0, "first_moment": torch.zeros_like(parameter, dtype=torch.float32)}
    if kind == "adamw":
        state["second_moment"] = torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.dtype != torch.float32:
        state["master"] = parameter.detach().float()
    return state
