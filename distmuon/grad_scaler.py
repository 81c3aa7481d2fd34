"""Loss scaling for float16 whose scale stays equal on all ranks."""

from __future__ import annotations

from typing import Any

import torch

from distmuon.dist_muon import DistMuon


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that backs off on every rank when gradients overflowed on one.

    torch's looks at each rank's own gradients, so that ranks decide differently and their loss scales part; this one
    looks at the reduced gradients. Takes the arguments of ``torch.amp.GradScaler``; clip with
    ``optimizer.clip_grad_norm_(max_norm, loss_scale=scaler.get_scale())``, not after ``unscale_``.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not isinstance(optimizer, DistMuon):
            return super()._check_inf_per_device(optimizer)
        finite = optimizer.finite_gradients(self.get_scale())
        device = optimizer.param_groups[0]["params"][0].device
        found: dict[Any, Any] = {device: torch.full((), 0.0 if finite else 1.0, device=device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found
