"""The Makefile and .ci/run, with a stand-in Python that records what it is asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python $VERSION" ;;
  "-c import sys"*) [[ "$VERSION" == 3.1[1-9]* ]] ;;
  "-m venv"*) echo "$*" >>"$LOG"; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *) echo "$*" >>"$LOG"; [[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]] ;;
esac
"""
FAKE_TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$LOG"
[[ -z "${FAIL:-}" || "$(basename "$0") $*" != *"$FAIL"* ]]
"""
INSTALL = ["torch==2.13.0", "triton==3.7.0", "deepspeed==0.19.8", "--editable .[dev,hf]"]


class Checkout:
    """A copy of the build files with stand-ins for Python and every tool on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        for name in ("Makefile", "setup.py", "pyproject.toml"):
            shutil.copy(REPO / name, root)
        (root / ".ci").mkdir()
        shutil.copy(REPO / ".ci/run", root / ".ci/run")
        (root / "launch").mkdir()
        self.program(root / "launch/local.sh", FAKE_TOOL)
        self.program(self.bin / "python3.11", FAKE_PYTHON)
        for name in ("gcc", "ruff", "mypy", "lint-imports"):
            self.program(self.bin / name, FAKE_TOOL)
        for name in (
            "awk",
            "bash",
            "basename",
            "cat",
            "cp",
            "cut",
            "dirname",
            "env",
            "find",
            "make",
            "mkdir",
            "rm",
        ):
            self.link(name)
        for name in ("sha256sum", "touch"):
            self.link(name)

    def program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def link(self, name: str) -> None:
        found = shutil.which(name)
        assert found is not None
        (self.bin / name).symlink_to(found)

    def run(self, *command: str, version: str = "3.11.7", fail: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "LOG": str(self.root / "log"), "VERSION": version, "FAIL": fail}
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def log(self) -> list[str]:
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "repo")


def installed(log: list[str]) -> list[str]:
    return [line.removeprefix("-m pip install -qq ") for line in log if line.startswith("-m pip install")]


def test_plain_make_lists_every_target(checkout: Checkout) -> None:
    done = checkout.run("make")
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert sorted(listed) == sorted(phony.group(1).split())
    assert checkout.log() == []


def test_first_call_installs_the_pinned_torch_first_and_the_second_installs_nothing(
    checkout: Checkout,
) -> None:
    assert checkout.run("make", "test").returncode == 0
    first = checkout.log()
    assert first[0] == "-m venv --clear .venv"
    assert installed(first) == INSTALL
    assert checkout.run("make", "test", "ARGS=-k plan").returncode == 0
    assert checkout.log() == ["-m pytest -k plan"]


def test_changed_requirements_install_again_into_the_same_environment(checkout: Checkout) -> None:
    checkout.run("make", "test")
    checkout.log()
    for name in ("setup.py", "pyproject.toml"):
        with (checkout.root / name).open("a") as file:
            file.write("\n# changed\n")
        checkout.run("make", "test")
        log = checkout.log()
        assert installed(log) == INSTALL
        assert not [line for line in log if "venv" in line]


def test_each_pin_is_part_of_what_makes_the_environment_right(checkout: Checkout) -> None:
    for pin in ("torch==2.13.0", "triton==3.7.0", "deepspeed==0.19.8"):
        checkout.run("make", "test")
        checkout.log()
        makefile = checkout.root / "Makefile"
        makefile.write_text(makefile.read_text().replace(f"{pin}\n", f"{pin}.1\n"))
        checkout.run("make", "test")
        assert f"{pin}.1" in installed(checkout.log())


def test_another_python_or_a_moved_checkout_makes_a_new_environment(checkout: Checkout) -> None:
    checkout.run("make", "test")
    checkout.log()
    checkout.run("make", "test", version="3.12.1")
    assert checkout.log()[0] == "-m venv --clear .venv"
    moved = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.root, checkout.bin = moved, moved / "bin"
    checkout.run("make", "test", version="3.12.1")
    assert checkout.log()[0] == "-m venv --clear .venv"


def test_a_failed_install_is_tried_again(checkout: Checkout) -> None:
    assert checkout.run("make", "test", fail="deepspeed").returncode != 0
    log = checkout.log()
    assert installed(log) == INSTALL[:3]
    assert "-m pytest" not in " ".join(log)
    assert checkout.run("make", "test").returncode == 0
    assert installed(checkout.log()) == INSTALL


