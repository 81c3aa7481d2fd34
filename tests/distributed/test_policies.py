"""Every policy and transport gives the same result: the same bits, or with teams the same up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from distmuon.bricks import Matrix
from distmuon.comm import Group, Traffic
from distmuon.errors import StateError
from distmuon.team import sum_over_teams
from tests.distributed import placed
from tests.distributed.placed import WAYS, Job, threaded, total_update
from tests.distributed.placed import train as train_placed
from tests.distributed.scenario import MODEL, SMALL_MB, Case, advance, digest, gradients, optimizer, parameters
from tests.oracle import relative
from tests.ranks import RankPool, run_threads

Figure = Callable[[str], None]

CASES = [
    Case(exact=True, ns="float32", clip=1.0),
    Case(exact=True, ns="bfloat16"),
    Case(exact=True, ns="bfloat16", clip=1.0, dtype="bfloat16"),
    Case(exact=True, ns="float32", clip=1.0, accumulation=2, dtype="bfloat16", bucket_mb=25.0),
]


def exact(rank: int, world: int, case: Case, transport: str) -> tuple[list[str], list[str]]:
    """Digests after every step, and what the plan came to."""
    params = parameters(case.torch_dtype)
    opt = optimizer(params, case, transport=transport)
    digests = []
    for step in range(case.steps):
        advance(params, opt, [gradients(case, step, micro, rank, world) for micro in range(case.accumulation)])
        opt.step()
        opt.zero_grad()
        digests.append(digest(params))
    return digests, [plan.transport for plan in opt.plans]


@cache
def alone(case: Case) -> list[str]:
    return run_threads(1, exact, case, "auto")[0][0]  # type: ignore[no-any-return]


@pytest.mark.fault("F10")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ns},{case.dtype},{case.accumulation}")
@pytest.mark.parametrize(("policy", "transport"), WAYS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_exact_gradients_give_the_same_bits(
    world: int, policy: str, transport: str, case: Case, figure: Figure
) -> None:
    runs = run_threads(world, exact, replace(case, policy=policy), transport)
    different = sum(digests != alone(case) for digests, _ in runs)
    figure(f"{policy}, {transport}, {case.dtype}: {different} of {world} ranks differ from one rank in a bit")
    assert different == 0
    for _, transports in runs:
        assert transports == ["owner" if transport == "owner" else "scatter"]
    assert len(set(alone(case))) == case.steps


ANY = [
    Job(MODEL, ns={"dtype": "bfloat16", "form": "plain"}, clip=1.0, bucket_mb=SMALL_MB),
    Job(MODEL, accumulation=2, clip=1.0, dtype="bfloat16", reduce_dtype="bfloat16"),
    Job(MODEL, accumulation=3, dtype="bfloat16", grad_accum_dtype="float32"),
]


@pytest.mark.parametrize("job", ANY, ids=lambda job: f"{job.dtype},{job.accumulation}")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_gradients_give_the_same_bits_on_gloo(pool: RankPool, world: int, job: Job) -> None:
    """Sums are in the order of the ranks, so not even their rounding depends on where elements lie."""
    found = {way: pool.run(world, train_placed, replace(job, policy=way[0], transport=way[1])) for way in WAYS}
    digests = {tuple(answer["digests"]) for answers in found.values() for answer in answers}
    assert len(digests) == 1
    assert len(set(*digests)) == job.steps
    assert not all(found["balanced", "owner"][0]["even"])
    assert found["flat", "auto"][0]["cut"] or world == 2


MATRICES: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "tall": {"w": ((40, 8), "muon")},
    "wide": {"w": ((8, 40), "muon")},
    "square": {"w": ((24, 24), "muon")},
    "odd": {"w": ((13, 7), "muon"), "v": ((7, 19), "muon")},
    "one slice in Gram form": {"w": ((4, 19), "muon")},
    "stacked": {"w": ((2, 30, 12), "muon"), "gain": ((30,), "adamw")},
    "large and small": {"w": ((64, 48), "muon"), "v": ((6, 5), "muon"), "table": ((50, 8), "adamw")},
}


def agree(job: Job, teams: list[dict[str, Any]], alone: dict[str, Any], tolerance: float) -> None:
    """All ranks have equal bits, near those of whole matrices."""
    assert len({tuple(answer["digests"]) for answer in teams}) == 1
    assert teams[0]["slices"]
    assert (teams[0]["skipped"], alone["skipped"], alone["slices"]) == (0, 0, [])
    for name in job.shapes:
        want = total_update(job, alone, [name])
        assert relative(total_update(job, teams[0], [name]), want) < tolerance, name


@pytest.mark.parametrize(
    ("world", "shapes"),
    # Two matrices of a size keep two ranks equally busy.
    [(w, shapes) for w in (2, 3, 4, 8) for shapes in MATRICES if w > 2 or shapes not in ("odd", "stacked")],
)
def test_teams_are_near_whole_matrices(world: int, shapes: str) -> None:
    job = Job(MATRICES[shapes])
    whole = run_threads(world, threaded, job)
    teams = run_threads(world, threaded, replace(job, policy="team"))
    agree(job, teams, whole[0], 1e-5)
    if shapes == "tall" and world == 3:
        assert sorted(teams[0]["slices"][0]) == [13, 13, 14]


FORMS: list[dict[str, Any]] = [
    {"dtype": "float32", "form": "plain"},
    {"dtype": "float32", "form": "gram"},
    {"dtype": "float32", "form": "gram", "restarts": (2,)},
    {"dtype": "float32", "preset": "opt5"},
    {"dtype": "float32", "preset": "opt5", "form": "gram"},
]


@pytest.mark.parametrize("ns", FORMS, ids=lambda ns: ",".join(str(value) for value in ns.values()))
@pytest.mark.parametrize("shapes", ["tall", "wide", "odd"])
def test_teams_with_every_form(shapes: str, ns: dict[str, Any]) -> None:
    job = Job(MATRICES[shapes], ns=ns)
    teams = run_threads(3, threaded, replace(job, policy="team"))
    agree(job, teams, run_threads(3, threaded, job)[0], 1e-5)


@pytest.mark.parametrize("shapes", ["tall", "wide", "large and small", "one slice in Gram form"])
def test_teams_in_bfloat16(shapes: str) -> None:
    """Partial sums are rounded to 8 bits before they are added up."""
    job = Job(MATRICES[shapes], ns={"dtype": "bfloat16"}, dtype="bfloat16")
    teams = run_threads(3, threaded, replace(job, policy="team"))
    agree(job, teams, run_threads(3, threaded, job)[0], 0.03)


@pytest.mark.fault("F14")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shapes", ["tall", "wide"])
def test_teams_do_not_depend_on_the_size_of_gradients(shapes: str, scale: float, dtype: str, figure: Figure) -> None:
    """All slices are divided by the same power of two, that of the largest element of the whole matrix."""
    job = Job(MATRICES[shapes], ns={"dtype": dtype}, policy="team", steps=1)
    usual = run_threads(3, threaded, job)[0]
    extreme = run_threads(3, threaded, replace(job, scale=scale))
    off = relative(total_update(job, extreme[0]), total_update(job, usual))
    figure(f"a team of 3, {shapes}, {dtype}, gradients times {scale:g}: the update changes by {off:.2g}")
    agree(job, extreme, {**usual, "slices": []}, 1e-5 if dtype == "float32" else 0.03)


@pytest.mark.fault("F14")
@pytest.mark.parametrize("shapes", ["tall", "wide", "odd"])
def test_teams_keep_a_zero_matrix_zero(shapes: str, figure: Figure) -> None:
    """Only weight decay moves it."""
    job = Job(MATRICES[shapes], zero=("w",), steps=1)
    teams = run_threads(3, threaded, replace(job, policy="team"))
    whole = run_threads(3, threaded, job)[0]
    kept = sum(answer["params"]["w"] == whole["params"]["w"] for answer in teams)
    figure(f"a team of 3, {shapes}: a matrix without a gradient is only decayed on {kept} ranks")
    assert kept == 3
    agree(job, teams, whole, 1e-5)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_teams_on_gloo(pool: RankPool, world: int) -> None:
    job = Job({**MATRICES["odd"], **MATRICES["large and small"]}, clip=1.0, accumulation=2)
    teams = pool.run(world, train_placed, replace(job, policy="team"))
    agree(job, teams, pool.run(world, train_placed, job)[0], 1e-5)


def resume(rank: int, world: int, job: Job, other: Job) -> tuple[str, str, str]:
    """Digests of parameters and state, trained straight on and through a state dict, and what another plan says."""
    params = placed.parameters(job)
    opt = placed.optimizer(params, job)
    placed.step(params, opt, job, 0, rank)
    fresh, saved = copy.deepcopy((params, opt.state_dict()))
    again = placed.optimizer(fresh, job)
    again.load_state_dict(saved)
    with pytest.raises(StateError) as caught:
        placed.optimizer(placed.parameters(other), other).load_state_dict(saved)
    for given, own in ((params, opt), (fresh, again)):
        placed.step(given, own, job, 1, rank)
    return digest((params, opt.state_dict())), digest((fresh, again.state_dict())), str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("policy", "transport"), [("balanced", "owner"), ("team", "auto")])
def test_resume_changes_no_bit(policy: str, transport: str, dtype: str) -> None:
    """And a state is refused under another placement of the same parameters."""
    job = Job(MATRICES["large and small"], policy, transport, dtype=dtype)
    other = replace(job, policy="balanced", transport="scatter")
    for straight, resumed, message in run_threads(3, resume, job, other):
        assert straight == resumed
        assert "another plan" in message


def squares(rank: int, world: int, dtype: torch.dtype) -> list[Tensor]:
    """Sums of two matrices' squares; rank 1 has no part of the first, rank 0 none of the second."""
    first = Matrix(0, 0, 5, 30, holders=(0, 2, 3), slices=(10, 10, 10))
    second = Matrix(1, 0, 3, 9, holders=(1, 2, 3), slices=(3, 3, 3))
    own = {m: part(m, rank).to(dtype) for m in (first, second) if rank in m.holders}
    summed = sum_over_teams([first, second], own, Group(None, Traffic()), torch.empty(0, dtype=dtype))
    assert summed.keys() == own.keys()
    for matrix, total in summed.items():
        want = torch.zeros_like(total, dtype=torch.float32)
        for holder in matrix.holders:
            want += part(matrix, holder).to(dtype).float()
        assert torch.equal(total, want.to(dtype))
    return list(summed.values())


