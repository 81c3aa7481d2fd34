"""The switch to oneDNN's float32 products: probed, restored, and safe between threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distmuon import newton_schulz
from distmuon.kernels import cpu_float32
from distmuon.kernels.cpu_float32 import EXACT, fast_float32, is_exact
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz
from tests import oracle

MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
FLOAT32 = NewtonSchulz(dtype="float32")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = MATMUL.fp32_precision
    is_exact.cache_clear()
    yield
    assert MATMUL.fp32_precision == before
    is_exact.cache_clear()


@pytest.fixture
def _accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose oneDNN computes float32 products in float32 whatever the switch says."""
    monkeypatch.setattr(cpu_float32, "is_exact", lambda: True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of_the_switch() -> float:
    a, b = random(128, 192), random(192, 160, seed=1)
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "bf16"
    try:
        return oracle.relative(a @ b, a.double() @ b.double())
    finally:
        MATMUL.fp32_precision = before


def test_the_probe_agrees_with_this_cpu() -> None:
    """CPUs with bfloat16 units use them, with errors of 2e-3; others compute in float32."""
    error = error_of_the_switch()
    assert error < 1e-6 or error > 1e-4
    assert is_exact() == (error < 1e-6)


@pytest.mark.parametrize(("error", "accepted"), [(1e-7, True), (4e-7, True), (2e-6, False), (2e-3, False)])
def test_the_probe_accepts_float32_only(monkeypatch: pytest.MonkeyPatch, error: float, accepted: bool) -> None:
    seen: list[tuple[str, bool]] = []

    def multiply(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        exact = torch.mm(first, second)
        if first.dtype == torch.float32:
            seen.append((MATMUL.fp32_precision, torch.is_autocast_enabled("cpu")))
            exact = torch.mm(first.double(), second.double()) * (1 + error)
        return exact

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_exact() == accepted
    assert seen == [("bf16", False)]
    assert EXACT == 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_product_is_rejected(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    multiply = torch.Tensor.__matmul__

    def broken(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        found = multiply(first, second)
        if first.dtype == torch.float32:
            found[3, 5] = value
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert not is_exact()


def test_the_probe_runs_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    first = is_exact()
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    assert is_exact() == first


def test_the_probe_is_not_misled_by_autocast() -> None:
    expected = is_exact()
    is_exact.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_exact() == expected


def test_a_torch_without_the_switch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(torch.backends, "mkldnn", object())
        assert not is_exact()
        with fast_float32():
            pass


def test_a_rejected_switch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_float32, "is_exact", lambda: False)
    before = MATMUL.fp32_precision
    with fast_float32():
        assert MATMUL.fp32_precision == before


@pytest.mark.usefixtures("_accepted")
@pytest.mark.parametrize("before", ["none", "ieee", "tf32", "bf16"])
def test_the_setting_is_restored(before: str) -> None:
    original = MATMUL.fp32_precision
    MATMUL.fp32_precision = before
    try:
        with fast_float32():
            assert MATMUL.fp32_precision == "bf16"
        assert MATMUL.fp32_precision == before
        with pytest.raises(KeyError), fast_float32():
            raise KeyError
        assert MATMUL.fp32_precision == before
    finally:
        MATMUL.fp32_precision = original


@pytest.mark.usefixtures("_accepted")
def test_nested_use() -> None:
    before = MATMUL.fp32_precision
    with fast_float32():
        with fast_float32():
            assert MATMUL.fp32_precision == "bf16"
        assert MATMUL.fp32_precision == "bf16"
    assert MATMUL.fp32_precision == before


@pytest.mark.usefixtures("_accepted")
def test_threads_take_turns() -> None:
    """The second thread must not take the first one's setting for the original, and restore that."""
    before = MATMUL.fp32_precision
    inside, leave, second = threading.Event(), threading.Event(), threading.Event()

    def first_thread() -> None:
        with fast_float32():
            inside.set()
            assert leave.wait(10)

    def second_thread() -> None:
        assert inside.wait(10)
        with fast_float32():
            second.set()
            assert MATMUL.fp32_precision == "bf16"

    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(first_thread), threads.submit(second_thread)]
        assert inside.wait(10)
        assert not second.wait(0.1)
        leave.set()
        for one in done:
            one.result(10)
    assert MATMUL.fp32_precision == before


@pytest.mark.usefixtures("_accepted")
@pytest.mark.parametrize("ns", [FLOAT32, NewtonSchulz()])
def test_it_is_on_while_float32_is_orthogonalized(ns: NewtonSchulz, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    before = MATMUL.fp32_precision

    def watch(x_BMN: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(MATMUL.fp32_precision != before)
        return x_BMN

    monkeypatch.setattr(newton_schulz, "iterate", watch)
    orthogonalize(random(4, 6), ns)
    assert seen == [ns is FLOAT32]


def test_two_threads_orthogonalize() -> None:
    batch = random(2, 40, 60)
    expected = [orthogonalize(x, FLOAT32) for x in batch]
    is_exact.cache_clear()
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda x: orthogonalize(x, FLOAT32), [*batch] * 10))
    assert all(torch.equal(one, expected[i % 2]) for i, one in enumerate(found))


def test_products_are_float32_whatever_the_finding() -> None:
    """Rejected or accepted, on every CPU."""
    a, b = random(300, 256), random(256, 300, seed=1)
    with fast_float32():
        assert oracle.relative(a @ b, a.double() @ b.double()) < 1e-6
    x = random(256, 300)
    assert oracle.relative(orthogonalize(x, FLOAT32), oracle.newton_schulz(x)) < 3e-6


def test_the_probe_is_made_in_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    cpu_float32.is_exact.cache_clear()
    try:
        expected = cpu_float32.is_exact()
        cpu_float32.is_exact.cache_clear()
        torch.set_default_dtype(torch.float64)
        assert cpu_float32.is_exact() == expected
    finally:
        torch.set_default_dtype(before)
        cpu_float32.is_exact.cache_clear()
