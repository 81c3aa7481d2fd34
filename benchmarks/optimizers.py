"""Optimizers on one device: what rivals are made of, and what every contender's result is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmuon.benchmarks.owner_gather import OwnerGather
from distmuon.muon import Muon
from distmuon.ns_settings import NewtonSchulz
from distmuon.routing import param_groups, routes

Optimizers = Sequence[torch.optim.Optimizer]

# The same for all contenders.
LR = 1e-3
WEIGHT_DECAY = 0.1
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
EPS = 1e-8


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Sort a model's parameters as DistMuon routes them.

    Args:
        model: the model.

    Returns:
        Those for Muon, and those for AdamW.
    """
    parameters = dict(model.named_parameters())
    table = routes(model)
    muon: list[Tensor] = [parameters[route.name] for route in table if route.kind == "muon"]
    return muon, [parameters[route.name] for route in table if route.kind == "adamw"]


def muon_matrices(model: nn.Module) -> list[Tensor]:
    """List the matrices that Muon orthogonalizes.

    Args:
        model: the model; its Muon parameters are matrices.

    Returns:
        The parameters.
    """
    return split(model)[0]


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Make torch's AdamW.

    Args:
        parameters: what it updates.

    Returns:
        The optimizer.
    """
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)


def torch_adamw(model: nn.Module) -> Optimizers:
    """AdamW for every parameter.

    Args:
        model: the model.

    Returns:
        One optimizer.
    """
    return [adamw(list(model.parameters()))]


def torch_muon(model: nn.Module) -> Optimizers:
    """torch.optim.Muon for the matrices and AdamW for the rest.

    Args:
        model: the model.

    Returns:
        Two optimizers.
    """
    matrices, rest = split(model)
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)
    return [muon, adamw(rest)]


def owner_gather(model: nn.Module, *, alone: bool = False) -> Optimizers:
    """The owner all-gather for the matrices and AdamW, replicated, for the rest.

    Args:
        model: the model.
        alone: whether this rank owns all matrices.

    Returns:
        Two optimizers.
    """
    matrices, rest = split(model)
    return [OwnerGather(matrices, LR, WEIGHT_DECAY, MOMENTUM, alone=alone), adamw(rest)]


def plain_twin(model: nn.Module, ns: NewtonSchulz | None = None, *, all_adamw: bool = False) -> Optimizers:
    """distmuon.Muon, which DistMuon must agree with.

    Args:
        model: the model.
        ns: Newton-Schulz settings; None takes the default.
        all_adamw: whether matrices take AdamW, too.

    Returns:
        One optimizer.
    """
    groups = [{"params": list(model.named_parameters()), "kind": "adamw"}] if all_adamw else param_groups(model)
    return [
        Muon(
            groups,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            adamw_betas=BETAS,
            adamw_eps=EPS,
            ns=ns,
        )
    ]
