"""A rank stops, or is elsewhere: every other rank raises after the group's own timeout, and says where and who."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from distmuon.failures import group_timeout
from tests.distributed.scenario import Case, optimizer, parameters
from tests.faults.launch import run_ranks
from tests.faults.lost import POINTS, check, lose
from tests.faults.test_death import free_port

TIMEOUT = 2.0


def lose_silently(world: int, figure: Callable[[str], None], **how: Any) -> None:
    at, endings = lose(world, TIMEOUT, **how)
    check(endings, how["rank"], how["step"], how["point"])
    others = [ending for rank, ending in enumerate(endings) if rank != how["rank"]]
    assert all(how["rank"] in ending.verdict["silent"] for ending in others), others
    assert not any(ending.verdict["gone"] for ending in others), others
    # On a busy machine a rank may speak too late for another.
    said = min(others, key=lambda ending: len(ending.verdict["silent"])).verdict
    assert said["silent"] == [how["rank"]]
    assert f"no word from rank {how['rank']};" in said["text"]
    after = max(ending.verdict["at"] - max(at, ending.verdict["there_at"]) for ending in others) - TIMEOUT
    figure(
        f"{how['action']} {how['point']} at {world} ranks: every other rank raised, naming bucket or phase and the "
        f"rank, at most {after:.2f} s after the timeout of {TIMEOUT:.0f} s"
    )
    assert after <= 1.0


@pytest.mark.fault("F3")
@pytest.mark.parametrize(
    ("world", "action", "point"),
    [
        *[(4, "freeze", point) for point in ("before reduce", "in gather")],
        *[(2, "freeze", point) for point in ("after reduce", "in Newton-Schulz")],
        *[(4, "skip", point) for point in ("after reduce", "in Newton-Schulz")],
        *[(2, "skip", point) for point in ("before reduce", "in gather")],
    ],
)
def test_others_raise_after_the_timeout(world: int, action: str, point: str, figure: Callable[[str], None]) -> None:
    lose_silently(world, figure, action=action, point=point, rank=1, step=1, policy="flat")


@pytest.mark.soak
@pytest.mark.fault("F3")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", ["balanced", "flat", "team"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("action", ["freeze", "skip"])
def test_others_raise_wherever_it_hangs(action: str, point: str, policy: str, figure: Callable[[str], None]) -> None:
    for world, rank in ((2, 0), (4, 0), (4, 3)):
        lose_silently(world, figure, action=action, point=point, rank=rank, step=2, policy=policy)


@pytest.mark.fault("F3")
def test_a_store_whose_host_stopped_is_not_waited_for(figure: Callable[[str], None]) -> None:
    how: dict[str, Any] = {"action": "freeze", "point": "in gather", "rank": 0, "step": 1, "policy": "flat"}
    lose_silently(2, figure, **how, port=free_port())


def timeouts(rank: int, world: int, group: Any) -> list[float]:
    """Timeouts in seconds of the given group and of the optimizer's own."""
    opt = optimizer(parameters(), Case())
    own = opt.group.process_group
    assert own is not None
    assert own is not group
    found = [group_timeout(group), group_timeout(own)]
    return [limit.total_seconds() for limit in found if isinstance(limit, timedelta)]


def test_own_group_has_the_timeout_of_the_given_one() -> None:
    assert [ending.verdict for ending in run_ranks(2, timeouts, group_timeout=7.0)] == [[7.0, 7.0]] * 2
