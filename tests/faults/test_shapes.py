"""Shapes of every kind: what the optimizers make of them is the reference's, or they are refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import distmuon
from distmuon.errors import DistMuonError
from tests.distributed import placed
from tests.distributed.placed import Job
from tests.oracle import OracleMuon, Settings
from tests.ranks import run_threads

Figure = Callable[[str], None]
Shapes = dict[str, tuple[tuple[int, ...], str]]
WORLDS = (0, 1, 2, 3, 4)
"""World 0 is the single-device Muon."""
POLICIES = (("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto"), ("team", "auto"))
TOLERANCE = 2e-5
"""Five steps of Newton-Schulz raise small singular values 485 times, and with them the rounding of float32."""


def reference(job: Job, world: int) -> dict[str, Tensor]:
    """Total updates in float64, of all parameters that have elements."""
    start = {name: p.detach() for name, p in placed.parameters(job).items() if p.numel()}
    muon, adamw = Settings(lr=0.1), Settings(kind="adamw", lr=0.02)
    oracle = OracleMuon(start, {name: muon if job.shapes[name][1] == "muon" else adamw for name in start})
    for step in range(job.steps):
        per_rank = [placed.gradients(job, step, 0, rank) for rank in range(max(world, 1))]
        oracle.step([{name: grads[name] for name in start} for grads in per_rank])
    return {name: oracle.masters[name] - start[name].double() for name in start}


def single(job: Job) -> dict[str, Any]:
    """The run of ``placed.train`` with Muon."""
    params = placed.parameters(job)
    opt = distmuon.Muon(placed.groups(params, job), **placed.settings(job))
    for number in range(job.steps):
        placed.step(params, opt, job, number, 0)
    return {"params": {name: p.detach().double().flatten().tolist() for name, p in params.items()}, "digests": []}


def distances(job: Job, world: int) -> dict[str, float]:
    """Distance of each parameter's total update from the reference's, in lengths of a usual step."""
    runs = run_threads(world, placed.threaded, job) if world else [single(job)]
    assert all(run["digests"] == runs[0]["digests"] for run in runs)
    found = {}
    for name, want in reference(job, world).items():
        usual = (0.1 * 0.2 if job.shapes[name][1] == "muon" else 0.02) * want.numel() ** 0.5
        found[name] = float((placed.total_update(job, runs[0], [name]) - want.flatten()).norm()) / usual
    return found


SIDES = st.one_of(st.integers(1, 9), st.sampled_from([0, 1, 16, 33]))
ANY_SHAPE = st.one_of(
    st.tuples(SIDES, SIDES),
    st.tuples(SIDES, SIDES),
    st.tuples(st.integers(0, 3), SIDES, SIDES),
    st.tuples(SIDES),
    st.tuples(st.just(1), st.integers(1, 70)),
    st.tuples(st.integers(1, 70), st.just(1)),
    st.sampled_from([(), (5, 7), (2, 3, 4, 5)]),
)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, int]:
    """Up to four parameters, and how they are placed."""
    shapes: Shapes = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(ANY_SHAPE)
        matrix = len(shape) in (2, 3) and draw(st.integers(0, 4)) > 0
        shapes[f"p{number}"] = (shape, "muon" if matrix else "adamw")
    policy, transport = draw(st.sampled_from(POLICIES))
    bucket_mb = draw(st.sampled_from([1e-6, 0.0002, 0.0006, 25.0]))
    return Job(shapes, policy, transport, bucket_mb=bucket_mb), draw(st.sampled_from(WORLDS))


@pytest.mark.fault("F16")
def test_any_shapes_equal_the_reference(figure: Figure) -> None:
    worst: list[float] = []
    seen: Counter[str] = Counter()

    @settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(jobs())
    def check(drawn: tuple[Job, int]) -> None:
        job, world = drawn
        for name, distance in distances(job, world).items():
            assert distance < TOLERANCE, (job, world, name)
            worst.append(distance)
        for shape, _ in job.shapes.values():
            seen["parameters"] += 1
            seen["empty"] += 0 in shape
            seen["0-dim"] += shape == ()
            seen["thin"] += len(shape) == 2 and 1 in shape
            seen["stacked"] += len(shape) == 3
        seen["jobs"] += 1
        seen["more ranks than parameters"] += world > len(job.shapes)

    check()
    counted = ", ".join(f"{number} {what}" for what, number in seen.items())
    figure(f"{counted}: within {max(worst):.2g} steps of the reference")
    assert seen["jobs"] >= 500
    assert min(seen.values()) > 20


def culprit(tensor: Tensor, kind: str = "muon") -> list[dict[str, Any]]:
    fine = Parameter(torch.zeros(4, 4))
    return [{"params": [("fine", fine), ("culprit", tensor)], "kind": kind}]


def two_views() -> list[dict[str, Any]]:
    base = torch.zeros(8, 4)
    return [{"params": [("fine", Parameter(base[:4])), ("culprit", Parameter(base[3:7]))], "kind": "muon"}]


def twice(groups: int) -> list[dict[str, Any]]:
    w = Parameter(torch.zeros(4, 4))
    if groups == 1:
        return [{"params": [("fine", w), ("culprit", w)], "kind": "muon"}]
    return [{"params": [("fine", w)], "kind": "muon"}, {"params": [("culprit", w)], "kind": "muon"}]


REFUSED: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "no parameters": (list, "params"),
    "transposed": (lambda: culprit(Parameter(torch.zeros(4, 6).t())), "culprit"),
    "every second column": (lambda: culprit(Parameter(torch.zeros(4, 12)[:, ::2])), "culprit"),
    "expanded": (lambda: culprit(Parameter(torch.zeros(1, 4).expand(4, 4))), "culprit"),
    "overlapping views": (two_views, "culprit"),
    "twice in one group": (lambda: twice(1), "culprit"),
    "twice in two groups": (lambda: twice(2), "culprit"),
    "not a leaf": (lambda: culprit(torch.zeros(4, 4, requires_grad=True) * 2), "culprit"),
    "0-dim as a matrix": (lambda: culprit(Parameter(torch.zeros(()))), "culprit"),
    "vector as a matrix": (lambda: culprit(Parameter(torch.zeros(5))), "culprit"),
    "4-dim as a matrix": (lambda: culprit(Parameter(torch.zeros(2, 2, 2, 2))), "culprit"),
    "float64": (lambda: culprit(Parameter(torch.zeros(4, 4, dtype=torch.float64))), "culprit"),
    "complex": (lambda: culprit(Parameter(torch.zeros(4, 4, dtype=torch.complex64)), "adamw"), "culprit"),
}


@pytest.mark.fault("F16")
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, figure: Figure) -> None:
    make, named = REFUSED[what]

    def attempt(rank: int, world: int, build: Any) -> tuple[str, str]:
        groups = make()
        with pytest.raises(ValueError, match=".") as caught:
            build(groups)
        return caught.typename if isinstance(caught.value, DistMuonError) else "", str(caught.value)

    answers = [attempt(0, 1, distmuon.Muon), *run_threads(3, attempt, distmuon.DistMuon)]
    refused = sum(bool(kind) and named in message for kind, message in answers)
    figure(f"{what}: {refused} of 4 refusals name it ({answers[0][0] or 'torch'})")
    assert refused == len(answers)