def part(matrix: Matrix, rank: int) -> Tensor:
    source = torch.Generator().manual_seed(10 * matrix.param + rank)
    return 10.0**rank * torch.randn(1, matrix.short, matrix.short, generator=source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_summed_in_float32_in_the_order_of_the_ranks(dtype: torch.dtype) -> None:
    assert [len(found) for found in run_threads(4, squares, dtype)] == [1, 1, 2, 2]


def in_order(rank: int, world: int, group: Any, lengths: list[int], dtype: str) -> bool:
    """Whether a reduce-scatter is the float32 sum in the order of the ranks, and an all-gather brings all shards."""
    own = Group(group, Traffic())
    given = [
        (10.0**other * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(other))).to(
            getattr(torch, dtype)
        )
        for other in range(world)
    ]
    want = given[0].to(torch.float32, copy=True)
    for other in given[1:]:
        want += other.float()
    shard = own.reduce_scatter(given[rank].clone(), lengths).wait()
    exact = torch.equal(shard.float(), torch.split(want, lengths)[rank])
    full = torch.full_like(want, -1.0)
    torch.split(full, lengths)[rank].copy_(shard)
    return exact and torch.equal(own.all_gather(full, lengths).wait(), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[40, 40, 40], [70, 0, 33], [0, 0, 5]], ids=str)
def test_gradients_are_summed_in_float32_in_the_order_of_the_ranks(
    pool: RankPool, lengths: list[int], dtype: str
) -> None:
    assert pool.run(3, in_order, lengths, dtype) == [True] * 3
