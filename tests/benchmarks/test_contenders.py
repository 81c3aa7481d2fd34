"""Who takes part, what is asked of them, and how it is shown; nothing is measured here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from distmuon.benchmarks import comm, flags, launch, memory, step, step_chart, stopwatch, targets
from distmuon.benchmarks.contenders import BALANCED, ENTRIES, OPT4, RIVAL, entrants
from distmuon.benchmarks.models import CASES, objective
from distmuon.benchmarks.optimizers import split
from distmuon.benchmarks.owner_gather import OwnerGather, newton_schulz
from distmuon.benchmarks.targets import Target

Captured = pytest.CaptureFixture[str]


def test_entrants() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 12
    assert {BALANCED, OPT4, RIVAL} <= set(names)
    dense, absent = entrants("dense")
    assert ([entry.name for entry in dense], absent) == (names, {})
    moe, absent = entrants("moe")
    assert list(absent) == ["DeepSpeed Muon ZeRO-3"]
    assert [entry.name for entry in moe] == [name for name in names if name not in absent]


@pytest.mark.parametrize("name", CASES)
def test_models(name: str) -> None:
    case = CASES[name]
    first, second = case.build(), case.build()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    matrices, rest = split(first)
    assert all(parameter.ndim == 2 for parameter in matrices)
    assert len(matrices) + len(rest) == len(list(first.parameters()))
    # DeepSpeed's Muon goes by names; both must agree on what is no hidden matrix.
    named = {id(p): n for n, p in first.named_parameters()}
    assert all("embed" in named[id(p)] or "lm_head" in named[id(p)] or p.ndim < 2 for p in rest)
    tokens = case.tokens(torch.Generator().manual_seed(0))
    assert tokens.shape == (1, case.positions + 1)
    if name == "dense":
        loss = objective(first, tokens)
        assert loss.item() == pytest.approx(torch.tensor(float(case.vocabulary)).log().item(), rel=0.05)


def test_the_owners_muon_is_that_of_torch() -> None:
    weights = [torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(16, 24))]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = OwnerGather(weights, lr=0.1, weight_decay=0.1, momentum=0.9, alone=True)
    torchs = torch.optim.Muon(copies, lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.clone()
        ours.step()
        torchs.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, atol=6e-3, rtol=0)
    sigma = torch.linalg.svdvals(newton_schulz(torch.randn(64, 16)).float())
    assert sigma.min() > 0.6
    assert sigma.max() < 1.3


def test_flags(capsys: Captured) -> None:
    parser = flags.parser("comm", "text", (2, 4))
    full = flags.read(parser, [])
    assert (full.worlds, full.models, full.full) == ([2, 4], ["dense", "moe"], True)
    quick = flags.read(parser, ["--quick"])
    assert (quick.worlds, quick.models, quick.full) == ([2], ["dense"], False)
    chosen = flags.read(parser, ["--worlds", "3", "--models", "moe,dense"])
    assert (chosen.worlds, chosen.models, chosen.full) == ([3], ["moe", "dense"], False)
    for words, named in (("--worlds 1", '"1" is not a whole number of 2 or more'), ("--models gpt", '"gpt" is not a')):
        with pytest.raises(SystemExit) as caught:
            flags.read(parser, words.split())
        assert caught.value.code == 2
        assert named in capsys.readouterr().err


def test_targets() -> None:
    (met,) = targets.worst("a", 0.6, [(0.3, "x"), (0.604, "y")])
    assert met == Target("a", "<= 0.60", "0.60", "y", met=True)
    (missed,) = targets.worst("a", 0.6, [(0.606, "y")])
    assert not missed.met
    assert targets.worst("a", 0.6, []) == targets.equal("b", []) == []
    (same,) = targets.equal("b", [(100, 100.4, "x"), (7e9, 7e9, "y")])
    assert same == Target("b", "equal", "2 of 2", "everywhere", met=True)
    (wrong,) = targets.equal("b", [(100, 100, "x"), (1000, 1002, "y")])
    assert wrong == Target("b", "equal", "1 of 2", "y: 1,002 for 1,000", met=False)
    lines = targets.table([met, wrong]).splitlines()
    assert lines[-2:] == ["| met | a | <= 0.60 | 0.60 | y |", "| MISSED | b | equal | 1 of 2 | y: 1,002 for 1,000 |"]


def comm_row(name: str, world: int, model: str = "moe", **changes: Any) -> dict[str, Any]:
    plan = {"transport": "scatter", "buckets": 2, "padding": 0, "wire_by_rank": [100.0] * world}
    row = {
        **{"name": name, "world": world, "model": model, "wire_bytes": 1e6 * world, "ratio": 1.0, "sent_ratio": 1.001},
        **{"calls": {"broadcast": 4, "allreduce": 1}, "own_calls": 5, "late_reductions": 0, "guard_bytes": 10},
        **{"wire_by_rank": [110.0] * world, "plan": plan if name.startswith("DistMuon") else None},
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, set()),
        ({"ratio": 1.002}, {"bytes of balanced / AdamW-ZeRO-1, ring model"}),
        ({"own_calls": 6}, {"collectives of balanced - (2 x buckets + 1)"}),
        ({"late_reductions": 1}, {"reductions of gradients inside step()"}),
        ({"wire_by_rank": [110.0, 113.0]}, {"bytes planned and measured, all ranks"}),
    ],
)
def test_targets_of_comm(changes: dict[str, Any], missed: set[str]) -> None:
    rows = [comm_row(BALANCED, 2, **changes), comm_row(BALANCED, 4), comm_row(RIVAL, 2, ratio=1.5, late_reductions=3)]
    judged = comm.judge(rows)
    assert len(judged) == 4
    assert {one.name for one in judged if not one.met} == missed


def test_bytes_are_shown_for_one_model_in_the_readme() -> None:
    rows = [comm_row(name, world) for world in (2, 4) for name in (BALANCED, RIVAL)]
    lines = comm.table(rows).splitlines()
    assert lines[0].startswith("| contender | ring bytes / AdamW-ZeRO-1 at 2, 4 ranks |")
    assert lines[2] == f"| {BALANCED} | 1.000, 1.000 | 1.001, 1.001 | 4.00 | 5: 1 allreduce, 4 broadcast |"
    assert lines[3] == f"| {RIVAL} | 1.000, 1.000 | 1.001, 1.001 | 4.00 | 1 allreduce, 4 broadcast |"
    readme = f"a\n{comm.MARKS[0]}old\n{comm.MARKS[1]}b\n"
    written = comm.with_table(readme, [*rows, comm_row("other", 2, model="dense")])
    assert written == f"a\n{comm.MARKS[0]}{comm.table(rows)}\n{comm.MARKS[1]}b\n"


def test_targets_and_table_of_memory() -> None:
    def row(name: str, flops: list[int], state: list[int], plan: list[Any]) -> dict[str, Any]:
        shown = {"ns_flops": flops, "ns_flops_once": 8 * 10**9, "state_bytes": state, "plan": plan}
        return {"world": 2, "model": "dense", "name": name, "elements": 10, **shown}

    plan = [{"ns_flops": 4e9, "state_bytes": 10}, {"ns_flops": 4e9, "state_bytes": 30}]
    good = row(BALANCED, [4 * 10**9] * 2, [10, 30], plan)
    assert all(one.met for one in memory.judge([good]))
    rival = row(RIVAL, [9 * 10**9] * 2, [10, 10], [None, None])
    bad = row(BALANCED, [5 * 10**9, 4 * 10**9], [10, 34], plan)
    assert not any(one.met for one in memory.judge([bad, rival]))
    assert memory.table([good]).splitlines()[-1] == f"| 2 | {BALANCED} | 0.00 | 1.50 | 4.00 | 1.00 | 1.00 |"
    assert memory.table([rival | {"ns_flops_once": 0}]).splitlines()[-1].endswith("| - | - | - |")


def test_the_model_alone_is_subtracted_round_by_round() -> None:
    cpu = {stopwatch.BARE: [1.0, 2.0, 1.0], RIVAL: [5.0, 6.0, 5.0], BALANCED: [3.0, 4.0, 2.0]}
    rows = stopwatch.summarize(cpu, {name: [7.0, 8.0, 9.0] for name in cpu})
    assert rows.keys() == {RIVAL, BALANCED}
    assert rows[BALANCED]["optimizer_cpu_ms"] == {"median": 2000.0, "low": 1500.0, "high": 2000.0}
    assert rows[BALANCED]["over_rival"] == {"median": 0.5, "low": 0.375, "high": 0.5}
    assert rows[BALANCED]["wall_ms"]["median"] == 8000.0
    assert rows[BALANCED]["model_cpu_ms"]["median"] == 1000.0


def step_row(name: str, median: float, model: str = "dense", world: int = 2) -> dict[str, Any]:
    spread = {"median": median, "low": median - 0.1, "high": median + 0.1}
    row: dict[str, Any] = {"world": world, "model": model, "name": name, "over_rival": spread, "wall_ms": spread}
    split = {"newton_schulz": 3.0, "waited": 4.0} if name.startswith("DistMuon") else {}
    return {**row, "optimizer_cpu_ms": spread, "step_cpu_ms": spread, "model_cpu_ms": spread, "phases_ms": split}


def test_targets_and_table_of_step() -> None:
    rows = [step_row(BALANCED, 0.55), step_row(OPT4, 0.5), step_row(RIVAL, 1.0), step_row(BALANCED, 0.9, world=4)]
    judged = step.judge([*rows, step_row(BALANCED, 0.65, "moe")])
    assert [(one.value, one.met) for one in judged] == [("0.55", True), ("0.65", False), ("0.50", False)]
    shown = step.table(rows).splitlines()
    assert shown[2].startswith(f"| 2 | {BALANCED} | 0.6 |") or shown[2].startswith(f"| 2 | {BALANCED} | 0.5 |")
    assert shown[2].endswith("| 3.0 | 4.0 | 0.6 |") or shown[2].endswith("| 3.0 | 4.0 | 0.5 |")
    assert "| - | - |" in shown[4]


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    rows = [step_row(name, 1.0, model) for model in CASES for name in (BALANCED, RIVAL)]
    figure = step_chart.draw_step(rows)
    labels = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
    assert (len(figure.axes), labels) == (len(CASES), [BALANCED, RIVAL])
    counted = [comm_row(name, world) for world in (2, 4, 8) for name in (BALANCED, RIVAL)]
    figure = step_chart.draw_comm([*counted, *(comm_row(BALANCED, world, "dense") for world in (2, 4, 8))])
    assert len(figure.axes[0].patches) == 2 * 3


def test_ranks_that_leave_nothing_behind_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "own_loopback", lambda: ["false"])
    with pytest.raises(RuntimeError, match="ended with status 1 and no result"):
        launch.launch("account", 2, [])


def test_a_loopback_device_of_its_own_is_used_where_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert launch.own_loopback() == []
