"""What the contenders of the link benchmark send in a step, said before it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmuon.benchmarks.contenders import ADAMW, BALANCED, ENTRIES, RIVAL, Entry
from distmuon.benchmarks.links_model import Call, Listed
from distmuon.benchmarks.loops import Contender, Replicated
from distmuon.plan import Plan

NAMES = (BALANCED, ADAMW, "DeepSpeed AdamW ZeRO-1", RIVAL, "DDP, torch AdamW")


def entries() -> list[Entry]:
    """List those who take part.

    Returns:
        The entries, in the order of the table.
    """
    by_name = {entry.name: entry for entry in ENTRIES}
    return [by_name[name] for name in NAMES]


def sends(contender: Contender) -> Sequence[Plan] | Listed:
    """Say what a contender sends; parameters and gradients are float32.

    Args:
        contender: one of those who take part, at least two steps old.

    Returns:
        Its plans, or else its collectives.
    """
    if contender.dist_muon is not None:
        plans: Sequence[Plan] = contender.dist_muon.plans
        return plans
    if isinstance(contender, Replicated):
        # The last bucket holds the first parameters of the model, whose gradients end backward.
        wrapped: Any = contender.wrapped
        buckets = wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
        calls = tuple(Call("all_reduce", float(size)) for size in buckets)
        return Listed(early=calls[:-1], late=calls[-1:])
    # At stage 1 DeepSpeed reduces when backward has ended (overlap_comm is off), and all of it on every rank.
    whole = float(sum(parameter.nbytes for parameter in contender.parameters().values()))
    return Listed(early=(), late=(Call("all_reduce", whole), Call("all_gather", whole)))
