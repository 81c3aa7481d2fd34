"""Seconds of a collective, computed by hand."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from distmuon.errors import ConfigError
from distmuon.link import Collective, Link, collective_seconds

LINK = Link(bandwidth=100.0, latency=0.5, overhead=2.0)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        # 400 bytes over 4 ranks: 3 hops of 0.5 s, 300 bytes at 100 B/s, 2 s of overhead.
        ("reduce_scatter", 2 + 1.5 + 3),
        ("all_gather", 2 + 1.5 + 3),
        ("all_to_all", 2 + 1.5 + 3),
        ("all_reduce", 2 + 2 * (1.5 + 3)),
        # Every byte passes a rank that owns none.
        ("owner_reduce", 2 + 1.5 + 4),
        ("owner_broadcast", 2 + 1.5 + 4),
    ],
)
def test_one_node(kind: Any, seconds: float) -> None:
    assert collective_seconds(kind, 400, 4, LINK) == pytest.approx(seconds)


def test_owners_of_equal_pieces_take_as_long_as_a_ring() -> None:
    ring = collective_seconds("reduce_scatter", 400, 4, LINK)
    assert collective_seconds("owner_reduce", 400, 4, LINK, least=100) == pytest.approx(ring)


def test_nodes() -> None:
    link = Link(bandwidth=100.0, latency=0.5, ranks_per_node=4, inter_bandwidth=10.0, inter_latency=3.0)
    # 8 ranks on 2 nodes: 7 hops, one of them between nodes; 4 ports of 10 B/s are slower than 100 B/s within.
    assert collective_seconds("all_gather", 800, 8, link) == pytest.approx(6 * 0.5 + 3 + 700 / 40)
    # Of 800 bytes, 300 stay within the node and 400 leave it through the rank's own port.
    assert collective_seconds("all_to_all", 800, 8, link) == pytest.approx(6 * 0.5 + 3 + 400 / 10)
    wide = Link(bandwidth=10.0, ranks_per_node=4, inter_bandwidth=1000.0)
    assert collective_seconds("all_to_all", 800, 8, wide) == pytest.approx(300 / 10)
    # One node: no port.
    assert collective_seconds("all_gather", 800, 4, link) == pytest.approx(3 * 0.5 + 600 / 100)


def test_fast_ports_leave_the_node_as_the_bottleneck() -> None:
    link = Link(bandwidth=100.0, ranks_per_node=4, inter_bandwidth=80.0)
    assert collective_seconds("all_gather", 800, 8, link) == pytest.approx(700 / 100)


def test_what_leaves_a_node() -> None:
    link = Link(bandwidth=1.0, ranks_per_node=4)
    assert link.inter_share(12, "all_gather") == 3 / 12
    assert link.inter_share(8, "all_to_all") == 4 / 7
    assert link.inter_share(4, "all_to_all") == link.inter_share(1, "all_gather") == 0


@pytest.mark.parametrize("kind", get_args(Collective))
def test_more_bytes_ranks_or_latency_never_help(kind: Any) -> None:
    link = Link(100.0, 0.1, 1.0, 4, 10.0, 0.3)
    base = collective_seconds(kind, 1000, 8, link)
    assert collective_seconds(kind, 2000, 8, link) > base
    assert collective_seconds(kind, 1000, 16, link) > base
    for slower in (
        Link(100.0, 0.2, 1.0, 4, 10.0, 0.3),
        Link(100.0, 0.1, 1.0, 4, 5.0, 0.3),
        Link(100.0, 0.1, 2.0, 4, 10.0, 0.3),
    ):
        assert collective_seconds(kind, 1000, 8, slower) > base
    assert collective_seconds(kind, 1000, 1, link) == 0


def test_unknown_collectives_are_named() -> None:
    with pytest.raises(ConfigError, match="reduce_scatter, all_gather"):
        collective_seconds("gather", 1, 2, LINK)  # type: ignore[arg-type]
