"""All-gathers that are left under way after a step, until the forward pass reads what they bring."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from distmuon.bucket import Bucket
from distmuon.clock import PhaseClock
from distmuon.comm import Pending

Gathering = tuple[Bucket, Pending]


class ForwardOverlap:
    """Waits for a parameter's all-gather just before the module that owns it runs.

    Args:
        clock: where the time spent waiting is added, as phase "gather".
    """

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._pending: list[Gathering] = []
        self._handles: list[Any] = []

    @property
    def active(self) -> bool:
        """Whether a model's forward waits for all-gathers, so that a step need not."""
        return bool(self._handles)

    def hook(self, model: nn.Module) -> None:
        """Wait in every module's forward for its own parameters, and before the model's state is read or written.

        Args:
            model: its modules get hooks, which do not keep this object alive.
        """
        self.unhook()
        weak_self = weakref.ref(self)

        def before_forward(module: nn.Module, *_: Any) -> None:
            overlap = weak_self()
            if overlap is not None and overlap._pending:
                overlap.wait_for(module.parameters(recurse=False))

        def before_state(*_: Any, **__: Any) -> None:
            overlap = weak_self()
            if overlap is not None:
                overlap.wait()

        module: Any
        for module in model.modules():
            self._handles.append(module.register_forward_pre_hook(before_forward))
            self._handles.append(module.register_state_dict_pre_hook(before_state))
            self._handles.append(module.register_load_state_dict_pre_hook(before_state))

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
        if not self.active:
            # What nobody waits for later is unpacked meanwhile; buffers of more than one would only take memory.
            self.wait(keep=1)

    def is_pending(self, tensor: Tensor) -> bool:
        """Whether a parameter's new values may not have arrived.

        Args:
            tensor: a parameter.
        """
        return any(_holds(bucket, {id(tensor)}) for bucket, _ in self._pending)

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Finish the all-gathers that bring some parameters.

        Args:
            tensors: the parameters; those that no all-gather brings are passed over.
        """
        wanted = {id(tensor) for tensor in tensors}
        needed = [entry for entry in self._pending if _holds(entry[0], wanted)]
        self._pending = [entry for entry in self._pending if entry not in needed]
        self._finish(needed)

    def wait(self, keep: int = 0) -> None:
        """Finish all-gathers under way, oldest first.

        Args:
            keep: number of the newest that may go on.
        """
        last = max(0, len(self._pending) - keep)
        needed, self._pending = self._pending[:last], self._pending[last:]
        self._finish(needed)

    def _finish(self, gathering: list[Gathering]) -> None:
        for bucket, pending in gathering:
            with self._clock("gather"):
                bucket.unpack(pending.wait())


def _holds(bucket: Bucket, wanted: set[int]) -> bool:
    return not wanted.isdisjoint(bucket.tensor_ids)
