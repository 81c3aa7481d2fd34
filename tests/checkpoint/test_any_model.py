"""Any model under any two placements: the state by name is the same after saving and loading."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distmuon import checkpoint
from tests.checkpoint.scene import Figure, Spec, Way, Whole, bits_differing, build, join_late, train, whole
from tests.ranks import run_threads

SIZE = st.integers(1, 9)
MATRIX = st.one_of(st.tuples(SIZE, SIZE), st.tuples(st.integers(1, 3), SIZE, SIZE))
ELEMENTWISE = st.lists(st.integers(0, 7), max_size=4).map(tuple)
ENTRY = st.one_of(st.tuples(MATRIX, st.just("muon")), st.tuples(ELEMENTWISE, st.just("adamw")))
DTYPES = ("float32", "bfloat16", "float16")
MODELS = st.lists(ENTRY, min_size=1, max_size=7).map(lambda found: {f"p{n}": entry for n, entry in enumerate(found)})


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Shapes, dtypes, frozen, late and separate parameters; at least one is trained from the start."""
    shapes = {"first": ((3, 4), "muon"), **draw(MODELS)}
    names = [name for name in shapes if name != "first"]
    some = st.sets(st.sampled_from(names), max_size=3).map(sorted).map(tuple)
    frozen = draw(some)
    return Spec(
        shapes,
        draw(st.sampled_from(DTYPES)),
        dtypes={name: draw(st.sampled_from(DTYPES)) for name in draw(some)},
        frozen=frozen,
        apart=draw(some),
        late=tuple(name for name in draw(some) if name not in frozen),
        tied=draw(st.sampled_from(["", "first"])),
    )


@st.composite
def ways(draw: st.DrawFn) -> Way:
    """Any placement."""
    if draw(st.integers(0, 5)) == 0:
        return Way(alone=True)
    placement = [("balanced", "scatter"), ("balanced", "owner"), ("flat", "auto"), ("team", "auto")]
    policy, transport = draw(st.sampled_from(placement))
    world = draw(st.integers(1, 5))
    return Way(world, policy, transport, draw(st.sampled_from([0.00004, 0.0002, 0.001, 25.0])))


def write(rank: int, world: int, spec: Spec, way: Way, folder: Path) -> Whole:
    model, opt = build(spec, way)
    train(model, opt, spec, 0, 1, rank, world)
    join_late(model, spec, opt)
    train(model, opt, spec, 1, 2, rank, world)
    checkpoint.save(folder, model, opt, step=2)
    return whole(model, opt)


def read(rank: int, world: int, spec: Spec, way: Way, folder: Path) -> tuple[Whole, list[Any]]:
    model, opt = build(spec, way, seed=8)
    join_late(model, spec, opt)
    checkpoint.load(folder, model, opt)
    return whole(model, opt), [group["lr"] for group in opt.param_groups]


def check(spec: Spec, before: Way, after: Way) -> int:
    with TemporaryDirectory() as name:
        saved = run_threads(before.world, write, spec, before, Path(name))[0]
        answers = run_threads(after.world, read, spec, after, Path(name))
        return sum(bits_differing(found, saved) for found, _ in answers)


def prove(examples: int, figure: Figure) -> None:
    seen = [0, 0]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(spec=specs(), before=ways(), after=ways())
    def holds(spec: Spec, before: Way, after: Way) -> None:
        differing = check(spec, before, after)
        seen[0] += 1
        seen[1] += differing
        assert differing == 0

    holds()
    figure(f"{seen[0]} random models and pairs of placements: {seen[1]} bits differ")


@pytest.mark.fault("F9")
def test_any_model(figure: Figure) -> None:
    prove(60, figure)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.fault("F9")
def test_many_models(figure: Figure) -> None:
    prove(1500, figure)
