"""What Muon and DistMuon share as optimizers of torch: checked param groups, closures, hooks around loading."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from distmuon.binding import check_members
from distmuon.config import MuonSettings
from distmuon.errors import NonFiniteGradientError
from distmuon.groups import Params, complete_group, to_groups

log = logging.getLogger(__name__)

# A model has thousands of parameters, and one bad activation reaches most of them.
_MOST_NAMES = 5


class CheckedOptimizer(torch.optim.Optimizer):
    """Base of ``Muon`` and ``DistMuon``; a subclass sets what is declared here.

    Attributes:
        settings: what the optimizer was constructed with.
        skipped_steps: steps so far that a gradient that is not finite had skipped.
        _skipped_in_a_row: the last of them that had no finite one between.
    """

    settings: MuonSettings
    skipped_steps: int
    _skipped_in_a_row = 0
    _rates: dict[str, Tensor]

    def _start(self, params: Params, lr: Any, adamw_lr: Any) -> None:
        """Run torch's constructor, which adds the groups one by one.

        Args:
            params: what the user passed.
            lr: learning rate of the matrices, as the user passed it.
            adamw_lr: learning rate of the AdamW parameters, likewise.
        """
        rates = {"muon": lr, "adamw": lr if adamw_lr is None else adamw_lr}
        self._rates = {kind: rate for kind, rate in rates.items() if isinstance(rate, Tensor)}
        # Schedulers that cycle momentum ask the defaults for it, and would cycle betas if these were there.
        super().__init__(to_groups(params), {"lr": lr, "momentum": self.settings.momentum})

    def _enlist(self, param_group: dict[str, Any], experts: Set[str] = frozenset()) -> None:
        """Check a group and add it to ``param_groups``, split by shape if it has no kind."""
        for group in to_groups([param_group]):
            check_members(group, self.param_groups)
            complete_group(group, self.settings, experts, self._rates)
            super().add_param_group(group)

    def _count_skip(self, find_names: Callable[[], Sequence[str]]) -> NonFiniteGradientError | None:
        """Count a step that is left out; the error to raise if it was one too many.

        Args:
            find_names: parameters whose gradients are not finite; called for that error only.
        """
        self.skipped_steps += 1
        scale = getattr(self, "grad_scale", None)
        if getattr(self, "found_inf", None) is not None and (scale is None or float(scale) > 1.0):
            # What overflows under a GradScaler makes it lower the scale; below 1 that is no cure any more.
            log.warning("gradients are not finite: this step is skipped (%d so far)", self.skipped_steps)
            return None
        self._skipped_in_a_row += 1
        log.warning(
            "gradients are not finite: this step is skipped (%d in a row, %d so far)",
            self._skipped_in_a_row,
            self.skipped_steps,
        )
        limit = self.settings.max_skipped_steps
        if limit is None or self._skipped_in_a_row < limit:
            return None
        names = find_names()
        shown = ", ".join(f'"{name}"' for name in names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return NonFiniteGradientError(
            f"gradients were not finite in {self._skipped_in_a_row} steps in a row, now those of {shown}{more}; no "
            "step changed anything: find the cause with torch.autograd.set_detect_anomaly(True), go back to a "
            "checkpoint and lower the learning rate, or raise max_skipped_steps."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Args:
            state_dict: of an equal optimizer, and if it is sharded of the same rank; it is copied.

        Raises:
            StateError: it belongs to other parameters, ranks or settings; nothing is changed then.
            ConfigError: a setting in it is out of range; nothing is changed then.
            RankMismatchError: that is so on some ranks only; raised on every rank.
        """
        state_dict = copy.copy(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        with torch.no_grad():
            self._restore(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _restore(self, state_dict: Any) -> None:
        """Check a state dict and copy it; nothing is changed if it does not fit."""
        raise NotImplementedError


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call the closure of a step with gradients enabled.

    Args:
        closure: re-evaluates the model and returns the loss.

    Returns:
        The loss; None without a closure.
    """
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
