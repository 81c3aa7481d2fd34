"""Finds the hot loop of a program from its jumps alone."""

from __future__ import annotations

from collections.abc import Sequence

import networkx


def hot_loop(successors: Sequence[Sequence[int]], work: Sequence[int]) -> list[int]:
    """Find the innermost loop that does the most work.

    Addresses alone mislead: compilers put rarely run code, such as waiting, behind the end and jump back from there.

    Args:
        successors: for each instruction the numbers of those that may run next; the program starts at the first.
        work: for each instruction what it counts.

    Returns:
        Numbers of the loop's instructions, in order; empty if no loop does any work.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(successors)))
    graph.add_edges_from((i, j) for i, targets in enumerate(successors) for j in targets if j < len(successors))
    if not graph:
        return []
    above: dict[int, int | None] = {**networkx.immediate_dominators(graph, 0), 0: None}
    loops: dict[int, set[int]] = {}
    for last, first in graph.edges:
        if last in above and dominates(first, last, above):
            inside = graph.subgraph(set(graph) - {first})
            before = networkx.ancestors(inside, last) if last != first else set()
            loops.setdefault(first, set()).update(before, {first, last})
    working = [loop for loop in loops.values() if any(work[i] for i in loop)]
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    return sorted(max(innermost, key=lambda loop: sum(work[i] for i in loop), default=set()))


def dominates(first: int, last: int, above: dict[int, int | None]) -> bool:
    """Whether every way from the start to ``last`` passes ``first``."""
    at: int | None = last
    while at is not None and at != first:
        at = above[at]
    return at == first
