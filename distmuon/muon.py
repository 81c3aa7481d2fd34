"""Muon on one device: the plain twin of DistMuon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.clipping import clip_coefficient, judge
from distmuon.config import GroupSettings, MuonSettings, parse
from distmuon.groups import Params, bind, check_group, complete_group, to_groups
from distmuon.newton_schulz import INPUT_DTYPES, find_products, orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.scaling import rms_matched_scale
from distmuon.splits import row_blocks
from distmuon.update import adamw_, apply_, momentum_


class Muon(torch.optim.Optimizer):
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
        ns: Newton-Schulz settings; None means ``NewtonSchulz()``.

    Raises:
        ConfigError: a setting is out of range.
        ParameterError: a parameter cannot be optimized as it is.

    Source: K. Jordan et al., "Muon", 2024; Moonlight (arXiv 2502.16982), equation 4.
    """

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
        max_grad_norm: float | None = None,
        ns: NewtonSchulz | None = None,
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
            "ns": ns or NewtonSchulz(),
        }
        self.settings = parse(MuonSettings, table, "Muon")
        self.skipped_steps = 0
        super().__init__(to_groups(params), {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters.

        Args:
            param_group: a group as the constructor takes it.
        """
        for group in to_groups([param_group]):
            complete_group(group, self.settings)
            super().add_param_group(group)
            try:
                bind(self.param_groups, 0)
                for device in {parameter.device for parameter in self.param_groups[-1]["params"]}:
                    find_products(device, self.settings.ns)
            except ValueError:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters.

        Args:
            closure: re-evaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = [check_group(group) for group in self.param_groups]
        grads = [
            [p.new_zeros(p.shape, dtype=torch.float32) if p.grad is None else p.grad.float() for p in group["params"]]
            for group in self.param_groups
        ]
        verdict = judge(sum(float(grad.double().square().sum()) for group in grads for grad in group))
        if not verdict.finite:
            self.skipped_steps += 1
            return loss
        coefficient = clip_coefficient(verdict.norm, self.settings.max_grad_norm)
        for group, of_group, hyper in zip(self.param_groups, grads, settings, strict=True):
            for parameter, grad in zip(group["params"], of_group, strict=True):
                if parameter.requires_grad:
                    split = row_blocks("", parameter.shape, group.get("split"))
                    self._update(parameter, grad if coefficient == 1.0 else grad * coefficient, hyper, split)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict.

        Args:
            state_dict: what ``state_dict`` returned.
        """
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; ours is float32 throughout.
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(ids, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)

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
            state["updates"] = 0
            state["first_moment"] = torch.zeros_like(parameter, dtype=torch.float32)
            if kind == "adamw":
                state["second_moment"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
        return state
