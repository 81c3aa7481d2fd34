"""Nothing in the product can be made to run code from data (F27), and nothing foreign is required (F26).

Modules are looked for by what they import and call, as parsed: words in texts and comments do not count.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.house import size_rules
from tests.house.test_launch import dry_run

REPO = Path(__file__).resolve().parents[2]
PRODUCT = ("distmuon", "kernels", "benchmarks", "launch", "setup.py")
MODULES = {"cloudpickle", "code", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "yaml"}
CALLS = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "input",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "torch.load",
}
CALLS |= {"numpy.load", "np.load", "torch.hub.load", "torch.save", "torch.jit.load", "importlib.reload"}
# Objects go through pickle in these collectives: a rank that can reach the group could send code.
OBJECTS = ("_object", "_object_list")
# The ranks of a benchmark, started by it on this machine, tell their figures.
ALLOWED = {("benchmarks/launch.py", "calls dist.all_gather_object")}


def product() -> list[Path]:
    tops = [REPO / name for name in PRODUCT]
    files = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*.py")))]
    return [path for path in files if path.resolve() == path]


def unsafe(text: str) -> Iterator[str]:
    """What a file does that data could turn into running code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS or called.endswith(OBJECTS):
            yield f"calls {called}"
        for word in node.keywords:
            if (word.arg, ast.unparse(word.value)) in {("shell", "True"), ("weights_only", "False")}:
                yield f"passes {word.arg}={ast.unparse(word.value)}"
            if word.arg == "allow_pickle" and ast.unparse(word.value) != "False":
                yield "passes allow_pickle"


@pytest.mark.fault("F27")
def test_the_product_runs_no_code_from_data(figure: Callable[[str], None]) -> None:
    files = product()
    assert len(files) > 100
    found = {(str(path.relative_to(REPO)), what) for path in files for what in unsafe(path.read_text())}
    assert found == ALLOWED
    figure(f"{len(found - ALLOWED)} unsafe imports or calls in {len(files)} files")


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import yaml", "eval('1')", "exec(text)", "torch.load(path)"),
        *("subprocess.run(c, shell=True)", "f(weights_only=False)", "np.load(path)", "os.system('ls')"),
        *("np.load_file(path, allow_pickle=True)", "dist.all_gather_object(out, x)", "dist.broadcast_object_list(xs)"),
    ],
)
def test_each_of_them_would_be_noticed(line: str) -> None:
    assert list(unsafe(line))
    assert not list(unsafe(f"x = {line!r}  # {line}"))


def test_harmless_namesakes_pass() -> None:
    lines = ["model.eval()", "self.compile(x)", "checkpoint.load(d)", "f(weights_only=True)", "re.compile('x')"]
    assert [what for line in lines for what in unsafe(line)] == []


@pytest.mark.fault("F27")
def test_bandit_finds_nothing(figure: Callable[[str], None]) -> None:
    # Asserts state own invariants (B101). Programs are started without a shell, by fixed names, and ruff checks each
    # (B404, B603). A count under the key "bytes_per_token" is no password (B105).
    options = ["-q", "-r", "-f", "json", "-s", "B101,B105,B404,B603"]
    command = [sys.executable, "-m", "bandit", *options, "distmuon", "kernels"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert [(row["filename"], row["line_number"], row["test_name"]) for row in report["results"]] == []
    assert report["errors"] == []
    assert done.returncode == 0
    figure(f"bandit: {len(report['results'])} findings in {report['metrics']['_totals']['loc']} lines")


@pytest.mark.fault("F26")
def test_nobody_requires_the_wrong_apex(figure: Callable[[str], None]) -> None:
    requirements = [text for _, text in size_rules._requirements(REPO)]
    named = {size_rules._project(text) for text in requirements} - {""}
    assert {"numpy", "torch", "pytest"} <= named
    assert list(size_rules.check_requirements(REPO)) == []
    assert "pip install apex" not in "".join(path.read_text() for path in REPO.glob("*.md"))
    figure(f"apex is none of {len(named)} required packages")


@pytest.mark.fault("F27")
@pytest.mark.parametrize("script", ["local.sh", "elastic.sh"])
def test_ranks_meet_on_this_machine_unless_told(script: str, figure: Callable[[str], None]) -> None:
    """torchrun's "standalone" is a rendezvous at localhost."""
    command = dry_run(script)
    endpoints = [word.partition("=")[2] for word in command if word.startswith("--rdzv-endpoint")]
    hosts = [endpoint.split(":")[0] for endpoint in endpoints]
    assert hosts == ([] if "--standalone" in command else ["localhost"])
    figure(f"{script} asks torchrun for {endpoints[0] if endpoints else 'a standalone rendezvous'}")


def test_the_security_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(tests/[^`]*)`", (REPO / "SECURITY.md").read_text()))
    assert len(named) >= 6
    assert [name for name in named if not (REPO / name).is_file()] == []
