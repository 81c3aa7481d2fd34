"""What a plan says about itself: sizes, costs, bytes, digest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distmuon.bricks import Matrix, ParamSpec, split_matrices
from distmuon.errors import ConfigError
from distmuon.ns_settings import NewtonSchulz
from distmuon.plan import Plan, overlap
from distmuon.planner import make_plan

REPO = Path(__file__).resolve().parents[2]
SPECS = [
    ParamSpec("table", (12, 4), "adamw"),
    ParamSpec("hidden", (6, 4), "muon"),
    ParamSpec("experts", (3, 4, 5), "muon"),
    ParamSpec("gain", (7,), "adamw"),
]
DIGEST = """
from distmuon.bricks import ParamSpec
from distmuon.planner import make_plan
specs = [ParamSpec("a", (12, 4), "adamw"), ParamSpec("b", (3, 4, 5), "muon"), ParamSpec("c", (7,), "adamw")]
print(make_plan(specs, 3, "balanced", 40).digest)
"""


def plan(specs: list[ParamSpec] = SPECS, world: int = 2, policy: Any = "flat", bucket: int = 50) -> Plan:
    return make_plan(specs, world, policy, bucket, "scatter" if policy == "balanced" else "auto")


@pytest.mark.parametrize(
    ("shape", "kind", "numel", "blocks"),
    [
        ((6, 4), "muon", 24, [(0, 6, 4)]),
        ((3, 4, 5), "muon", 60, [(0, 4, 5), (20, 4, 5), (40, 4, 5)]),
        ((6, 4), "adamw", 24, []),
        ((7,), "adamw", 7, []),
        ((), "adamw", 1, []),
        ((0, 4), "muon", 0, []),
        ((0, 4, 5), "muon", 0, []),
    ],
)
def test_matrices_of_a_parameter(
    shape: tuple[int, ...], kind: Any, numel: int, blocks: list[tuple[int, int, int]]
) -> None:
    spec = ParamSpec("w", shape, kind)
    assert spec.numel == numel
    assert [(m.param, m.start, m.rows, m.cols) for m in split_matrices(5, spec)] == [(5, *b) for b in blocks]


@pytest.mark.parametrize(("rows", "cols"), [(3, 7), (7, 3)])
def test_cost_counts_the_products_of_all_steps(rows: int, cols: int) -> None:
    # XX^T and the last product: 2 * 3 * 3 * 7 each; the square of XX^T: 2 * 3 * 3 * 3.
    made = make_plan([ParamSpec("w", (rows, cols), "muon")], 1, ns=NewtonSchulz(form="plain"))
    assert made.matrices[0].cost == made.flops_once == 5 * (2 * (2 * 3 * 3 * 7) + 2 * 27)


def test_overlap() -> None:
    piece = plan().buckets[-1].pieces[0][0]
    inside = Matrix(piece.param, piece.start + 2, 1, 3)
    assert overlap(piece, inside) == (piece.start + 2, 3)
    assert overlap(piece, Matrix(piece.param, piece.end - 1, 1, 3)) == (piece.end - 1, 1)
    assert overlap(piece, Matrix(piece.param, piece.end, 1, 3))[1] == 0
    assert overlap(piece, Matrix(piece.param + 1, piece.start, 1, 3))[1] == 0


def test_sizes_by_hand() -> None:
    """From the end: gain 7 + experts 60 = 67 close the first bucket at 50, hidden 24 + table 48 = 72 the second."""
    made = plan()
    assert [bucket.lengths for bucket in made.buckets] == [(34, 34), (36, 36)]
    assert [bucket.params for bucket in made.buckets] == [(2, 3), (0, 1)]
    assert (made.numel, made.padding) == (139, 1)
    assert made.shard_bytes(4) == 70 * 4
    assert plan(world=4, bucket=10**6).shard_bytes(2) == 3 * 35 * 2
    assert plan(world=1).shard_bytes(4) == 0


def test_completion_bytes_by_hand() -> None:
    """gain takes 7 of the first shard's 34 elements, so of the second expert 7 of 20 lie on rank 0 and 13 on rank 1."""
    made = plan()
    cut = [m for m in made.matrices if m.cut]
    assert [(m.param, m.start, m.holders) for m in cut] == [(2, 20, (0, 1))]
    assert [made.completion_bytes(rank, 2) for rank in (0, 1)] == [14, 26]


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("policy", ["flat", "balanced"])
def test_completion_bytes_of_all_ranks(world: int, policy: str) -> None:
    """Every element of a cut matrix travels to each of its other holders."""
    made = plan(world=world, policy=policy)
    sent = sum(made.completion_bytes(rank, 2) for rank in range(world))
    assert sent == 2 * sum((len(m.holders) - 1) * m.numel for m in made.matrices)


def test_every_holder_pays_for_a_cut_matrix() -> None:
    made = plan()
    costs = {(m.rows, m.cols): m.cost for m in made.matrices}
    whole, cut = costs[6, 4], costs[4, 5]
    assert [made.newton_schulz_flops(rank) for rank in (0, 1)] == [2 * cut + whole, 2 * cut]
    assert made.flops_once == 3 * cut + whole


DIFFERENT: dict[str, dict[str, Any]] = {
    "world": {"world": 3},
    "policy": {"policy": "balanced"},
    "bucket": {"bucket": 10**6},
    "order": {"specs": SPECS[::-1]},
    "fewer": {"specs": SPECS[:-1]},
    "name": {"specs": [*SPECS[:-1], ParamSpec("bias", (7,), "adamw")]},
    "shape": {"specs": [ParamSpec("table", (4, 12), "adamw"), *SPECS[1:]]},
    "kind": {"specs": [ParamSpec("table", (12, 4), "muon"), *SPECS[1:]]},
}


@pytest.mark.parametrize("changed", DIFFERENT)
def test_digest_shows_what_matters(changed: str) -> None:
    assert plan(**DIFFERENT[changed]).digest != plan().digest


def test_digest_shows_a_policy_that_places_alike() -> None:
    specs = [ParamSpec("gain", (8,), "adamw")]
    assert plan(specs, policy="flat").buckets == plan(specs, policy="balanced").buckets
    assert plan(specs, policy="flat").digest != plan(specs, policy="balanced").digest


def test_digest_does_not_depend_on_the_process() -> None:
    found = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.strip())
    (digest,) = found
    assert len(digest) == 64


def test_placement_does_not_depend_on_how_often_it_is_computed() -> None:
    assert plan() == plan()
    assert plan().digest == plan().digest


@pytest.mark.parametrize("world", [0, -1])
def test_no_ranks(world: int) -> None:
    with pytest.raises(ConfigError, match=f"world = {world} is not legal"):
        plan(world=world)


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match='policy = \'zigzag\' is not legal: use "balanced", "flat" or "team"'):
        plan(policy="zigzag")
