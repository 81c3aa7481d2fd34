"""What tensors are called in a checkpoint: names of the model, the same whatever rank holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from distmuon.checkpoint.manifest import AnyDType
from distmuon.config import plain
from distmuon.errors import CheckpointError, StateError

Rename = Mapping[str, str] | Callable[[str], str] | None


class ModelTensors(NamedTuple):
    """Every tensor that a checkpoint of a model has, by its name there; tied ones under their first name."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def model_tensors(model: nn.Module, rename: Rename) -> ModelTensors:
    """Name the tensors of a model.

    Args:
        model: its parameters and persistent buffers are taken.
        rename: from names in this rank's model to names that are the same tensor's on all ranks, where expert
            parallelism makes them differ; names that it lacks stay.

    Returns:
        The tensors.

    Raises:
        CheckpointError: the model has state that is not a tensor, or two tensors get the same name.
    """
    parameters = _renamed(dict(model.named_parameters()), rename)
    known = {id(parameter) for parameter in model.parameters()}
    buffers: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f'the model\'s state "{name}" is a {type(value).__name__}; only tensors can be saved, '
                'so put it into "extra" as plain values.'
            )
        if plain(value.dtype) not in get_args(AnyDType):
            raise CheckpointError(f'the model\'s tensor "{name}" is {value.dtype}, which checkpoints do not have.')
        if id(value) not in known:
            known.add(id(value))
            buffers[name] = value
    return ModelTensors(parameters, _renamed(buffers, rename))


def names_by_id(tensors: ModelTensors, groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Name of each of the model's parameters.

    Args:
        tensors: the model's.
        groups: the optimizer's param groups.

    Returns:
        Names by ``id``.

    Raises:
        StateError: the optimizer has parameters that are not the model's.
    """
    names = {id(parameter): name for name, parameter in tensors.parameters.items()}
    for number, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise StateError(
                    f"parameter {position} of param group {number}, of shape {tuple(parameter.shape)}, is not the "
                    "model's; give the model that the optimizer was built for."
                )
    return names


def _renamed(tensors: dict[str, Tensor], rename: Rename) -> dict[str, Tensor]:
    if rename is None:
        return tensors
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
        if new in found:
            raise CheckpointError(f'rename gives two tensors the name "{new}"; names must stay different.')
        found[new] = tensor
    return found
