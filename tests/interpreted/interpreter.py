"""Triton's interpreter, repaired for bfloat16, observed, and run in other orders.

The interpreter keeps bfloat16 as uint16 bit patterns and computes with them as if they were integers: products are
garbage, and casts truncate. Here bfloat16 gets the arithmetic of a GPU: compute in float32, round once to nearest even.
Float32 products with tensor-float-32 operands, which the interpreter computes exactly, are rounded as a GPU does.
What stays invisible: fused multiply-add, races inside one program, and everything that depends on the compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle


def is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def widened(handle: Any) -> Any:
    """The same values as float32 where they are bfloat16."""
    if not is_bfloat16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(data: np.ndarray) -> Any:
    """Float32 values as bfloat16: nearest, ties to even; a NaN becomes the quiet one."""
    bits = np.ascontiguousarray(data, dtype=np.float32).reshape(data.shape).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(data), np.uint16(0x7FC0), nearest), tl.bfloat16)


def tensor_float_32(handle: Any) -> Any:
    """Operands of a tensor core: 10 bits of the fraction, nearest, ties away from zero."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    return Handle(((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32), tl.float32)


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        a, b = widened(a), widened(b)
        if a.data.dtype == np.float32 and precision == stock._ir.INPUT_PRECISION.TF32 and d.data.dtype == np.float32:
            a, b = tensor_float_32(a), tensor_float_32(b)
        return original(self, a, b, d, precision, imprecise)

    return create_dot


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bfloat16(source):
            if target.scalar != tl.float32:
                raise NotImplementedError("cast bfloat16 to float32 first")
            return widened(source)
        if target.scalar == tl.bfloat16:
            return rounded(source.data.astype(np.float32))
        return original(self, source, target)

    return cast_impl


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, function: Callable[..., Any]) -> Any:
        if not (is_bfloat16(left) or is_bfloat16(right)):
            return original(self, left, right, function)
        out = function(widened(left).data, widened(right).data)
        return rounded(out) if out.dtype == np.float32 else Handle(out, left.dtype.scalar)

    return binary_op


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Operations that nothing here repairs must not compute on bit patterns."""

    def checked(self: Any, *operands: Any) -> Any:
        flat = operands[0] if isinstance(operands[0], tuple) else operands
        if any(is_bfloat16(getattr(operand, "handle", operand)) for operand in flat if hasattr(operand, "dtype")):
            raise NotImplementedError("the interpreter computes on the bits of bfloat16 here: cast to float32 first")
        return original(self, *operands)

    return checked


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Give bfloat16 its arithmetic, and float32 products their input precision, inside the context."""
    changes = {"create_dot": _dot, "cast_impl": _cast, "binary_op": _binary, "create_fma": _refuse, "unary_op": _refuse}
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(Builder, name, change(getattr(Builder, name))))
        # Missing from some versions of the interpreter.
        get_bf16 = lambda self, value: rounded(np.array([value], dtype=np.float32))  # noqa: E731
        stack.enter_context(mock.patch.object(Builder, "get_bf16", get_bf16, create=True))
        reduce = stock.ReduceScanOpInterface.apply
        stack.enter_context(mock.patch.object(stock.ReduceScanOpInterface, "apply", _refuse(reduce)))
        yield


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order: programs that depend on each other then give other bits."""
    original = Builder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        shape = tuple(self.grid_dim)
        order = np.random.default_rng(seed).permutation(int(np.prod(shape)))
        index = np.unravel_index(order[np.ravel_multi_index((x, y, z), shape)], shape)
        original(self, *(int(i) for i in index))

    with mock.patch.object(Builder, "set_grid_idx", set_grid_idx):
        yield


@dataclass(frozen=True)
class Launch:
    """One launched kernel: its name, its grid, and its arguments."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collect every launch inside the context."""
    found: list[Launch] = []
    run, set_grid_dim = stock.GridExecutor.__call__, Builder.set_grid_dim
    current: list[tuple[str, dict[str, Any]]] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        current.append((self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        run(self, *args, **kwargs)

    def dimensions(self: Any, *grid: int) -> None:
        found.append(Launch(current[-1][0], grid, current[-1][1]))
        set_grid_dim(self, *grid)

    with (
        mock.patch.object(stock.GridExecutor, "__call__", call),
        mock.patch.object(Builder, "set_grid_dim", dimensions),
    ):
        yield found
