"""Whole runs of configs/runs/debug.toml: alone, under torchrun, under deepspeed; stopped, failed and resumed."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from distmuon.checkpoint import verify
from distmuon.errors import ConfigError
from distmuon.train.config import load_run
from distmuon.train.metrics import Metrics
from distmuon.train.run import train
from tests.train.launched import DEBUG, FAULT, SEVERAL, UPDATES, Done, Site

TOLERANCE = 1e-3
PYTHON = [sys.executable, "-m", "distmuon"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(site: Site) -> list[float]:
    """Losses of the run that others are compared with."""
    done = site.train("alone", PYTHON)
    assert done.returncode == 0, done.err
    return site.losses("alone")


@pytest.fixture(scope="module")
def several(site: Site) -> Done:
    """Runs on one rank in one process: (name, flags)."""
    table = [
        ("adamw", "--optimizer.name adamw"),
        ("stock", "--optimizer.name deepspeed-adamw"),
        ("bf16", "--precision.parameters bfloat16"),
        ("router", "--optimizer.router adamw --model.no-tie-embeddings --model.expert silu --optimizer.policy flat"),
        ("doomed", "--optimizer.lr 1e30 --precision.autocast off --schedule.warmup 0 --schedule.updates 40"),
        ("stopped", "--trace --trace-steps 50"),
        ("stopped", ""),
        ("stopped", "--resume auto"),
        ("stopped", "--resume auto"),
    ]
    lines = "\n".join(f"--name {name} {site.common} {flags}" for name, flags in table)
    done = site.once("several", lambda: site.start([sys.executable, "-c", SEVERAL, str(DEBUG)], lines))
    assert done.returncode == 0, done.err
    return done


def close(losses: list[float], others: list[float]) -> bool:
    return len(losses) == len(others) and max(abs(a - b) for a, b in zip(losses, others, strict=True)) < TOLERANCE


def check_files(site: Site, name: str, *others: str) -> None:
    """Metrics, curve, report, and the two newest checkpoints."""
    directory = site.path / "runs" / name
    expected = {"metrics.jsonl", "loss.png", "report.html", "checkpoints", *others}
    assert {path.name for path in directory.iterdir()} == expected
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    html = (directory / "report.html").read_text()
    assert name in html
    outside = re.findall(r"""(?:src|href|srcset)\s*=\s*["']?(?!data:|#)[^\s"'>]+|@import|url\((?!["']?data:|#)""", html)
    assert outside == []
    pointer, form = ("latest", "update{:07d}") if name == "stock" else ("LATEST", "step_{:08d}")
    names = [form.format(update) for update in (UPDATES - 4, UPDATES)]
    assert (directory / "checkpoints" / pointer).read_text().strip() == names[-1]
    if name != "stock":
        assert {path.name for path in (directory / "checkpoints").iterdir()} == {*names, pointer}
        assert [verify(directory / "checkpoints" / kept).step for kept in names] == [UPDATES - 4, UPDATES]


def check_metrics(metrics: Metrics, world: int, optimizer: str = "distmuon") -> None:
    assert metrics.failure is None
    assert metrics.run is not None
    assert metrics.final is not None
    assert metrics.run.environment["world_size"] == world
    assert metrics.run.optimizer.name == optimizer
    assert list(metrics.steps) == list(range(1, UPDATES + 1))
    assert list(metrics.evals) == [6, UPDATES]
    losses = [record.loss for record in metrics.steps.values()]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1
    assert metrics.final.val_loss < metrics.evals[6].loss
    assert metrics.final.val_loss == metrics.evals[UPDATES].loss
    assert metrics.steps[UPDATES].tokens == metrics.final.tokens == UPDATES * 16 * 32
    assert len(metrics.run.state_bytes_per_rank) == world
    assert all(size > 0 for size in metrics.run.state_bytes_per_rank)


def test_alone(site: Site, alone: list[float]) -> None:
    check_files(site, "alone")
    check_metrics(site.metrics("alone"), 1)
    done = site.train("alone", PYTHON)
    assert done.out.splitlines()[-1] == "report: runs/alone/report.html"
    # A vocabulary of 512: guessing costs ln 512 = 6.24 nats.
    assert alone[0] == pytest.approx(6.24, abs=0.15)


