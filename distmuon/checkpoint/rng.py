"""Random number generators of a rank as tensors, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmuon.errors import StateError


def capture() -> dict[str, Tensor]:
    """Copy the state of torch's, CUDA's, Python's and NumPy's default generators.

    Returns:
        1-D integer tensors by kind.
    """
    _, numbers, gauss = random.getstate()
    # A user's global generator, not one of ours.
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, keys, position, has_gauss, cached = legacy
    state = {
        "torch": torch.get_rng_state(),
        "python": _with_gauss(numbers, gauss),
        "numpy": _with_gauss([*keys.tolist(), position], float(cached) if has_gauss else None),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def check(state: Mapping[str, Tensor]) -> None:
    """Make sure that the generators take a state, and leave them as they are.

    Args:
        state: what ``capture`` returned.

    Raises:
        StateError: one does not.
    """
    before = capture()
    try:
        restore(state)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise StateError(f"the random state of the checkpoint is not legal: {error}.") from None
    finally:
        restore(before)


def restore(state: Mapping[str, Tensor]) -> None:
    """Set the generators.

    Args:
        state: what ``capture`` returned.
    """
    numbers, gauss = _split_gauss(state["python"])
    random.setstate((3, tuple(numbers), gauss))
    (*keys, position), cached = _split_gauss(state["numpy"])
    legacy = ("MT19937", np.asarray(keys, dtype=np.uint32), position, int(cached is not None), cached or 0.0)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _with_gauss(numbers: Sequence[int], gauss: float | None) -> Tensor:
    """Integers, then whether a second Gaussian waits for the next call, then its bits."""
    bits = torch.tensor([0.0 if gauss is None else gauss], dtype=torch.float64).view(torch.int64)
    return torch.cat([torch.tensor([*numbers, int(gauss is not None)], dtype=torch.int64), bits])


def _split_gauss(values: Tensor) -> tuple[list[int], float | None]:
    *numbers, has_gauss = values[:-1].tolist()
    gauss = float(values[-1:].view(torch.float64)[0])
    return numbers, gauss if has_gauss else None
