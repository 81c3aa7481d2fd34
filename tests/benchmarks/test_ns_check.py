"""A candidate that computes something else is refused before it is timed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from distmuon.benchmarks import ns, ns_check
from distmuon.benchmarks.ns_candidates import SETTINGS, Candidate, Shape, candidates, eager, ours
from distmuon.benchmarks.ns_check import TOLERANCE, Exact, WrongResultError, error, graded, verify
from distmuon.coefficients import preset
from distmuon.published import PAPERS

CPU = torch.device("cpu")
SHAPES = [Shape(1, 64, 64), Shape(1, 48, 96), Shape(1, 96, 48), Shape(3, 32, 64)]


def test_graded_matrices_span_three_decades_on_their_shorter_side() -> None:
    for rows, cols in ((64, 256), (256, 64)):
        x = graded(2, rows, cols)
        assert x.shape == (2, rows, cols)
        assert x.is_contiguous()
        norms = x.norm(dim=1 if rows > cols else 2)
        assert norms[:, 0] / norms[:, -1] == pytest.approx(1000, rel=0.3)
    assert torch.equal(graded(1, 8, 8), graded(1, 8, 8, seed=0))
    assert not torch.equal(graded(1, 8, 8), graded(1, 8, 8, seed=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", ["frobenius", "schatten8"])
def test_exact_polynomials_are_those_of_the_singular_values(shape: Shape, start: str) -> None:
    x = graded(shape.batch, shape.rows, shape.cols)
    u, sigma, v = torch.linalg.svd(x.double(), full_matrices=False)
    power, margin = (2, 1.0) if start == "frobenius" else (8, 1.005)
    y = sigma / (margin * sigma.pow(power).sum(dim=-1, keepdim=True).pow(1 / power))
    quintics = ((2.0, -1.5, 0.5), (3.0, -3.2, 1.2))
    for a, b, c in quintics:
        y = a * y + b * y**3 + c * y**5
    found = Exact(x).polynomial(quintics, start)  # type: ignore[arg-type]
    assert error(found, u @ (y[..., None] * v)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_passes(shape: Shape, dtype: torch.dtype) -> None:
    run = candidates(shape, CPU, dtype)
    x_BMN = graded(shape.batch, shape.rows, shape.cols).to(dtype)
    errors = ns.check(run, x_BMN[0] if shape.batch == 1 else x_BMN, x_BMN)
    assert list(errors) == [one.name for one in run]
    assert len(errors) == len(run) >= 9
    assert any(one.dtype == torch.float32 for one in run) == (dtype == torch.float32 and shape.batch == 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_preset_passes_for_another(name: str) -> None:
    shape = Shape(1, 64, 256)
    one, exact = ours(name, shape, CPU), Exact(graded(1, 64, 256))
    result = exact.polynomial(one.quintics, one.start)
    others = [ours(other, shape, CPU) for other in SETTINGS if SETTINGS[other]["preset"] != SETTINGS[name]["preset"]]
    assert others
    for other in others:
        expected = exact.polynomial(other.quintics, other.start)
        assert error(result, expected) > 1.3 * TOLERANCE[torch.bfloat16]
        with pytest.raises(WrongResultError, match=f'"{name}" is off by .* 0.06 is legal for bfloat16'):
            verify(name, result, expected, torch.bfloat16)


def test_tolerances_tell_the_presets_apart_in_every_size_that_is_timed() -> None:
    for shape in (*ns.SINGLE, *ns.BATCHES):
        if shape.rows * shape.cols <= 512 * 512:
            exact = Exact(graded(1, shape.rows, shape.cols))
            results = [
                exact.polynomial(one.quintics, one.start)
                for one in (preset(name) for name in ("papers", "polar_express", "opt4", "opt5", "opt6"))
            ]
            assert min(error(a, b) for a, b in itertools.combinations(results, 2)) > 1.3 * TOLERANCE[torch.bfloat16]


def test_wrong_results_are_named() -> None:
    exact = torch.eye(4, dtype=torch.float64)[None]
    assert verify("fine", exact.float(), exact, torch.float32) == 0
    broken = exact.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(WrongResultError, match='"broken" is off by nan'):
        verify("broken", broken, exact, torch.bfloat16)
    with pytest.raises(WrongResultError, match=r'"short" returns \(1, 3, 4\) instead of \(1, 4, 4\)'):
        verify("short", exact[:, :3], exact, torch.bfloat16)
    with pytest.raises(WrongResultError, match="for float32"):
        verify("coarse", exact * 1.001, exact, torch.float32)
    with pytest.raises(WrongResultError, match='"other" gives a matrix other bits in a batch than alone'):
        ns_check.verify_equal("other", exact, exact + 2**-40)


def test_a_run_stops_at_a_wrong_candidate_and_at_other_bits_in_a_batch() -> None:
    x_BMN = graded(2, 32, 64)
    five = (PAPERS,) * 5
    alone = Candidate("one by one", eager, five, loop=True)
    assert set(ns.check([alone, Candidate("batch", eager, five)], x_BMN, x_BMN)) == {"one by one", "batch"}

    def nudged(x: Tensor) -> Tensor:
        y = eager(x)
        y[0, 0, 0] = y[0, 0, 0] * 1.01
        return y

    with pytest.raises(WrongResultError, match="other bits"):
        ns.check([alone, Candidate("nudged", nudged, five, twin="one by one")], x_BMN, x_BMN)
    with pytest.raises(WrongResultError, match='"four steps"'):
        ns.check([Candidate("four steps", eager, five[:4])], x_BMN, x_BMN)
