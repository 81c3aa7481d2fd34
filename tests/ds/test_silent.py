"""Silent failures that DeepSpeed's own Muon shipped with, as tests of this plug-in.

Numbers are those of the list that the other tests of this folder follow: 5 is in test_accumulation, 6 in
test_refusals, 8 and 12 are in test_checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ds.engines import (
    DTYPES,
    LR,
    MATRICES,
    advance,
    bits,
    build,
    config,
    count_orthogonalized,
    forward,
    network,
    rule,
    weights,
)
from tests.ds.reference import DEFAULT_CLIP, Reference
from tests.oracle import newton_schulz, relative
from tests.ranks import RankPool

Figure = Callable[[str], None]

CLIPS: dict[str, dict[str, Any]] = {
    "default": {},
    "one": {"gradient_clipping": 1.0},
    "tight": {"gradient_clipping": 0.01},
    "off": {"gradient_clipping": 0},
}


def updates(rank: int, world: int, group: Any, clip: str, boost: float) -> tuple[dict[str, Any], float]:
    """First update of every matrix in units of its learning rate, and the reported norm."""
    engine = build(config(params={"weight_decay": 0.0}, **CLIPS[clip]), 1)
    before = weights(engine)
    engine.backward(forward(engine, 0, 0) * boost)
    engine.step()
    moved = {name: (before[name] - p.detach()) / LR for name, p in engine.named.items() if rule(name) == "muon"}
    return {name: u.numpy() for name, u in moved.items()}, engine.get_global_grad_norm()


@pytest.mark.fault("S1")
@pytest.mark.parametrize("boost", [0.1, 10.0])
def test_01_clipping_does_not_shrink_the_update(ds2: RankPool, boost: float, figure: Figure) -> None:
    """DeepSpeed clips by default, and once clipped what Newton-Schulz had orthogonalized."""
    free, norm = ds2.run(2, updates, "off", boost)[0]
    assert norm > 0.01  # the tight one clips always, the default one where the loss is boosted
    assert (norm > DEFAULT_CLIP) == (boost > 1)
    worst = 0.0
    for clip in ("default", "one", "tight"):
        clipped, reported = ds2.run(2, updates, clip, boost)[0]
        assert reported == norm
        for name, update in clipped.items():
            found, want = torch.tensor(update), torch.tensor(free[name])
            assert relative(found, want) < 1e-4, (clip, name)
            worst = max(worst, abs(float(found.norm() / want.norm()) - 1))
            assert worst < 1e-5, (clip, name)
    figure(f"loss times {boost}: clipping changes |update| by at most {worst:.1e}")


def against_formula(rank: int, world: int, group: Any, clip: str) -> dict[str, float]:
    """Distance of the first update of every matrix from 0.2 sqrt(max(A, B)) NS(G) of the raw mean gradient."""
    reference = Reference(clip=None)
    reference.train(1, 1)
    moved, norm = updates(rank, world, group, clip, 1.0)
    distances = {"norm": abs(norm / reference.norms[0] - 1)}
    for name, update in moved.items():
        want = 0.2 * math.sqrt(max(update.shape)) * newton_schulz(reference.oracle.states[name].first)
        distances[name] = relative(torch.tensor(update), want)
    return distances


@pytest.mark.fault("S1")
@pytest.mark.parametrize("clip", CLIPS)
def test_01_clipped_updates_follow_the_formula(ds2: RankPool, clip: str, figure: Figure) -> None:
    """The reported norm is the raw one, and clipping is out of what is applied."""
    for distances in ds2.run(2, against_formula, clip):
        assert distances.pop("norm") <= 1e-6
        assert len(distances) == MATRICES
        figure(f"clip {clip}: updates within {max(distances.values()):.1e} of the formula's")
        assert {name: d for name, d in distances.items() if d > 1e-4} == {}


def orthogonalized(rank: int, world: int, group: Any, settings: Any, ep: int) -> dict[str, Any]:
    """Wrapper, matrices given to Newton-Schulz in one step, and kinds by name."""
    with count_orthogonalized() as batches:
        engine = build(settings, ep)
        advance(engine, 0, 1)
    kinds = {id(p): group["kind"] for group in engine.optimizer.param_groups for p in group["params"]}
    return {
        "wrapper": type(engine.optimizer).__name__,
        "count": sum(batches),
        "kinds": {name: kinds[id(p)] for name, p in engine.named.items()},
    }


@pytest.mark.fault("S2", "S9")
@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_02_09_every_matrix_is_orthogonalized_once(
    ds2: RankPool, dtype: str, ep: int, gas: int, figure: Figure
) -> None:
    """2: stage 0 ran SGD (refused here); 9: 16-bit with float32 accumulation picked a wrapper that ran SGD."""
    ranks = ds2.run(2, orthogonalized, config(gradient_accumulation_steps=gas, **DTYPES[dtype]), ep)
    assert {seen["wrapper"] for seen in ranks} == {"ZeroDistMuon"}
    count = sum(seen["count"] for seen in ranks)
    figure(f"DeepSpeed, {dtype}, ep_size {ep}, {gas} micro-batches: {count} orthogonalizations of {MATRICES} matrices")
    assert count == MATRICES
    for seen in ranks:
        assert seen["kinds"] == {name: rule(name) for name in seen["kinds"]}


def replicas(rank: int, world: int, group: Any, settings: Any, ep: int) -> list[dict[str, bytes]]:
    """Bits of every parameter after every step."""
    engine = build(settings, ep)
    seen = []
    for step in range(4):
        advance(engine, step, step + 1)
        seen.append({name: _bytes(value) for name, value in weights(engine).items()})
    return seen


def _bytes(value: Tensor) -> bytes:
    return value.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.fault("S7")
@pytest.mark.parametrize("policy", ["balanced", "flat"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("ep", [1, 2])
def test_07_replicas_stay_equal_to_the_bit(ds4: RankPool, ep: int, dtype: str, policy: str, figure: Figure) -> None:
    """A matrix that crossed a partition differed from rank to rank."""
    settings = config(params={"policy": policy, "bucket_mb": 0.004}, **DTYPES[dtype])
    by_name: dict[tuple[int, str], set[bytes]] = {}
    for rank in ds4.run(4, replicas, settings, ep):
        for step, table in enumerate(rank):
            for name, value in table.items():
                by_name.setdefault((step, name), set()).add(value)
    equal = sum(len(values) == 1 for values in by_name.values())
    figure(f"DeepSpeed, {policy}, {dtype}, ep_size {ep}: {equal} of {len(by_name)} tensors equal on all of 4 ranks")
    assert equal == len(by_name) == 4 * (MATRICES + 3)


def same_start(rank: int, world: int, group: Any) -> str:
    """DeepSpeed copies rank 0's weights to all ranks before the optimizer takes its master weights."""
    torch.manual_seed(rank)
    model = network(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    engine = build(config(**DTYPES["bf16"]), None, model=model)
    advance(engine, 0, 2)
    return bits(engine)[0]


def test_ranks_that_start_differently_train_rank_zeros_weights(ds2: RankPool) -> None:
    first, second = ds2.run(2, same_start)
    assert first == second