def test_an_old_python_is_refused_with_the_remedy(checkout: Checkout) -> None:
    done = checkout.run("make", "test", version="3.10.4")
    assert done.returncode != 0
    assert 'is "Python 3.10.4", but distmuon needs Python 3.11 or newer' in done.stderr
    assert "make PYTHON=/path/to/python3.11" in done.stderr
    assert checkout.log() == []


def test_python3_serves_where_there_is_no_python311(checkout: Checkout) -> None:
    (checkout.bin / "python3.11").rename(checkout.bin / "python3")
    assert checkout.run("make", "test", version="3.12.1").returncode == 0


def test_a_missing_gcc_is_named(checkout: Checkout) -> None:
    (checkout.bin / "gcc").unlink()
    done = checkout.run("make", "test")
    assert done.returncode != 0
    assert "gcc is not on PATH" in done.stderr
    assert checkout.log() == []


def test_train_runs_both_optimizers_and_compares_them(checkout: Checkout) -> None:
    assert checkout.run("make", "train").returncode == 0
    assert checkout.log()[-3:] == [
        "local.sh train configs/runs/moe_mini.toml --resume auto",
        "local.sh train configs/runs/moe_mini_adamw.toml --resume auto",
        "-m distmuon report runs/moe_mini-distmuon runs/moe_mini-adamw",
    ]
    assert checkout.run("make", "train", fail="moe_mini.toml").returncode != 0
    assert checkout.log() == ["local.sh train configs/runs/moe_mini.toml --resume auto"]


def test_kernels_passes_on_options_and_the_exit_status(checkout: Checkout) -> None:
    (checkout.root / "kernels").mkdir()
    assert checkout.run("make", "kernels", "ARGS=--quick").returncode == 0
    assert checkout.log()[-1] == "-m distmuon bench kernels --quick"
    assert checkout.run("make", "kernels", fail="bench kernels").returncode != 0


def test_bench_runs_all_that_the_documents_quote_or_the_one_that_is_named(checkout: Checkout) -> None:
    assert checkout.run("make", "bench").returncode == 0
    assert checkout.log()[-5:] == [f"-m distmuon bench {name}" for name in ("comm", "memory", "step", "links", "ns")]
    assert checkout.run("make", "bench", fail="bench comm").returncode != 0
    assert checkout.log()[-1] == "-m distmuon bench comm"
    assert checkout.run("make", "bench", "ARGS=ns --quick").returncode == 0
    assert checkout.log() == ["-m distmuon bench ns --quick"]


def test_soak_runs_all_parts_or_the_one_that_is_named(checkout: Checkout) -> None:
    assert checkout.run("make", "soak").returncode == 0
    assert checkout.log()[-1].strip() == "-m tests.soak"
    assert checkout.run("make", "soak", "ARGS=kills --minutes 2").returncode == 0
    assert checkout.log() == ["-m tests.soak kills --minutes 2"]
    assert checkout.run("make", "soak", fail="tests.soak").returncode != 0


CHECKS = [
    "ruff check .",
    "ruff format --check .",
    "mypy --strict distmuon kernels",
    "lint-imports ",
    "tests/house/size_rules.py",
]


@pytest.mark.parametrize("failing", ["", *CHECKS])
def test_check_runs_every_check_and_fails_with_any(checkout: Checkout, failing: str) -> None:
    done = checkout.run("make", "check", fail=failing)
    assert checkout.log()[-5:] == CHECKS
    assert (done.returncode != 0) == bool(failing)
    assert not failing or f"failed: {failing.strip()}" in done.stderr.replace("python ", "")


@pytest.mark.parametrize("failing", ["", "ruff check", "-m pytest"])
def test_ci_runs_both_gates_tests_last(checkout: Checkout, failing: str) -> None:
    done = checkout.run("bash", ".ci/run", fail=failing)
    assert checkout.log()[-6:] == [*CHECKS, "-m pytest"]
    assert (done.returncode != 0) == bool(failing)


def test_clean_keeps_the_runs(checkout: Checkout) -> None:
    checkout.run("make", "test")
    (checkout.root / "runs/a").mkdir(parents=True)
    assert checkout.run("make", "clean").returncode == 0
    assert not (checkout.root / ".venv").exists()
    assert (checkout.root / "runs/a").is_dir()


def test_build_files_are_executable_where_they_must_be() -> None:
    for name in (".ci/run", "launch/local.sh"):
        assert os.access(REPO / name, os.X_OK)
