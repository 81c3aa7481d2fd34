"""Which form a shape takes, and the count of operations that decides it, against what torch is seen to multiply."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmuon.kernels import cpu_float32
from distmuon.kernels.cpu import PANEL_INNER, PANEL_ROWS, CpuProducts
from distmuon.kernels.products import Products, TorchProducts
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.schedule import flops, make_schedule

CUSTOM = {"preset": "custom", "coefficients": ((1.6, -0.7, 0.1),) * 4, "form": "gram"}
CUBICS = {
    "preset": "custom",
    "coefficients": ((1.5, -0.5, 0.0), (1.6, -0.7, 0.1), *[(1.5, -0.5, 0.0)] * 2),
    "form": "gram",
}
METHODS: list[dict[str, Any]] = [
    {"preset": "papers", "form": "plain"},
    {"preset": "papers", "form": "gram", "dtype": "float16", "restarts": (2, 4)},
    {"preset": "papers", "form": "plain", "dtype": "float32"},
    {"preset": "opt5", "form": "plain", "steps": 5},
    {"preset": "opt5", "form": "gram"},
    {"preset": "opt6", "form": "gram", "restarts": (1, 3, 5)},
    {"preset": "opt6", "form": "gram", "dtype": "float32", "restarts": (3,)},
    CUSTOM,
    CUSTOM | {"start": "schatten8"},
    {"preset": "cubic5"},
    CUBICS,
    CUBICS | {"start": "schatten8"},
    CUBICS | {"start": "schatten8", "form": "plain", "dtype": "float32"},
]


def whole(rows: int, inner: int) -> float:
    return 1.0


def half(rows: int, inner: int) -> float:
    return 0.5


def counted(x: torch.Tensor, ns: NewtonSchulz) -> int:
    cpu_float32.is_exact()  # Its probe multiplies once per process.
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x, ns)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 17), (1, 5), (3, 20, 64), (256, 257)])
@pytest.mark.parametrize(("kernels", "products"), [("torch", TorchProducts()), ("auto", CpuProducts())])
def test_the_formula_counts_what_is_multiplied(
    shape: tuple[int, ...], method: dict[str, Any], kernels: str, products: Products
) -> None:
    ns = NewtonSchulz.model_validate({**method, "kernels": kernels})
    rows, cols = sorted(shape[-2:])
    chosen = make_schedule(ns, rows, cols, products.symmetric_fraction)
    # The start squares the first Gram matrix in any case.
    cubics = [c for _, _, c in chosen.quintics[1:]].count(0.0)
    each = flops(rows, cols, chosen.segments, products.symmetric_fraction, cubics)
    assert counted(torch.randn(shape), ns) == each * (shape[0] if len(shape) > 2 else 1)


@pytest.mark.parametrize(("preset", "form"), [("papers", "plain"), ("opt5", "gram")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_panels_are_counted_as_they_are_multiplied(preset: Any, form: Any, dtype: Any) -> None:
    ns = NewtonSchulz(preset=preset, form=form, dtype=dtype)
    fraction = CpuProducts().symmetric_fraction
    segments = make_schedule(ns, PANEL_ROWS, PANEL_INNER, fraction).segments
    found = counted(torch.randn(PANEL_ROWS, PANEL_INNER), ns)
    assert found == flops(PANEL_ROWS, PANEL_INNER, segments, fraction) < flops(PANEL_ROWS, PANEL_INNER, segments, whole)


# (length of every segment, n^2 m, n^3) with whole and with half products.
@pytest.mark.parametrize(
    ("segments", "computed", "wide", "square"),
    [
        ((1,) * 5, whole, 20, 10),
        ((1,) * 5, half, 15, 5),
        ((5,), whole, 4, 34),
        ((2, 3), whole, 8, 28),
        ((2, 3), half, 6, 17),
        ((1, 2, 2), whole, 12, 22),
        ((1, 2, 2), half, 9, 13),
        ((2, 2, 2), whole, 12, 30),
        ((2, 2, 2), half, 9, 18),
    ],
)
def test_closed_forms(segments: Sequence[int], computed: Any, wide: int, square: int) -> None:
    for rows, cols in ((512, 512), (512, 2048), (1, 3), (0, 0)):
        assert flops(rows, cols, segments, computed) == wide * rows**2 * cols + square * rows**3


def test_cubics_take_no_square() -> None:
    assert flops(512, 2048, (1,) * 5, whole, cubics=4) == 20 * 512**2 * 2048 + 2 * 512**3
    assert flops(512, 2048, (1,) * 5, half, cubics=4) == 15 * 512**2 * 2048 + 512**3
    assert flops(512, 2048, (1, 2, 2), whole, cubics=1) == 12 * 512**2 * 2048 + 20 * 512**3


def test_the_fraction_is_asked_for_both_symmetric_products() -> None:
    """Q, which is not exactly symmetric, is multiplied in full."""

    def fraction(rows: int, inner: int) -> float:
        return {(4, 8): 0.75, (4, 4): 0.625}[rows, inner]

    one = 2 * 16 * 8 * 0.75 + 2 * 64 * 0.625 + 2 * 16 * 8
    assert flops(4, 8, (1,), fraction) == one
    assert flops(4, 8, (2, 1), fraction) == 2 * one + 3 * 2 * 64 * 0.625 + 2 * 64


@pytest.mark.parametrize(
    ("rows", "cols", "computed", "gram"),
    [
        (512, 512, whole, False),
        (512, 767, whole, False),
        (512, 768, whole, False),
        (512, 769, whole, True),
        (512, 2048, whole, True),
        (512, 512, half, False),
        (512, 682, half, False),
        (512, 683, half, True),
    ],
)
def test_auto_takes_the_cheaper_form(rows: int, cols: int, computed: Any, gram: bool) -> None:
    """With two restarts, Gram is cheaper for cols > 1.5 rows, or 4/3 where half of a symmetric product is saved."""
    ns = NewtonSchulz()
    found = make_schedule(ns, rows, cols, computed)
    assert found.segments == ((1, 2, 2) if gram else (1,) * 5)
    assert found.quintics == ns.polynomials("gram" if gram else "plain").quintics
    assert found.start == "frobenius"


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"form": "plain"},
        {"preset": "opt4"},
        {"preset": "opt5", "dtype": "float16"},
        {"preset": "opt6"},
        {"preset": "optimal"},
        {"preset": "you"},
        {"preset": "polar_express"},
        {"preset": "cans"},
        {"preset": "cubic5"},
        {"steps": 2},
        {"preset": "optimal", "steps": 4},
    ],
)
def test_the_plain_form_stays(settings: dict[str, Any]) -> None:
    ns = NewtonSchulz(**settings)
    found = make_schedule(ns, 64, 4096, half)
    assert found.segments == (1,) * len(found.quintics)
    assert found.quintics == ns.polynomials("plain").quintics
    assert found.start == ns.polynomials("plain").start


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_who_asks_for_gram_gets_it_for_every_shape(dtype: Any) -> None:
    ns = NewtonSchulz(preset="opt6", form="gram", restarts=(1, 3, 5), dtype=dtype)
    for rows, cols in ((512, 512), (1, 1), (64, 4096)):
        found = make_schedule(ns, rows, cols, whole)
        assert list(accumulate(found.segments)) == [1, 3, 5, 6]
        assert found.quintics == ns.polynomials("gram").quintics


def test_a_start_of_one_s_own_is_kept() -> None:
    for start in ("frobenius", "schatten8"):
        for form in ("plain", "gram"):
            ns = NewtonSchulz.model_validate({**CUSTOM, "form": form, "start": start})
            assert make_schedule(ns, 8, 8, whole).start == start


def test_the_form_is_chosen_by_the_products_that_run() -> None:
    """By the fraction that they compute, and by no other."""
    fraction = CpuProducts().symmetric_fraction
    ns = NewtonSchulz()
    assert make_schedule(ns, 768, 1100, fraction).segments == (1,) * 5
    assert make_schedule(ns, 768, 1100, half).segments == (1, 2, 2)
    assert counted(torch.randn(20, 24), ns) == 20 * 20**2 * 24 + 10 * 20**3
    assert counted(torch.randn(20, 40), ns) == 12 * 20**2 * 40 + 22 * 20**3