def test_learning_rates_are_those_of_the_schedule(site: Site, alone: list[float]) -> None:
    rates = [record.lr for record in site.metrics("alone").steps.values()]
    assert rates[0] == pytest.approx(2e-2)
    assert rates == sorted(rates, reverse=True)
    assert 2e-3 <= rates[-1] < 4e-3


def check_two_ranks(site: Site, name: str, done: Done, alone: list[float], *others: str) -> None:
    assert done.returncode == 0, done.err
    check_files(site, name, *others)
    check_metrics(site.metrics(name), 2)
    assert close(site.losses(name), alone)
    one, two = site.metrics("alone"), site.metrics(name)
    assert one.final is not None
    assert two.final is not None
    assert two.final.val_loss == pytest.approx(one.final.val_loss, abs=TOLERANCE)
    assert done.out.count("report: ") == 1


def test_torchrun(site: Site, alone: list[float]) -> None:
    check_two_ranks(site, "torchrun", site.train("torchrun", [*TORCHRUN, "-m", "distmuon"]), alone)


def test_deepspeed_launcher(site: Site, alone: list[float]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", port, "--no_local_rank", "--module", "distmuon"]
    check_two_ranks(site, "deepspeed", site.train("deepspeed", launcher), alone)


def test_expert_parallel_and_its_timeline(site: Site, alone: list[float]) -> None:
    flags = "--model.ep-size 2 --trace --trace-steps 2"
    done = site.train("experts", [*TORCHRUN, "-m", "distmuon"], flags)
    check_two_ranks(site, "experts", done, alone, "trace.json")
    assert done.out.splitlines()[-2] == "timeline: runs/experts/trace.json"
    assert any(line.startswith("exposed communication") for line in done.out.splitlines())
    spans = read_spans(site, "experts")
    accumulation = 2
    for rank in (0, 1):
        mine = [span for span in spans if span["pid"] == rank]
        names = [span["name"] for span in mine if span["cat"] == "compute"]
        assert names.count("forward") == names.count("backward") == 2 * accumulation
        assert {"guard", "momentum", "newton_schulz", "apply", "gather"} <= set(names)
        assert [span["args"]["update"] for span in mine if span["name"] == "update"] == [2, 3]
        collectives = [span for span in mine if span["cat"] == "communication"]
        assert len(collectives) >= 2 * 3
        assert all(span["args"]["bytes"] > 0 and "unfinished" not in span["args"] for span in collectives)
        assert {span["name"] for span in mine if span["cat"] == "waiting"} <= {span["name"] for span in collectives}
    check_exposed(site.metrics("experts"))


def read_spans(site: Site, name: str) -> list[dict[str, Any]]:
    events = json.loads((site.path / "runs" / name / "trace.json").read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


def check_exposed(metrics: Metrics) -> None:
    assert metrics.trace is not None
    assert (metrics.trace.first, metrics.trace.last, metrics.trace.dropped) == (2, 3, 0)
    for record in metrics.steps.values():
        assert record.exposed_seconds is not None
        assert 0 < record.exposed_seconds < record.seconds
    waited = sum(metrics.steps[step].exposed_seconds or 0.0 for step in (2, 3))
    exposed, communication = metrics.trace.ranks[0].exposed_s, metrics.trace.ranks[0].communication_s
    assert exposed <= min(waited, communication)
    # A wait is a few microseconds longer than the part of it in which the collective was under way.
    assert exposed == pytest.approx(waited, abs=5e-3)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw", "adamw"), ("stock", "deepspeed-adamw"), ("bf16", "distmuon"), ("router", "distmuon")],
)
def test_variants(site: Site, name: str, optimizer: str) -> None:
    check_files(site, name)
    check_metrics(site.metrics(name), 1, optimizer)


@pytest.mark.usefixtures("several")
def test_adamw_is_stock_adamw(site: Site) -> None:
    """The same rule, groups and clipping on two implementations of ZeRO-1."""
    assert close(site.losses("adamw"), site.losses("stock"))


@pytest.mark.usefixtures("several")
def test_variants_differ(site: Site, alone: list[float]) -> None:
    first = {name: site.losses(name) for name in ("adamw", "bf16", "router")}
    assert first["adamw"][0] == alone[0]
    assert not close(first["adamw"], alone)
    assert first["bf16"] != alone
    assert first["bf16"] == pytest.approx(alone, abs=0.15)
    assert not close(first["router"], alone)


@pytest.mark.usefixtures("several")
def test_gradients_that_stay_infinite_end_a_run(site: Site) -> None:
    metrics = site.metrics("doomed")
    assert metrics.final is None
    assert metrics.failure is not None
    assert "NonFiniteGradientError" in metrics.failure.message
    assert "5 steps in a row" in metrics.failure.message
    assert metrics.failure.step == list(metrics.steps)[-1] < 40
    assert [record.skipped for record in metrics.steps.values()][-4:] == [True] * 4
    assert not metrics.truncated


def test_sigterm_stops_after_a_checkpoint_and_resuming_goes_on(site: Site, several: Done, alone: list[float]) -> None:
    """Stopped in update 6; refused without --resume; continued; continued when there is nothing left to do."""
    metrics = site.metrics("stopped")
    assert metrics.starts == 2
    assert site.losses("stopped") == alone
    assert several.out.count("refused: ") == 2
    assert "refused: runs/stopped already holds a run; continue it with --resume auto" in several.out
    check_files(site, "stopped", "trace.json")
    check_metrics(metrics, 1)
    # The timeline that was asked for ends with the part of the run that was stopped.
    updates = [span["args"]["update"] for span in read_spans(site, "stopped") if span["name"] == "update"]
    assert updates == [2, 3, 4, 5, 6, 7]
    assert metrics.steps[2].exposed_seconds is None, "one rank waits for nobody"


def test_failure_keeps_what_was_done_and_resuming_gives_the_same_losses(site: Site, alone: list[float]) -> None:
    failed = site.train("failed", [sys.executable, "-c", FAULT], FAILS="0")
    assert failed.returncode == 1
    assert "RuntimeError: the disk is full" in failed.err
    metrics = site.metrics("failed")
    assert metrics.failure is not None
    assert metrics.failure.message == "rank 0: RuntimeError: the disk is full"
    assert (metrics.failure.step, metrics.final, list(metrics.steps)) == (6, None, [1, 2, 3, 4, 5, 6])
    assert verify(site.path / "runs" / "failed" / "checkpoints").step == 4
    resumed = site.train("failed", PYTHON, "--resume auto")
    assert resumed.returncode == 0, resumed.err
    assert site.losses("failed") == alone
    check_files(site, "failed")
    check_metrics(site.metrics("failed"), 1)


def test_failure_of_another_rank_is_recorded(site: Site) -> None:
    launcher = [*TORCHRUN, "--no-python", sys.executable, "-c", FAULT]
    failed = site.train("half", launcher, FAILS="1")
    assert failed.returncode != 0
    text = (site.path / "runs" / "half" / "metrics.jsonl").read_text()
    assert "rank 1: RuntimeError: the disk is full" in text
    metrics = site.metrics("half")
    assert metrics.failure is not None
    assert list(metrics.steps) == [1, 2, 3, 4, 5, 6]


def test_an_existing_run_is_refused_before_anything_is_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    run = load_run(DEBUG).model_copy(update={"name": "taken", "out": str(tmp_path)})
    run = run.model_copy(update={"data": run.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})})
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume auto, choose another --name"):
        train(run)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["taken", "taken/metrics.jsonl"]
    assert (tmp_path / "taken" / "metrics.jsonl").read_text() == "{}\n"


def test_too_few_held_out_sequences_are_refused_before_anything_is_written(site: Site, tmp_path: Path) -> None:
    run = load_run(DEBUG)
    data = run.data.model_copy(update={"cache_dir": str(site.path / "cache")})
    evaluation = run.evaluation.model_copy(update={"sequences": 10**6})
    with pytest.raises(ConfigError, match="1000000 validation sequences of 32 tokens are asked for"):
        train(run.model_copy(update={"data": data, "evaluation": evaluation, "out": str(tmp_path / "runs")}))
    assert not (tmp_path / "runs").exists()
