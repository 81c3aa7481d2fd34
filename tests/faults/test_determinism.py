"""Two runs are equal to the bit, and so are their plans, whatever the hash seed of the process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.distributed.scenario import Case, advance, digest, gradients, optimizer, parameters
from tests.ranks import run_threads

REPO = Path(__file__).resolve().parents[2]
WORLDS = {1: "balanced", 2: "team", 4: "flat"}
"""With the policy that is trained."""
POLICIES = ("balanced", "flat", "team")
STEPS = 100


def train(rank: int, world: int, case: Case) -> tuple[str, list[str]]:
    """Hash over all parameters after every step and the state at the end; digests of the plans."""
    params = parameters(case.torch_dtype)
    opt = optimizer(params, case)
    sha = hashlib.sha256()
    for step in range(case.steps):
        advance(params, opt, [gradients(case, step, 0, rank, world)])
        opt.step()
        opt.zero_grad()
        sha.update(digest(params).encode())
    sha.update(digest(opt.state_dict()).encode())
    return sha.hexdigest(), [plan.digest for plan in opt.plans]


def everything() -> dict[str, list[tuple[str, list[str]]]]:
    """The runs of one process by policy and number of ranks; one policy each is trained, all are planned."""
    found = {}
    for world, trained in WORLDS.items():
        for policy in POLICIES if world > 1 else (trained,):
            steps = STEPS if policy == trained else 0
            case = Case(policy=policy, ns="bfloat16", clip=1.0, bucket_mb=0.004, steps=steps)
            found[f"{policy}, {world}"] = run_threads(world, train, case)
    return found


def start(seed: int) -> subprocess.Popen[str]:
    """A process of its own with this hash seed, which prints ``everything``."""
    code = "from tests.faults.test_determinism import everything; print(everything())"
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)


def check(seeds: Sequence[int], figure: Callable[[str], None]) -> None:
    children = [start(seed) for seed in seeds]
    own = everything()
    others = [child.communicate(timeout=500)[0].strip() for child in children]
    equal = sum(other == str(own) for other in others)
    plans = {digest for ranks in own.values() for _, digests in ranks for digest in digests}
    figure(
        f"{equal} of {len(others)} processes of other hash seeds equal this one bit for bit: {STEPS} steps on each of "
        f"{', '.join(map(str, WORLDS))} ranks, {len(plans)} plans"
    )
    assert equal == len(others)
    assert len(plans) == len(own)


@pytest.mark.fault("F19")
def test_hash_seeds_change_nothing(figure: Callable[[str], None]) -> None:
    check((0, 1), figure)


@pytest.mark.fault("F19")
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_more_hash_seeds_change_nothing(figure: Callable[[str], None]) -> None:
    check((0, 1, 2, 3, 4), figure)


def test_the_digests_tell_runs_apart() -> None:
    """What makes the test able to fail."""
    one, other = (run_threads(2, train, Case(steps=2, lr=lr))[0] for lr in (0.1, 0.1 + 1e-8))
    assert one[0] != other[0]
    assert one[1] == other[1]
