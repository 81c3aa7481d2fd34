"""All-gathers that are left under way after a step, until the forward pass reads what they bring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.bucket import Bucket
from distmuon.clock import PhaseClock
from distmuon.errors import SynchronizationError
from distmuon.pending import Pending
from distmuon.waves import IN_FLIGHT_BYTES

Gathering = tuple[Bucket, Pending]


class _Hook:
    """A module's hook; a copy of the module, pickled or not, gets one that does nothing.

    Args:
        call: takes what the hook gets; None does nothing.
        under_way: whether parameters are old still, so that a copy would be; None if they never are.
    """

    def __init__(self, call: Callable[..., None] | None = None, under_way: Callable[[], bool] | None = None) -> None:
        self._call = call
        self._under_way = under_way

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._call is not None:
            self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        if self._under_way is not None and self._under_way():
            raise SynchronizationError(
                "a model cannot be copied or pickled while its parameters are gathered; call "
                "optimizer.finish_gathers() before."
            )
        return _Hook, ()


class ForwardOverlap:
    """Waits for a parameter's all-gather just before the module that owns it runs.

    Args:
        clock: where the time spent waiting is added, as phase "gather".
    """

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        # All-gathers under way by number, in the order of launch.
        self._pending: dict[int, Gathering] = {}
        self._launched = 0
        # Parameters that no module asked for since their all-gathers, whose numbers these are, whether ended or not.
        self._unseen: dict[int, list[int]] = {}
        self._handles: list[Any] = []

    @property
    def active(self) -> bool:
        """Whether a model's forward waits for all-gathers, so that a step need not."""
        return bool(self._handles)

    def hook(self, model: nn.Module) -> None:
        """Wait in every module's forward for its own parameters, and where it may read them for those of others.

        Attention and routers read weights of their children without calling them. So a member of a container, as a
        transformer block is, waits for all that is in it, and a module whose children have none for its children's.
        A forward without gradients, and whoever reads or writes the model's state, waits for everything.

        Args:
            model: its modules get hooks, which keep this object alive: a model may outlive its optimizer, and what is
                under way then is its last update.
        """
        self.unhook()
        members = {
            id(member)
            for container in model.modules()
            if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            for member in container.children()
        }
        module: Any
        for module in model.modules():
            children = list(module.children())
            close = id(module) in members or not any(list(child.children()) for child in children)
            # Before hooks that compute one parameter from others, as weight norm's does.
            forward = self._hook(functools.partial(self._before_forward, close))
            self._handles.append(module.register_forward_pre_hook(forward, prepend=True))
            self._handles.append(module.register_state_dict_pre_hook(self._hook(self._before_state)))
            self._handles.append(module.register_load_state_dict_pre_hook(self._hook(self._before_state)))

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
        self._launched += 1
        self._pending[self._launched] = bucket, pending
        for tensor in bucket.tensor_ids:
            self._unseen.setdefault(tensor, []).append(self._launched)
        while not self.active and len(self._pending) > 1 and self._bytes() > IN_FLIGHT_BYTES:
            self._finish(next(iter(self._pending)))

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
        for tensor in tensors:
            for number in self._unseen.pop(id(tensor), ()):
                self._finish(number)

    def wait(self) -> None:
        """Finish every all-gather under way."""
        for number in list(self._pending):
            self._finish(number)
        self._unseen.clear()

    def _hook(self, call: Callable[..., None]) -> _Hook:
        return _Hook(call, lambda: bool(self._pending))

    def _before_forward(self, recurse: bool, module: nn.Module, *_: Any) -> None:
        if self._unseen and torch.is_grad_enabled():
            self.wait_for(module.parameters(recurse=recurse))
        elif self._unseen:
            # No backward would find out that a parameter was read too early.
            self.wait()

    def _before_state(self, *_: Any, **__: Any) -> None:
        self.wait()

    def _bytes(self) -> int:
        return sum(bucket.plan.numel * bucket.dtype.itemsize for bucket, _ in self._pending.values())

    def _finish(self, number: int) -> None:
        if number in self._pending:
            bucket, pending = self._pending.pop(number)
            with self._clock("gather"):
                full = pending.wait()
                bucket.unpack(full)
                bucket.give_back(full)
