"""Contenders on two ranks: what is verified, and what is counted, on a small model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.benchmarks.contenders import ADAMW, BALANCED, ENTRIES, OPT4, RIVAL
from distmuon.benchmarks.models import Case, DenseGPT
from tests.ranks import RankPool

pytest.importorskip("deepspeed")
TINY = Case("tiny", "tiny", 64, 16, lambda: DenseGPT(32, 2, 2, 64))
BY_NAME = {entry.name: entry for entry in ENTRIES}
DDP = "DDP, torch Muon"
OWNERS = "DDP, Muon by owners"
NAMES = (BALANCED, "DistMuon flat", "DistMuon team", OPT4, ADAMW, "DeepSpeed AdamW ZeRO-1", DDP, OWNERS, RIVAL)
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    shared = RankPool(2)
    yield shared
    shared.close()


def prepare(rank: int, world: int) -> list[Tensor]:
    """Become a rank of DeepSpeed's, and draw micro-batches."""
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world))
    from distmuon.benchmarks import launch

    launch.join()
    generator = torch.Generator().manual_seed(rank)
    return [TINY.tokens(generator) for _ in range(2)]


def account(rank: int, world: int, group: dist.ProcessGroup, names: tuple[str, ...]) -> Rows:
    tokens = prepare(rank, world)
    from distmuon.benchmarks.account import PARTS
    from distmuon.benchmarks.verify import Judge, run

    judge, parts = Judge(TINY, tokens), {part: make(TINY, tokens) for part, make in PARTS.items()}
    rows = {}
    for name in names:
        contender = BY_NAME[name].build(TINY.build())
        run(contender, tokens)
        found = contender.parameters()
        rows[name] = {"error": judge.verify(BY_NAME[name], found)}
        rows[name] |= {part: count(BY_NAME[name], contender, found) for part, count in parts.items()}
    return rows


@pytest.fixture(scope="module")
def rows(ranks: RankPool) -> Rows:
    first, second = ranks.run(2, account, NAMES, timeout=100)
    assert first.keys() == second.keys()
    return first


def test_everybody_agrees_with_one_process(rows: Rows) -> None:
    for name in (BALANCED, "DistMuon flat", "DistMuon team", OPT4, ADAMW):
        assert rows[name]["error"] == 0
    for name in NAMES:
        assert rows[name]["error"] <= BY_NAME[name].tolerance


def test_bytes(rows: Rows) -> None:
    elements = sum(parameter.numel() for parameter in TINY.build().parameters())
    ideal = 2 * 4 * elements / 2
    for name in (BALANCED, OPT4, ADAMW):
        comm = rows[name]["comm"]
        guard = comm["guard_bytes"]
        assert 0 < guard < 100
        assert comm["wire_by_rank"] == [ideal + guard, ideal + guard]
        assert comm["plan"]["wire_by_rank"] == [ideal, ideal]
        assert (comm["own_calls"], comm["late_reductions"]) == (2 * comm["plan"]["buckets"] + 1, 0)
    assert rows["DeepSpeed AdamW ZeRO-1"]["comm"]["ratio"] == pytest.approx(1.5, abs=1e-3)
    assert rows[RIVAL]["comm"]["ratio"] == pytest.approx(1.5, abs=1e-3)
    assert rows[DDP]["comm"]["ratio"] == 1.0
    assert 1.2 < rows[OWNERS]["comm"]["ratio"] < 1.5
    for name in NAMES:
        assert (rows[name]["comm"]["plan"] is not None) == (name not in (DDP, OWNERS, RIVAL, "DeepSpeed AdamW ZeRO-1"))


def test_flops_and_state(rows: Rows) -> None:
    matrices, _ = split_sizes()
    for name in (BALANCED, "DistMuon flat", "DistMuon team", OPT4):
        memory = rows[name]["memory"]
        assert memory["ns_flops"] == [plan["ns_flops"] for plan in memory["plan"]]
        assert memory["state_bytes"] == [plan["state_bytes"] for plan in memory["plan"]]
    assert sum(rows[BALANCED]["memory"]["ns_flops"]) == rows[BALANCED]["memory"]["ns_flops_once"] > 0
    for name in (DDP, OWNERS):
        once = rows[name]["memory"]["ns_flops_once"]
        assert sum(rows[name]["memory"]["ns_flops"]) == (2 if name == DDP else 1) * once > 0
    # Newton-Schulz runs again on the rank that has the other part of a matrix.
    assert sum(rows[RIVAL]["memory"]["ns_flops"]) >= rows[RIVAL]["memory"]["ns_flops_once"]
    assert rows[ADAMW]["memory"]["ns_flops"] == [0, 0]
    elements = rows[DDP]["memory"]["elements"]
    # AdamW counts its steps in a tensor of a parameter each.
    rest = elements - matrices
    assert 0 <= rows[DDP]["memory"]["state_bytes"][0] - 4 * (matrices + 2 * rest) < 200
    assert sum(rows[BALANCED]["memory"]["state_bytes"]) == 4 * (matrices + 2 * rest)
    assert sum(rows["DeepSpeed AdamW ZeRO-1"]["memory"]["state_bytes"]) >= 4 * 3 * elements


def split_sizes() -> tuple[int, int]:
    from distmuon.benchmarks.optimizers import split

    muon, rest = split(TINY.build())
    return sum(parameter.numel() for parameter in muon), sum(parameter.numel() for parameter in rest)


class Broken:
    """A contender of one's own that goes wrong."""

    def __init__(self, model: nn.Module, how: str) -> None:
        from distmuon.benchmarks.loops import Replicated
        from distmuon.benchmarks.optimizers import torch_muon

        self.inner, self.how = Replicated(model, torch_muon), how

    def parameters(self) -> dict[str, Tensor]:
        found = self.inner.parameters()
        name = "blocks.1.up.weight"
        if self.how == "differs" and dist.get_rank() == 1:
            found[name][0, 0] += 1e-3
        elif self.how == "stays":
            found[name] = dict(TINY.build().named_parameters())[name].detach()
        elif self.how == "is wrong":
            found[name] += 1e-2
        elif self.how == "is no number":
            found[name][0, 0] = torch.nan
        return found


def complain(rank: int, world: int, group: dist.ProcessGroup, how: str) -> str:
    tokens = prepare(rank, world)
    from distmuon.benchmarks.verify import Judge, WrongResultError, run

    broken = Broken(TINY.build(), how)
    run(broken.inner, tokens)
    try:
        Judge(TINY, tokens).verify(replace(BY_NAME[DDP], name="X"), broken.parameters())
    except WrongResultError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("differs", "X: the ranks hold different parameters."),
        ("stays", 'X: "blocks.1.up.weight" did not change.'),
        ("is wrong", 'X: the update of "blocks.1.up.weight" is off by'),
        ("is no number", 'X: the update of "blocks.1.up.weight" is off by nan'),
        ("is right", ""),
    ],
)
def test_wrong_results_do_not_count(ranks: RankPool, how: str, said: str) -> None:
    for text in ranks.run(2, complain, how, timeout=100):
        assert text.startswith(said)
        assert bool(text) == bool(said)
