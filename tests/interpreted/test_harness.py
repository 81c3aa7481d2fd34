"""The instruments work: the repair is exact, and each of them notices what it is there for."""

from __future__ import annotations

import faulthandler
import signal

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as stock

from tests.interpreted.guard import GuardedOutputs, exit_code, guarded
from tests.interpreted.interpreter import launches, repaired, shuffled

SPECIAL = [0.0, -0.0, 1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-9, 3.4e38, 3.5e38, 1e-39, 1e-45]
SPECIAL += [float("inf"), -float("inf"), float("nan")]


@triton.jit
def product(a, b, y, n: tl.constexpr, precision: tl.constexpr):
    rows = tl.arange(0, n)
    at = rows[:, None] * n + rows[None, :]
    tl.store(y + at, tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)), input_precision=precision))


@triton.jit
def cast(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def arithmetic(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)
    left, right = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.abs(left + right * left - right))


@triton.jit
def total(x, y, n: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, n)), axis=0))


@triton.jit
def reverse_in_place(x, block: tl.constexpr):
    """Each program reads what another one may have written already."""
    here, there = tl.program_id(0), tl.num_programs(0) - 1 - tl.program_id(0)
    at = tl.arange(0, block)
    tl.store(x + here * block + at, tl.load(x + there * block + at))


@triton.jit
def shift(x, y, by: tl.constexpr, n: tl.constexpr):
    tl.store(y + tl.arange(0, n), tl.load(x + by + tl.arange(0, n)))


@triton.jit
def shift_store(x, y, by: tl.constexpr, n: tl.constexpr):
    tl.store(y + by + tl.arange(0, n), tl.load(x + tl.arange(0, n)))


def integers(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-8, 9, (n, n)).bfloat16(), torch.randint(-8, 9, (n, n)).bfloat16()


def test_products_of_bfloat16_integers_are_exact() -> None:
    a, b = integers(32)
    y = torch.empty(32, 32)
    product[(1,)](a, b, y, 32, "ieee")
    assert torch.equal(y, a.float() @ b.float().mT)


def test_the_stock_interpreter_is_wrong_about_bfloat16() -> None:
    """Why there is a repair. When this fails, a new Triton computes with bfloat16, and the repair may be obsolete."""
    a, b = integers(32)
    y = torch.empty(32, 32)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_dot", "cast_impl"):
            patch.setattr(stock.InterpreterBuilder, name, ORIGINALS[name])
        product[(1,)](a, b, y, 32, "ieee")
        assert not torch.equal(y, a.float() @ b.float().mT)
        x, out = torch.tensor([1.0 + 3 * 2**-8] * 2), torch.empty(2, dtype=torch.bfloat16)
        cast[(1,)](x, out, 2)
        assert not torch.equal(out, x.bfloat16())


# Taken at import, before the fixture repairs anything.
ORIGINALS = {name: getattr(stock.InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "binary_op")}


def test_the_repair_is_taken_back() -> None:
    before = {name: getattr(stock.InterpreterBuilder, name) for name in ORIGINALS}
    with repaired():
        assert all(getattr(stock.InterpreterBuilder, name) is not before[name] for name in ORIGINALS)
    assert {name: getattr(stock.InterpreterBuilder, name) for name in ORIGINALS} == before


def test_float32_products_have_their_input_precision() -> None:
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    exact = a.double() @ b.double().mT
    errors = {}
    for precision in ("ieee", "tf32"):
        y = torch.empty(32, 32)
        product[(1,)](a, b, y, 32, precision)
        errors[precision] = float((y - exact).abs().max() / exact.abs().max())
    assert errors["ieee"] < 1e-6
    assert 1e-5 < errors["tf32"] < 1e-3


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_casts_are_those_of_torch(source: torch.dtype, target: torch.dtype) -> None:
    n = 4096
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(n - len(SPECIAL)) * torch.logspace(-45, 38, n)[len(SPECIAL) :]])
    x = x.to(source)
    y = torch.empty(n, dtype=target)
    cast[(1,)](x, y, n)
    same = (y == x.to(target)) & (torch.signbit(y) == torch.signbit(x)) | (y.isnan() & x.isnan())
    assert bool(same.all())


def test_bfloat16_arithmetic_rounds_each_operation_once() -> None:
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    out = torch.empty(256, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, 256)
    assert torch.equal(out, (x + y * x - y).abs())


def test_what_the_repair_does_not_cover_is_refused() -> None:
    with pytest.raises(Exception, match="cast to float32 first"):
        total[(1,)](torch.ones(4).bfloat16(), torch.zeros(1).bfloat16(), 4)
    y = torch.zeros(1)
    total[(1,)](torch.ones(4), y, 4)
    assert y.item() == 4


def test_shuffling_finds_programs_that_depend_on_each_other() -> None:
    results = []
    for seed in range(3):
        x = torch.arange(64.0)
        with shuffled(seed):
            reverse_in_place[(16,)](x, 4)
        results.append(x)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_shuffling_runs_every_program_once() -> None:
    x, y = torch.arange(64.0), torch.empty(64)
    with shuffled(1):
        copy_tiles[(2, 2, 4)](x, y, 4)
    assert torch.equal(x, y)


@triton.jit
def copy_tiles(x, y, block: tl.constexpr):
    tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    at = tile * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at))


def test_launches_are_counted() -> None:
    with launches() as found:
        copy_tiles[(2, 2, 4)](torch.zeros(64), torch.zeros(64), 4)
        cast[(1,)](torch.zeros(2), torch.zeros(2), n=2)
    assert [(launch.name, launch.grid, launch.programs) for launch in found] == [
        ("copy_tiles", (2, 2, 4), 16),
        ("cast", (1, 1, 1), 1),
    ]
    assert [launch.arguments.get("block") for launch in found] == [4, None]


def test_memory_is_poisoned() -> None:
    for made in (torch.empty(3), torch.empty_like(torch.zeros(3)), torch.zeros(1).new_empty(3)):
        assert bool(made.isnan().all())


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("by", [-1, 0, 1])
def test_a_read_out_of_bounds_ends_the_child(side: str, by: int, capfd: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        faulthandler.disable()
        x = guarded(torch.arange(64, dtype=torch.int16), side)
        shift[(1,)](x, torch.empty(64, dtype=torch.int16), by, 64)

    beyond = by == (-1 if side == "before" else 1)
    assert exit_code(read) == (-signal.SIGSEGV if beyond else 0)


@pytest.mark.parametrize("side", ["before", "after"])
def test_outputs_are_guarded_too(side: str, capfd: pytest.CaptureFixture[str]) -> None:
    def write(by: int) -> None:
        faulthandler.disable()
        with GuardedOutputs(side) as outputs:
            y = torch.zeros(64).new_empty(64)
            assert bool(y.isnan().all())
            assert outputs.made == 2
            shift_store[(1,)](torch.ones(64), y, by, 64)

    assert exit_code(write, 0) == 0
    assert exit_code(write, -1 if side == "before" else 1) == -signal.SIGSEGV


def test_a_failing_child_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise AssertionError("seen")

    assert exit_code(fail) == 1
    assert "seen" in capfd.readouterr().err
