"""All-gathers that are left under way after a step, until the forward pass reads what they bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.bucket import Bucket
from distmuon.clock import PhaseClock
from distmuon.comm import Pending
from distmuon.waves import IN_FLIGHT_BYTES

Gathering = tuple[Bucket, Pending]


class _Hook:
    """A module's hook; a copy of the module, pickled or not, gets one that does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._call is not None:
            self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class ForwardOverlap:
    """Waits for a parameter's all-gather just before the module that owns it runs.

    Args:
        clock: where the time spent waiting is added, as phase "gather".
    """

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._pending: list[Gathering] = []
        # Parameters that no module asked for since their all-gather was launched, whether it has ended or not.
        self._unseen: set[int] = set()
        self._handles: list[Any] = []

    @property
    def active(self) -> bool:
        """Whether a model's forward waits for all-gathers, so that a step need not."""
        return bool(self._handles)

    def hook(self, model: nn.Module) -> None:
        """Wait in every module's forward for its own and its direct children's parameters, without gradients for all.

        Modules such as attention and routers read their children's weights without calling them. Before the model's
        state is read or written, everything is waited for.

        Args:
            model: its modules get hooks, which keep this object alive: a model may outlive its optimizer, and what is
                under way then is its last update.
        """
        self.unhook()
        module: Any
        for module in model.modules():
            # Before hooks that compute one parameter from others, as weight norm's does.
            self._handles.append(module.register_forward_pre_hook(_Hook(self._before_forward), prepend=True))
            self._handles.append(module.register_state_dict_pre_hook(_Hook(self._before_state)))
            self._handles.append(module.register_load_state_dict_pre_hook(_Hook(self._before_state)))

    def unhook(self) -> None:
        """Finish what is under way and remove the hooks."""
        self.wait()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, bucket: Bucket, pending: Pending) -> None:
        """Take over an all-gather under way.

        Args:
            bucket: what is gathered.
            pending: its all-gather.
        """
        self._pending.append((bucket, pending))
        self._unseen |= bucket.tensor_ids
        while not self.active and len(self._pending) > 1 and self._bytes() > IN_FLIGHT_BYTES:
            self._finish([self._pending.pop(0)])

    def is_unseen(self, tensor: Tensor) -> bool:
        """Whether nothing has waited for a parameter's new values.

        Args:
            tensor: a parameter.
        """
        return id(tensor) in self._unseen

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Finish the all-gathers that bring some parameters.

        Args:
            tensors: the parameters; those that no all-gather brings are passed over.
        """
        wanted = {id(tensor) for tensor in tensors}
        needed: list[Gathering] = []
        others: list[Gathering] = []
        for entry in self._pending:
            (others if wanted.isdisjoint(entry[0].tensor_ids) else needed).append(entry)
        self._pending = others
        self._finish(needed)
        self._unseen -= wanted

    def wait(self) -> None:
        """Finish every all-gather under way."""
        needed, self._pending = self._pending, []
        self._finish(needed)
        self._unseen.clear()

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        if self._unseen and torch.is_grad_enabled():
            for owner in (module, *module.children()):
                self.wait_for(owner.parameters(recurse=False))
        elif self._unseen:
            # No backward would find out that a parameter was read too early.
            self.wait()

    def _before_state(self, *_: Any, **__: Any) -> None:
        self.wait()

    def _bytes(self) -> int:
        return sum(bucket.plan.numel * bucket.dtype.itemsize for bucket, _ in self._pending)

    def _finish(self, gathering: list[Gathering]) -> None:
        for bucket, pending in gathering:
            with self._clock("gather"):
                bucket.unpack(pending.wait())
