"""What a failed collective says: where it was launched, and by what it was caused."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from distmuon.clock import PhaseClock, Place
from distmuon.errors import CollectiveError, DistMuonError
from distmuon.exchange import Exchange
from distmuon.failures import Failures, _name, group_timeout
from distmuon.pending import NamedWork, Pending
from tests.ranks import run_threads

GLOO = "[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:42. This is typically\nmore"


class FailingWork:
    """A work that failed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError(self.text)


def test_places_are_those_of_the_innermost_phase() -> None:
    clock = PhaseClock()
    clock.step = 7
    assert clock.place == Place(7, "agreement", None)
    with clock("gather", bucket=3):
        assert clock.place == Place(7, "gather", 3)
        with clock("newton_schulz"):
            assert clock.place == Place(7, "newton_schulz", None)
        assert clock.place == Place(7, "gather", 3)
        with pytest.raises(ZeroDivisionError), clock("complete", bucket=0):
            1 / 0  # noqa: B018
        assert str(clock.place) == 'step 7, phase "gather", bucket 3'
    assert str(clock.place) == 'step 7, phase "agreement"'


def explain(text: str) -> list[CollectiveError]:
    """The error of every rank of three, none of which reaches another."""

    def body(rank: int, world: int) -> CollectiveError:
        failures = Failures()
        failures.groups.append(None)
        return failures.explain(Place(2, "reduce", 0), "reduce_scatter", (0, 1, 2), RuntimeError(text))

    return run_threads(3, body)


def test_what_it_says() -> None:
    for error in explain(GLOO):
        assert str(error) == (
            'step 2, phase "reduce", bucket 0: reduce_scatter of 3 ranks failed: all ranks noticed; '
            "Connection closed by peer [127.0.0.1]:42; restart all ranks from the last checkpoint."
        )
        assert (error.gone, error.silent) == ((), ())


def test_ranks_that_say_nothing_are_named() -> None:
    def body(rank: int, world: int) -> CollectiveError | None:
        failures = Failures()
        failures.groups.append(None)
        if rank == 1:
            return None
        begun = time.monotonic()
        error = failures.explain(Place(0, "guard", None), "all_reduce", (0, 1, 2), RuntimeError("Timed out waiting"))
        first, begun = time.monotonic() - begun, time.monotonic()
        again = failures.explain(Place(0, "guard", None), "all_reduce", (0, 1, 2), RuntimeError("closed"))
        assert (again.gone, again.silent) == (error.gone, error.silent)
        assert time.monotonic() - begun < 0.1 < 0.4 < first < 1.0, "they are listened for once"
        return error

    first, none, third = run_threads(3, body)
    assert none is None
    for error in (first, third):
        assert 'step 0, phase "guard": all_reduce' in str(error)
        assert "no word from rank 1; Timed out waiting;" in str(error)
        assert (error.gone, error.silent) == ((), (1,))


def test_long_lists_of_ranks_are_cut() -> None:
    assert _name([7]) == "rank 7 is"
    assert _name([1, 2], verb=False) == "ranks 1, 2"
    assert _name(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more are"


def test_an_error_of_a_collective_is_no_error_of_the_user() -> None:
    """Whoever catches a DistMuonError tells the other ranks, which cannot be reached then."""
    assert not issubclass(CollectiveError, (ValueError, DistMuonError))
    assert issubclass(CollectiveError, RuntimeError)


def test_a_failure_is_explained_each_time_it_is_waited_for() -> None:
    seen: list[str] = []

    def say(error: Exception) -> CollectiveError:
        seen.append(str(error))
        return CollectiveError("explained", gone=[1])

    flight: Any = PhaseClock().collective("all_gather", FailingWork("torn"))
    pending = Pending(torch.zeros(1), NamedWork(flight, say))
    for count in (1, 2):
        with pytest.raises(CollectiveError, match="explained") as caught:
            pending.wait()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert seen == ["torn"] * count


class SlowWork:
    """A work that takes its time, and notes how much it was given."""

    def __init__(self, given: list[float]) -> None:
        self.given = given

    def wait(self, *limit: timedelta) -> None:
        self.given.extend(part.total_seconds() for part in limit)
        time.sleep(0.1)


def test_all_messages_of_an_exchange_share_one_deadline() -> None:
    given: list[float] = []
    Exchange([SlowWork(given) for _ in range(4)], timedelta(seconds=0.25)).wait()
    assert given[0] == pytest.approx(0.25, abs=0.05)
    assert given[1] == pytest.approx(0.15, abs=0.05)
    assert given[3] == pytest.approx(0.001)
    Exchange([SlowWork(unlimited := [])]).wait()
    assert unlimited == []


def test_a_backend_without_a_timeout_has_none() -> None:
    assert run_threads(2, lambda rank, world: group_timeout(None)) == [None, None]
