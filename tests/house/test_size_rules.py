"""The size rules hold here, and each of them can be broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import size_rules

REPO = Path(__file__).resolve().parents[2]
GOOD = '"""Doc."""\n\ndef add(x: int) -> int:\n    """Add."""\n    return x\n'


def problems(tmp_path: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return size_rules.check(tmp_path)


def test_this_repository_keeps_the_rules() -> None:
    assert size_rules.check(REPO) == []


@pytest.mark.parametrize("name", ["benchmarks", "kernels"])
def test_linked_folders_count_once(name: str) -> None:
    paths = [str(source.path) for source in size_rules.read_sources(REPO)]
    assert f"{name}/__init__.py" in paths
    assert not [path for path in paths if path.startswith(f"distmuon/{name}/")]


def test_good_file_passes(tmp_path: Path) -> None:
    assert problems(tmp_path, {"distmuon/a.py": GOOD, "kernels/b.py": GOOD}) == []


@pytest.mark.parametrize("name", ["distmuon/a.py", "tests/a.py", "benchmarks/a.py", "setup.py"])
def test_long_files(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, {name: '"""Doc."""\n' + "X = 1\n" * 299}) == (
        [] if name != "distmuon/a.py" else ["median file has 300 lines, at most 150"]
    )
    (found, *_) = problems(tmp_path, {name: '"""Doc."""\n' + "X = 1\n" * 300})
    assert found == f"{name}: 301 lines, at most 300; split it by concern"


def test_long_functions(tmp_path: Path) -> None:
    body = '"""Doc."""\n\ndef f() -> None:\n    """Doc."""\n' + "    x = 1\n" * 58
    assert problems(tmp_path, {"distmuon/a.py": body}) == []
    (found,) = problems(tmp_path, {"distmuon/a.py": body + "    x = 1\n"})
    assert "f has 61 lines, at most 60" in found


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("X = eval('1')", "calls eval"),
        ("exec('1')", "calls exec"),
        ("X = yaml.load('1')", "calls yaml.load"),
        ("os.system('ls')", "calls os.system"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("torch.load('x', weights_only=False)", "weights_only=False"),
        ("print(1)", "prints outside the command line layer"),
    ],
)
def test_banned_calls(tmp_path: Path, line: str, word: str) -> None:
    assert word in problems(tmp_path, {"distmuon/a.py": f'"""Doc."""\n{line}\n'})[0]


@pytest.mark.parametrize("name", ["distmuon/cli.py", "distmuon/cli/plan.py", "benchmarks/step.py", "tests/a.py"])
def test_commands_benchmarks_and_tests_may_print(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, {name: '"""Doc."""\nprint(1)\nmodel.eval()\n'}) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("X = 1\n", "the module has no docstring"),
        (GOOD.replace('"""Add."""', "pass"), "add has no docstring"),
        (GOOD.replace("x: int", "x"), "add is not fully typed"),
        (GOOD.replace(" -> int", ""), "add is not fully typed"),
        (GOOD.replace("x: int", "x: int, *rest"), "add is not fully typed"),
        ('"""Doc."""\n\nclass A:\n    """Doc."""\n\n    def f(self) -> None: ...\n', "A.f has no docstring"),
        (
            '"""Doc."""\n\nclass A:\n    """Doc."""\n\n    def f(self, x) -> None:\n        """Doc."""\n',
            "A.f is not",
        ),
    ],
)
def test_public_names_are_documented_and_typed(tmp_path: Path, text: str, word: str) -> None:
    assert word in problems(tmp_path, {"kernels/a.py": text})[0]


@pytest.mark.parametrize("private", ["def _f(x): ...", "class _A:\n    def f(self, x): ...", "X = lambda x: x"])
def test_private_names_are_free(tmp_path: Path, private: str) -> None:
    assert problems(tmp_path, {"distmuon/a.py": f'"""Doc."""\n\n{private}\n'}) == []


def test_asserts_are_rare(tmp_path: Path) -> None:
    raises = 'def f() -> None:\n    """Doc."""\n' + "    raise ValueError\n" * 5
    assert problems(tmp_path, {"distmuon/a.py": f'"""Doc."""\n{raises}    assert True\n'}) == []
    (found,) = problems(tmp_path, {"distmuon/a.py": f'"""Doc."""\n{raises}    assert True\n    assert True\n'})
    assert found.startswith("5 raises for 2 asserts")


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import ReduceOp",
        "RANK = torch.distributed.get_rank()",
    ],
)
def test_arithmetic_knows_no_ranks(tmp_path: Path, line: str) -> None:
    text = f'"""Doc."""\n{line}\n'
    for name in ("distmuon/plan.py", "distmuon/update.py", "kernels/syrk.py"):
        assert "uses torch.distributed" in problems(tmp_path / name.replace(".", "-"), {name: text})[0]
    assert problems(tmp_path / "free", {"distmuon/comm.py": text, "distmuon/train/config.py": text}) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("setup.py", '"""Doc."""\nNEEDS = ["numpy", "Apex>=0.1"]\n'),
        ("pyproject.toml", '[project.optional-dependencies]\ngpu = ["apex[cuda]"]\n'),
        ("pyproject.toml", '[dependency-groups]\ndev = ["apex"]\n'),
        ("pyproject.toml", '[build-system]\nrequires = ["setuptools", "apex ; python_version > \'3\'"]\n'),
        ("dev-requirements.txt", "numpy\napex==0.9.10.dev0  # web\n"),
    ],
)
def test_apex_is_never_required(tmp_path: Path, name: str, text: str) -> None:
    (found,) = problems(tmp_path, {name: text})
    assert found.startswith(f"{name}: requires")


def test_other_names_with_apex_in_them_are_fine(tmp_path: Path) -> None:
    files = {
        "setup.py": '"""Apex is optional."""\nNEEDS = ["apexcharts"]\n',
        "requirements.txt": "apex-toolkit\n",
    }
    assert problems(tmp_path, files) == []


def test_main_prints_the_table_and_fails_with_one_line_per_violation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(size_rules, "__file__", str(tmp_path / "tests/house/size_rules.py"))
    assert problems(tmp_path, {"distmuon/a.py": GOOD}) == []
    assert size_rules.main() == 0
    assert "    5  distmuon/a.py" in capsys.readouterr().out
    problems(tmp_path, {"distmuon/a.py": GOOD + "print(1)\neval('2')\n"})
    assert size_rules.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
