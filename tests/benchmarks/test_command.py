"""``distmuon bench``: the list, unknown names, help, and what is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from distmuon.benchmarks.command import BENCHMARKS
from distmuon.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_list(arguments: list[str], capsys: Captured) -> None:
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: distmuon bench NAME")
    listed = [line.split(maxsplit=1) for line in lines[lines.index("benchmarks:") + 1 :]]
    assert [name for name, _ in listed] == list(BENCHMARKS)
    assert all(len(what) > 20 for _, what in listed)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("nss", 'did you mean "ns"?'), ("com", 'did you mean "comm"?'), ("zzz", "use one of accuracy")],
)
def test_unknown_name(name: str, remedy: str, capsys: Captured) -> None:
    assert main(["bench", name]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f'distmuon bench: unknown benchmark "{name}"; {remedy}')
    assert shown.out == ""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: distmuon bench {name}")


def test_flags_and_status_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    module = importlib.import_module("distmuon.benchmarks.ns")
    monkeypatch.setattr(module, "main", lambda flags: given.append(flags) or 7)
    assert main(["bench", "ns", "--quick", "--rounds", "4"]) == 7
    assert given == [["--quick", "--rounds", "4"]]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "distmuon.benchmarks.ns", raising=False)
    assert main(["bench", "ns"]) == 1
    expected = "distmuon bench ns: tqdm is not installed; pip install 'distmuon[dev]' brings it.\n"
    assert capsys.readouterr().err == expected


def test_a_missing_module_of_our_own_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "gone", ("gone", "nothing"))
    with pytest.raises(ModuleNotFoundError, match="distmuon.benchmarks.gone"):
        main(["bench", "gone"])
