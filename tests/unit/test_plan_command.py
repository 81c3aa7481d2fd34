"""``distmuon plan``: its figures are the plans' own, every flag counts, and mistakes are named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmuon.bricks import ParamSpec
from distmuon.errors import ConfigError
from distmuon.machine import Machine, Workload
from distmuon.ns_settings import NewtonSchulz
from distmuon.planner import make_plan
from distmuon.planning.command import plan_text
from distmuon.planning.layouts import CHOICES
from distmuon.planning.outcome import Request, plan_world
from distmuon.planning.parameters import PlannedParam
from tests.unit.plan_requests import CONFIGS, request, specs_of

DEBUG = ["--model", str(CONFIGS / "models" / "debug.toml"), "--vocab", "64"]
NS = NewtonSchulz()


def run(*flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan_text([*DEBUG, "--json", *flags]))
    return found


def only(*flags: str) -> dict[str, Any]:
    (world,) = run(*flags)["worlds"]
    found: dict[str, Any] = world
    return found


def layout(world: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [row for row in world["layouts"] if row["layout"] == name]
    return dict(found)


@pytest.mark.parametrize("policy", ["balanced", "flat", "team"])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_figures_are_those_of_the_plan(policy: Any, world: int) -> None:
    asked = request(world=world, policy=policy)
    plan = make_plan(specs_of(asked), world, policy, asked.bucket_numel)
    outcome = plan_world(asked)
    row, held = outcome.row, outcome.held
    every = range(world)
    assert [held.flops[rank] for rank in every] == pytest.approx([plan.newton_schulz_flops(rank) for rank in every])
    assert list(held.state_bytes(4)) == [plan.state_bytes(rank, 4) for rank in every]
    assert list(held.state_bytes(2)) == [plan.state_bytes(rank, 2) for rank in every]
    assert sum(part.sum() for part in held.by_part.values()) == plan.numel
    assert row.padding == plan.padding / plan.numel
    assert row.newton_schulz_sum_over_once == pytest.approx(held.flops.sum() / plan.flops_once)
    assert (row.reduce_bytes, row.gather_bytes) == (plan.shard_bytes(4), plan.shard_bytes(4))
    pieces = sum(plan.completion_bytes(rank, 2) + plan.team_bytes(rank, 2) for rank in every) / world
    assert row.complete_bytes == pytest.approx(pieces, abs=1)
    assert row.buckets == len(plan.buckets)
    assert row.largest_bucket_bytes == 4 * max(bucket.numel for bucket in plan.buckets)
    assert (row.calls == 0) is (world == 1)
    if policy != "team" and world > 1:
        with_cuts = sum(any(matrix.cut for matrix in bucket.matrices) for bucket in plan.buckets)
        assert row.calls == 2 * row.buckets + 1 + with_cuts
        assert bool(with_cuts) is (policy == "flat")


@pytest.mark.parametrize(("model", "world", "ep"), [("moe_mini", 2, 1), ("moe_mini", 8, 4), ("moe_79m", 16, 8)])
def test_auto_chooses_what_make_plan_does(model: str, world: int, ep: int) -> None:
    asked = request(model, world, ep)
    groups = (
        [(specs_of(asked), world)]
        if ep == 1
        else [(specs_of(asked, False), world), (specs_of(asked, True), world // ep)]
    )
    chosen = {make_plan(specs, size, "balanced", asked.bucket_numel).transport for specs, size in groups}
    assert plan_world(asked).chosen == (chosen.pop() if len(chosen) == 1 else "mixed")


def test_expert_parallel_ranks_hold_what_their_place_in_both_groups_says() -> None:
    asked = request(world=6, ep=2, policy="flat", bucket_mb=3.0)
    dense, experts = (
        make_plan(specs_of(asked, expert), size, "flat", asked.bucket_numel) for expert, size in ((False, 6), (True, 3))
    )
    held = plan_world(asked).held
    # Neighbours share the experts of a block, so rank g is number g // 2 of its expert-data-parallel group.
    expected = [dense.newton_schulz_flops(g) + experts.newton_schulz_flops(g // 2) for g in range(6)]
    assert held.flops == pytest.approx(expected)
    assert len({experts.newton_schulz_flops(rank) for rank in range(3)}) > 1
    assert held.by_part["expert"].sum() == sum(spec.numel for spec in specs_of(request(), True))


def test_every_matrix_is_computed_once_whatever_the_groups() -> None:
    outcome = plan_world(request(world=8, ep=4, transport="owner"))
    assert outcome.row.newton_schulz_sum_over_once == pytest.approx(1)


def test_json_is_complete() -> None:
    found = run("--world", "2,4", "--table", "all")
    assert set(found) == {"format", "model", "parameters", "routing", "worlds"}
    assert (found["format"], found["model"]) == ("distmuon-plan-1", "debug")
    assert found["parameters"] == sum(line["elements"] for line in found["routing"])
    assert [world["world"] for world in found["worlds"]] == [2, 4]
    world = found["worlds"][0]
    assert set(world) == {
        *("world", "ep", "bucket_mb", "policy", "transport", "ns_preset", "machine", "workload", "chosen", "layouts"),
        *("parameters", "ranks"),
    }
    assert [row["layout"] for row in world["layouts"]] == ["adamw", "flat", "scatter", "owner", "team", "padded"]
    assert set(layout(world, "adamw")["prediction"]) == {
        *("forward", "backward", "reduce", "exposed_reduce", "guard", "complete", "newton_schulz", "update"),
        *("gather", "exposed_gather", "peak_buffer_bytes", "inter_node_bytes", "intra_node_bytes", "optimizer", "step"),
    }
    assert world["parameters"][0] == {
        "parameter": "embedding.weight",
        "shape": "64x32",
        "rule": "adamw",
        "reason": "embedding",
    }
    assert [rank["rank"] for rank in world["ranks"]] == [0, 1]
    assert np.mean([rank["relative_to_mean"] for rank in world["ranks"]]) == pytest.approx(1.0, abs=1e-5)
    assert "parameters" not in only("--world", "2")
    assert "ranks" not in only("--world", "2", "--table", "routing")


class TestFlags:
    def test_bytes(self) -> None:
        base = layout(only("--world", "4"), "owner")
        wide = layout(only("--world", "4", "--dtype", "fp32", "--reduce-dtype", "bf16"), "owner")
        assert wide["reduce_bytes"] == base["reduce_bytes"] / 2
        assert wide["gather_bytes"] == base["gather_bytes"] * 2
        assert wide["state_bytes"]["mean"] < base["state_bytes"]["mean"]
        assert base["bytes"] == base["reduce_bytes"] + base["gather_bytes"]

    def test_placement(self) -> None:
        assert only("--world", "4", "--policy", "flat")["chosen"] == "flat"
        assert only("--world", "4", "--policy", "team")["chosen"] == "team"
        assert only("--world", "4", "--transport", "scatter")["chosen"] == "scatter"
        assert only("--world", "4", "--transport", "owner")["chosen"] == "owner"
        small = only("--world", "4", "--bucket-mb", "0.01")
        assert small["bucket_mb"] == 0.01
        assert layout(small, "flat")["buckets"] > layout(only("--world", "4"), "flat")["buckets"] == 1
        assert [w["bucket_mb"] for w in run("--world", "2,64")["worlds"]] == [25, 256]
        assert only("--world", "4", "--ep", "2")["ep"] == 2
        assert run("--world", "4", "--ep", "2")["parameters"] == run("--world", "4")["parameters"]

    def test_machine(self) -> None:
        base = only("--world", "16")
        assert only("--world", "16", "--nodes", "8")["machine"]["ranks_per_node"] == 2
        assert only("--world", "16", "--ranks-per-node", "16")["machine"]["ranks_per_node"] == 16
        slow = only("--world", "16", "--machine", str(CONFIGS / "machines" / "cpu_gloo.toml"))
        assert slow["machine"]["reduce_scatter"] == "all_to_all"
        for row, slower in zip(base["layouts"], slow["layouts"], strict=True):
            assert slower["prediction"]["step"] > row["prediction"]["step"]

    def test_workload(self) -> None:
        base = layout(only("--world", "4"), "owner")
        many = layout(only("--world", "4", "--tokens-per-rank", "16384"), "owner")
        assert many["prediction"]["forward"] == pytest.approx(2 * base["prediction"]["forward"])
        hidden = layout(only("--world", "4", "--overlap-forward"), "owner")
        assert hidden["prediction"]["exposed_gather"] <= base["prediction"]["exposed_gather"] * (1 + 1e-9)
        assert only("--world", "4", "--overlap-forward")["workload"]["overlap_forward"] is True

    def test_newton_schulz_and_routing(self) -> None:
        base, exact = (
            only("--world", "2", "--table", "all"),
            only("--world", "2", "--table", "all", "--ns-preset", "opt6"),
        )
        assert exact["ns_preset"] == "opt6"
        assert exact["ranks"][0]["newton_schulz_flops"] > base["ranks"][0]["newton_schulz_flops"]
        routed = only("--world", "2", "--table", "routing", "--router", "adamw")["parameters"]
        assert {line["rule"] for line in routed if line["reason"] == "router"} == {"adamw"}

    def test_plot(self, tmp_path: Path) -> None:
        for world in ("3", "66"):
            path = tmp_path / "made" / f"{world}.png"
            assert str(path) in plan_text([*DEBUG, "--world", world, "--plot", str(path)])
            assert struct.unpack(">II", path.read_bytes()[16:24]) == (1350, 930)

    @pytest.mark.parametrize("path", ["plan", "plan.xyz", "{file}/plan.png"])
    def test_a_picture_that_cannot_be_written_is_refused_before_planning(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        given = path.format(file=tmp_path / "file")
        with pytest.raises(ConfigError) as caught:
            plan_text([*DEBUG, "--world", "nonsense", "--plot", given])
        assert str(caught.value).startswith(f"--plot {given} ")

    def test_text(self) -> None:
        text = plan_text([*DEBUG, "--world", "2", "--table", "all"])
        assert "debug: 45,472 parameters" in text
        assert "blocks.*.attention.q.weight" in text
        assert "blocks.1.attention.q.weight" in text
        (titles,) = [line for line in text.splitlines() if "AdamW" in line and "padded" in line]
        assert titles.split() == ["AdamW", "flat", "scatter*", "owner", "team", "padded"]
        (ratio,) = [line for line in text.splitlines() if "bytes / AdamW" in line]
        assert ratio.split()[3] == ratio.split()[5] == "1.000"
        assert "relative_to_mean" in text
        for choice in ("adamw", "team", "padded"):
            assert CHOICES[choice].what in text
        assert "blocks.1.attention.q.weight" not in plan_text([*DEBUG, "--world", "2"])

    def test_help_describes_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            plan_text(["--help"])
        assert stopped.value.code == 0
        assert "--tokens-per-rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--world", "x"], "--world 'x'"),
        (["--world", "4,0"], "--world '4,0'"),
        (["--world", "6", "--ep", "4"], "use one of 1, 2"),
        (["--world", "4", "--ep", "0"], "--ep 0 does not divide"),
        (["--world", "6", "--ep", "3"], "use one of 1, 2, 4"),
        (["--world", "6", "--nodes", "4"], "--nodes 4"),
        (["--world", "4", "--policy", "flat", "--transport", "owner"], "does not go with"),
        (["--world", "4", "--machine", "none.toml"], "none.toml does not exist"),
    ],
)
def test_mistakes_are_named(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_text([*DEBUG, *flags])


@pytest.mark.parametrize(
    "flag", [["--bucket-mb", "0"], ["--tokens-per-rank", "-1"], ["--nodes", "1", "--ranks-per-node", "2"]]
)
def test_flags_out_of_range_end_the_command(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_text([*DEBUG, "--world", "4", *flag])
    assert flag[-2] in capsys.readouterr().err


def test_a_model_without_matrices_can_be_compared() -> None:
    params = [PlannedParam(ParamSpec("gain", (5,), "adamw"), "elementwise", "1-D", 0.0)]
    outcome = plan_world(Request("gain", params, 2, 1, 1.0, "balanced", "auto", Machine(), Workload(), NS))
    assert outcome.row.newton_schulz_max_over_mean == 1
    assert outcome.row.state_bytes.most == 4 * 2 * 3


def test_neither_deepspeed_nor_matplotlib_is_needed() -> None:
    code = "import sys, distmuon.planning.command; print({'deepspeed', 'matplotlib', 'tyro'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_picture_without_matplotlib_is_refused_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "distmuon.planning.picture", raising=False)
    with pytest.raises(ConfigError, match="matplotlib, which is not installed"):
        plan_text([*DEBUG, "--world", "2", "--plot", "x.png"])


def test_a_trillion_parameters_on_1024_ranks_are_planned_in_seconds() -> None:
    begin = time.process_time()
    found = json.loads(plan_text(["--model", str(CONFIGS / "models" / "kimi_k2_1t.toml"), "--world", "1024", "--json"]))
    assert time.process_time() - begin < 10
    assert found["parameters"] == 1_026_408_232_448
    assert layout(found["worlds"][0], "owner")["newton_schulz_sum_over_once"] == pytest.approx(1)
