"""The command line: help, exit statuses, sentences, and overrides that reach the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import distmuon.train.report as report
import distmuon.train.run as runs
from distmuon.cli import main
from distmuon.errors import ConfigError
from distmuon.train.config import RunConfig, load_run
from tests.train.synthetic_runs import write_run

REPO = Path(__file__).resolve().parents[2]
DEBUG = str(REPO / "configs" / "runs" / "debug.toml")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[RunConfig, int]]:
    """What would have been trained."""
    calls: list[tuple[RunConfig, int]] = []

    def train(run: RunConfig, local_rank: int = 0, world: int = 1) -> Path:
        calls.append((run, local_rank))
        return tmp_path

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(report, "summary_lines", lambda directory: ["the summary"])
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return calls


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capsys: Captured) -> None:
    assert main([flag]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith("usage: distmuon COMMAND")
    assert all(f"\n  {command} " in shown.out for command in ("train", "report", "verify", "export", "bench", "doctor"))


def test_nothing_given(capsys: Captured) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: ")


def test_unknown_command(capsys: Captured) -> None:
    assert main(["trian", DEBUG]) == 2
    shown = capsys.readouterr()
    assert (
        shown.err
        == 'distmuon: unknown command "trian"; use one of train, plan, report, verify, export, bench, doctor.\n'
    )
    assert shown.out == ""


def test_help_of_train_lists_every_setting(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{key}" for key in inner] if inner else [name]:
            assert f"--{key.replace('_', '-')}" in shown, key
    assert "Peak learning rate of hidden" in shown


@pytest.mark.parametrize("arguments", [["train"], ["train", "--schedule.updates", "3"]])
def test_train_without_a_run_file(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == "distmuon train: name a run file first, e.g. configs/runs/moe_mini.toml.\n"


def test_missing_file(capsys: Captured, started: list[Any]) -> None:
    assert main(["train", "gone.toml"]) == 1
    said = "distmuon train: gone.toml does not exist; look in configs/runs, configs/models and configs/machines.\n"
    assert capsys.readouterr().err == said
    assert started == []


def test_only_the_first_rank_speaks(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "gone.toml"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_run_as_its_file_says(started: list[tuple[RunConfig, int]], capsys: Captured, tmp_path: Path) -> None:
    assert main(["train", DEBUG]) == 0
    assert started == [(load_run(Path(DEBUG)), 0)]
    assert capsys.readouterr().out == f"the summary\nreport: {tmp_path / 'report.html'}\n"


def test_overrides_reach_the_run(started: list[tuple[RunConfig, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    flags = "--name other --seed 5 --schedule.updates 7 --optimizer.lr 0.5 --optimizer.no-nesterov --model.top-k 1"
    flags += " --optimizer.ns.dtype float32 --precision.parameters bfloat16 --data.max-docs None --resume auto"
    flags += " --trace --trace-steps 5"
    assert main(["train", DEBUG, *flags.split()]) == 0
    ((run, local_rank),) = started
    file = load_run(Path(DEBUG))
    assert (run.name, run.seed, run.resume, local_rank) == ("other", 5, "auto", 3)
    assert (file.trace, run.trace, run.trace_steps) == (False, True, 5)
    assert run.schedule == file.schedule.model_copy(update={"updates": 7})
    assert (run.optimizer.lr, run.optimizer.nesterov, run.optimizer.ns.dtype) == (0.5, False, "float32")
    assert run.optimizer.embedding_lr == file.optimizer.embedding_lr
    assert run.model == file.model.model_copy(update={"top_k": 1})
    assert (run.precision.parameters, run.data.max_docs, run.data.tokenizer) == ("bfloat16", None, file.data.tokenizer)


@pytest.mark.parametrize("argument", ["--local_rank=1", "--local-rank=1"])
def test_the_launchers_argument_is_dropped(argument: str, started: list[tuple[RunConfig, int]]) -> None:
    assert main([argument, "train", DEBUG]) == 0
    assert main(["train", DEBUG, argument, "--seed", "2"]) == 0
    assert [run.seed for run, _ in started] == [0, 2]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--schedule.updatse 5", 'unknown key "schedule.updatse"; did you mean "updates"?'),
        ("--schedule.updates five", "\"schedule.updates\" = 'five' is not legal"),
        ("--schedule.updates", "--schedule.updates has no value"),
        ("schedule.updates 5", '"schedule.updates" is not a flag'),
        ("--name.first x", "--name.first is not a flag"),
        ("--optimizer.name sgd", "it must be 'distmuon', 'adamw' or 'deepspeed-adamw'"),
        ("--schedule.updates 0", "schedule"),
        ("--model.top-k 9", "top_k = 9 is more than experts = 4"),
        ("--name ../up", "name"),
    ],
)
def test_wrong_overrides_exit_with_2(flags: str, named: str, started: list[Any], capsys: Captured) -> None:
    assert main(["train", DEBUG, *flags.split()]) == 2
    assert named in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--schedule.updates 0", '"schedule.updates" = 0 is not legal: it must be greater than or equal to 1.'),
        ("--optimizer.lr -1", '"optimizer.lr" = -1 is not legal: it must be greater than or equal to 0.'),
        ("--optimizer.lr nan", '"optimizer.lr" = nan is not legal: it must be a finite number.'),
        ("--name ../up", "\"name\" = '../up' is not legal: "),
        ("--model.top-k 9", "top_k = 9 is more than experts = 4"),
    ],
)
def test_an_override_out_of_range_gets_the_same_sentence_as_in_a_file(
    flags: str, sentence: str, started: list[Any], capsys: Captured
) -> None:
    assert main(["train", DEBUG, *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_errors_of_a_run_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured, started: list[Any]) -> None:
    def refuse(run: RunConfig, local_rank: int = 0, world: int = 1) -> Path:
        raise ConfigError("the reason.")

    monkeypatch.setattr(runs, "train", refuse)
    assert main(["train", DEBUG]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "distmuon train: the reason.\n")


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    def fail(run: RunConfig, local_rank: int = 0, world: int = 1) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", DEBUG])


def test_report(tmp_path: Path, capsys: Captured) -> None:
    first = write_run(tmp_path / "one", "first-run", [3.0, 2.5, 2.0])
    second = write_run(tmp_path / "two", "second-run", [3.0, 2.9, 2.8])
    assert main(["report", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {first / 'report.html'}"
    assert any("first-run" in line for line in lines[:-1])
    assert any("second-run" in line for line in lines[:-1])
    assert (first / "report.html").stat().st_size
    assert not (second / "report.html").exists()


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_usage_of_report(arguments: list[str], status: int, capsys: Captured) -> None:
    assert main(["report", *arguments]) == status
    assert capsys.readouterr().out == "usage: distmuon report RUN_DIR [OTHER_DIR ...]\n"


def test_report_of_nothing(tmp_path: Path, capsys: Captured) -> None:
    assert main(["report", str(tmp_path / "gone")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distmuon report: {tmp_path / 'gone'} cannot be read")


def test_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert main(["doctor"]) == 0
    findings = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert findings["torch"].startswith("2.")
    assert findings["deepspeed"]
    assert "gloo" in findings["backends"]
    assert {"python", "GPUs", "ninja", "apex", "triton", "tokenizers"} <= set(findings)


def test_as_a_module() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "distmuon"]
    done = subprocess.run([*command, "trian"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('distmuon: unknown command "trian"')
