"""Parameters of param groups: checked, named and listed in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distmuon.bucket import BoundParam, form
from distmuon.errors import ParameterError
from distmuon.splits import row_blocks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_members(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Refuse by name what torch would refuse without one.

    Args:
        group: a group that is about to be added.
        others: the optimizer's param groups.

    Raises:
        ParameterError: names a parameter that is no leaf or was given before, or some have no name.
    """
    named = {"param_names" in other for other in others}
    named |= {"param_names" in group or isinstance(member, tuple) for member in group["params"]}
    if len(named) > 1:
        raise ParameterError(
            "params has some parameters with names and some without; pass pairs of name and parameter everywhere, as "
            "model.named_parameters() has them."
        )
    seen = {id(tensor) for other in others for tensor in other["params"]}
    for index, member in enumerate(group["params"]):
        name, tensor = member if isinstance(member, tuple) else (f"group{len(others)}.param{index}", member)
        if not tensor.is_leaf:
            raise ParameterError(f'parameter "{name}" is not a leaf of the autograd graph; pass nn.Parameters.')
        if id(tensor) in seen:
            raise ParameterError(f'parameter "{name}" is a duplicate of one given before; pass every parameter once.')
        seen.add(id(tensor))


def bind(
    groups: list[dict[str, Any]], first: int, others: Sequence[BoundParam] = ()
) -> tuple[list[BoundParam], list[BoundParam]]:
    """Check the parameters of groups and list them in the order of the forward pass.

    Args:
        groups: complete param groups.
        first: index of groups[0] among the optimizer's groups.
        others: parameters that the optimizer has already.

    Returns:
        Parameters to optimize, sorted by the groups' "positions" where given, and frozen parameters.

    Raises:
        ParameterError: names a parameter that cannot be optimized as it is.
    """
    found: list[tuple[int, BoundParam]] = []
    for number, group in enumerate(groups, start=first):
        tensors = group["params"]
        names = group.get("param_names") or [f"group{number}.param{i}" for i in range(len(tensors))]
        positions = group.get("positions") or [0] * len(tensors)
        for name, tensor, position in zip(names, tensors, positions, strict=True):
            split = row_blocks(name, tensor.shape, group.get("split"))
            if split and group["kind"] != "muon":
                raise ParameterError(f'parameter "{name}" has kind "adamw" and cannot be split; leave "split" out.')
            found.append((position, BoundParam(name, tensor, group["kind"], number, form(tensor), split)))
    found.sort(key=lambda item: item[0])
    params = [param for _, param in found]
    trained = [param for param in params if param.tensor.requires_grad]
    for param in trained:
        _check(param)
    _check_storage([*others, *trained])
    return trained, [param for param in params if not param.tensor.requires_grad]


def check_unchanged(trained: list[BoundParam], frozen: list[BoundParam]) -> None:
    """Make sure that parameters are still what they were when the optimizer was built.

    Args:
        trained: parameters that required a gradient.
        frozen: parameters that did not.

    Raises:
        ParameterError: names one that changed.
    """
    for param in trained:
        if not param.tensor.requires_grad:
            raise ParameterError(
                f'parameter "{param.name}" was frozen after the optimizer was built; freeze it before.'
            )
        check_form(param)
    for param in frozen:
        if param.tensor.requires_grad:
            raise ParameterError(
                f'parameter "{param.name}" was frozen when the optimizer was built and is not any more; '
                "build the optimizer after unfreezing it."
            )


def check_form(param: BoundParam) -> None:
    """Make sure that a parameter has the dtype, shape and device that its state was made for.

    Args:
        param: the parameter.

    Raises:
        ParameterError: it was cast, moved or reshaped.
    """
    if form(param.tensor) != param.form:
        raise ParameterError(
            f'parameter "{param.name}" was {param.form} when the optimizer was built and is {form(param.tensor)}; '
            "cast, move or reshape the model before."
        )


def _check(param: BoundParam) -> None:
    tensor = param.tensor
    problem = None
    if tensor.dtype not in _DTYPES:
        problem = f"has dtype {tensor.dtype}; float32, bfloat16 and float16 are supported"
    elif tensor.layout != torch.strided:
        problem = f"has layout {tensor.layout}; make it dense"
    elif not tensor.is_contiguous():
        problem = f"is not contiguous (strides {tuple(tensor.stride())}); call .contiguous() on it first"
    elif param.kind == "muon" and tensor.ndim not in (2, 3):
        problem = f'has {tensor.ndim} dimensions and kind "muon", which takes [A, B] or [E, A, B]; give it kind "adamw"'
    if problem:
        raise ParameterError(f'parameter "{param.name}" {problem}.')


def _check_storage(params: list[BoundParam]) -> None:
    """Refuse parameters whose memory overlaps: updating one would change the other behind its back."""
    extents = sorted(
        (p.tensor.data_ptr(), p.tensor.data_ptr() + p.tensor.numel() * p.tensor.element_size(), p.name)
        for p in params
        if p.tensor.numel()
    )
    for (_, end, name), (start, _, other) in zip(extents, extents[1:], strict=False):
        if start < end:
            raise ParameterError(
                f'parameters "{name}" and "{other}" share storage; tie weights by using one Parameter in both places.'
            )
