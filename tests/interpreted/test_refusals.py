"""What the launchers refuse, before they write or launch anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distmuon.kernels import triton_ops
from tests.interpreted.interpreter import launches

X, A = torch.zeros(2, 8, 16).bfloat16(), torch.zeros(2, 8, 8).bfloat16()
THREE, ONE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0])
FLAT = torch.zeros(8)


@pytest.mark.parametrize("launch", [triton_ops.symmetric_product, triton_ops.symmetric_product_norm])
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((X[0], X[0], None, THREE), "a_BMK"),
        ((X.double(), X.double(), None, THREE), "a_BMK"),
        ((X[:, :0], X[:, :0], None, THREE), "a_BMK"),
        ((X, X[:1], None, THREE), "b_BMK"),
        ((X, X[..., :8], None, THREE), "b_BMK"),
        ((X, X.half(), None, THREE), "b_BMK"),
        ((X, X, X, THREE), "c_BMM"),
        ((X, X, A.float(), THREE), "c_BMM"),
        ((X, X, A, ONE), "scalars"),
        ((X, X, A, THREE.double()), "scalars"),
        ((X, X, A, THREE.expand(3, 3)), "scalars"),
        ((X, X, A, THREE.to("meta")), "scalars"),
    ],
)
def test_symmetric_product(launch: Callable[..., Any], arguments: tuple[Any, ...], names: str) -> None:
    with launches() as found, pytest.raises(ValueError, match=f"^{names} "):
        launch(*arguments)
    assert found == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((X[0], A, ONE), "x_BMN"),
        ((X.double(), A, ONE), "x_BMN"),
        ((X, X, ONE), "p_BMM"),
        ((X, A[:1], ONE), "p_BMM"),
        ((X, A.half(), ONE), "p_BMM"),
        ((X, A, THREE), "scalars"),
        ((X, A, torch.ones(2)), "scalars"),
    ],
)
def test_add_product(arguments: tuple[Any, ...], names: str) -> None:
    with launches() as found, pytest.raises(ValueError, match=f"^{names} "):
        triton_ops.add_product(*arguments)
    assert found == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((FLAT.view(2, 4), FLAT.view(2, 4), 0.9, True, torch.bfloat16), "momentum"),
        ((FLAT.half(), FLAT.half(), 0.9, True, torch.bfloat16), "momentum"),
        ((FLAT[::2], FLAT[:4], 0.9, True, torch.bfloat16), "momentum"),
        ((FLAT, FLAT[:4], 0.9, True, torch.bfloat16), "grad"),
        ((FLAT, FLAT.bfloat16(), 0.9, True, torch.bfloat16), "grad"),
        ((FLAT[:4], FLAT[::2], 0.9, True, torch.bfloat16), "grad"),
        ((FLAT, FLAT, 0.9, True, torch.float64), "dtype"),
    ],
)
def test_momentum_cast(arguments: tuple[Any, ...], names: str) -> None:
    with launches() as found, pytest.raises(ValueError, match=f"^{names} "):
        triton_ops.momentum_cast(*arguments)
    assert found == []


@pytest.mark.parametrize("variant", ["tma", ""])
def test_unknown_variants(variant: str) -> None:
    with launches() as found, pytest.raises(ValueError, match=re.escape(repr(variant))):
        triton_ops.symmetric_product(X, X, None, THREE, variant=variant)  # type: ignore[arg-type]
    assert found == []
