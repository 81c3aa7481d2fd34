"""Contenders in a training loop of their own: without communication, and under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon.benchmarks.models import objective
from distmuon.benchmarks.optimizers import Optimizers


class Contender(Protocol):
    """A model and what trains it, on this rank of all."""

    def forward_backward(self, tokens: Tensor) -> None:
        """Compute the gradients of a micro-batch, with whatever communication hooks start."""
        ...

    def step(self) -> None:
        """Update the parameters and drop the gradients."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Copy the whole parameters, by name; every rank must call it."""
        ...

    def state(self) -> list[Tensor]:
        """List this rank's optimizer state: moments, master copies, what is staged for them."""
        ...

    @property
    def dist_muon(self) -> Any:
        """The DistMuon object; None where another optimizer trains."""
        ...


class Hookless:
    """Forward and backward alone, on one rank: what a step costs without an optimizer.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        prepare_experts(model)

    def forward_backward(self, tokens: Tensor) -> None:
        """Compute the gradients of a micro-batch."""
        objective(self.model, tokens).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def parameters(self) -> dict[str, Tensor]:
        """Copy the parameters, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def state(self) -> list[Tensor]:
        """There is none."""
        return []

    @property
    def dist_muon(self) -> Any:
        """None."""
        return None


class Replicated(Hookless):
    """Gradients all-reduced by DistributedDataParallel, and optimizers that see all of them.

    Args:
        model: the model.
        optimizers: makes the optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Callable[[nn.Module], Optimizers]) -> None:
        super().__init__(model)
        self.wrapped = DistributedDataParallel(model)
        self.optimizers = optimizers(model)

    def forward_backward(self, tokens: Tensor) -> None:
        """Compute the gradients of a micro-batch; DistributedDataParallel averages them meanwhile."""
        objective(self.wrapped, tokens).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Update the parameters and drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        super().step()

    def state(self) -> list[Tensor]:
        """List the optimizers' state."""
        return tensors_only([dict(optimizer.state) for optimizer in self.optimizers])


def prepare_experts(model: nn.Module) -> None:
    """Give DeepSpeed's expert layers their groups, which its engine does elsewhere.

    Args:
        model: the model; changed in place.
    """
    for module in model.modules():
        prepare = getattr(module, "set_deepspeed_parallelism", None)
        if prepare is not None and dist.is_initialized():
            prepare()


def tensors_only(value: Any) -> list[Tensor]:
    """List the tensors in nested containers, each storage once.

    Args:
        value: tensors in mappings, lists and tuples; anything else is passed over.

    Returns:
        The tensors, in the order met.
    """
    found: dict[int, Tensor] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found.setdefault(item.untyped_storage().data_ptr(), item)
        elif isinstance(item, dict):
            for inner in item.values():
                visit(inner)
        elif isinstance(item, list | tuple):
            for inner in item:
                visit(inner)

    visit(value)
    return list(found.values())
