"""Loss scaling for float16 whose scale stays equal on all ranks."""

from __future__ import annotations

from typing import Any

import torch

from distmuon.dist_muon import DistMuon


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that backs off on every rank when gradients overflowed on one.

    Gradients are still this rank's own when the scaler looks at them, so ranks would otherwise decide differently and
    their loss scales part. Takes the arguments of ``torch.amp.GradScaler``; clip with
    ``optimizer.clip_grad_norm_(max_norm, loss_scale=scaler.get_scale())``, not after ``unscale_``.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        found: dict[str, Any] = super()._check_inf_per_device(optimizer)
        if isinstance(optimizer, DistMuon):
            for found_inf in found.values():
                optimizer.share_overflow(found_inf)
        return found
