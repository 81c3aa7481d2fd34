"""The soak's own tools: which mutants there are, what counts as killed, and what a long run must show."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.soak import __main__ as soak
from tests.soak import kills, mutants
from tests.soak.mutate import mutants as mutate

SOURCE = '''"""Doc."""
from a import b
Kind = Literal["x"]
def f(x: int = 1, *, y: str = "k") -> float:
    """Doc."""
    log.info("told %d", 3)
    assert x > 0
    if not x or x < 2:
        raise ValueError(f"{x} + 1")
    for z in g(x, y):
        x += z
        continue
    h(x)
    return -x if y else x * 2.5
'''


def test_every_kind_of_change() -> None:
    found = list(mutate(Path("a.py"), SOURCE))
    assert sorted(mutant.change for mutant in found) == [
        "\"k\" -> 'kX'",
        "-x -> x",
        "-x if y else x * 2.5 -> x * 2.5 if y else -x",
        "1 -> 2",
        "2 -> 3",
        "2.5 -> 5.0",
        "continue -> break",
        "g(x, y) -> g(y, x)",
        "h(x) -> pass",
        "not x -> x",
        "not x or x < 2 -> not x and x < 2",
        'raise ValueError(f"{x} + 1") -> pass',
        "return -x if y else x * 2.5 -> return None",
        "x * 2.5 -> x / 2.5",
        "x += z -> pass",
        "x < 2 -> x <= 2",
    ]
    for mutant in found:
        compile(mutant.source, "a.py", "exec")
        pairs = enumerate(zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True), start=1)
        assert [number for number, (old, new) in pairs if old != new] == [mutant.line]


def test_every_file_has_tests_and_every_equivalent_mutant_still_exists() -> None:
    paths = mutants.targets("")
    assert len(paths) > 10
    assert {str(path) for path in paths} >= {"distmuon/plan.py", "distmuon/update.py", "distmuon/scaling.py"}
    for path in paths:
        assert [name for name in mutants.tests_of(path) if not (mutants.ROOT / name).exists()] == []
    listed = tomllib.loads((Path(mutants.__file__).parent / "equivalent.toml").read_text())["mutant"]
    known = {(str(m.path), m.text, m.change) for path in paths for m in mutate(path, (mutants.ROOT / path).read_text())}
    assert [row for row in listed if (row["path"], row["text"], row["change"]) not in known] == []
    assert all(row["why"] for row in listed)


def test_a_bench_knows_killed_from_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of one line, with a test that sees its sign only."""
    for name in mutants.COPIED:
        if "." not in name:
            (tmp_path / name).mkdir()
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "tests/soak").mkdir()
    server = Path(mutants.__file__).with_name("forkserver.py")
    (tmp_path / "tests/soak/forkserver.py").write_text(server.read_text())
    (tmp_path / "distmuon/sign.py").write_text("def sign(x):\n    return -x * 3\n")
    test = (
        "import sys\nsys.path.insert(0, 'distmuon')\nfrom sign import sign\ndef test_sign():\n    assert sign(1) < 0\n"
    )
    (tmp_path / "tests/test_sign.py").write_text(test)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", {"distmuon/sign.py": ["test_sign.py"]})
    path = Path("distmuon/sign.py")
    chosen = list(mutate(path, (tmp_path / path).read_text()))
    bench = mutants.Bench(tmp_path / "bench")
    assert {m.change: noticed for m, noticed in bench.judge(chosen, float("inf")).items()} == {
        "return -x * 3 -> return None": True,
        "-x * 3 -> -x / 3": False,
        "-x -> x": True,
        "3 -> 4": False,
    }


def calm(**changes: Any) -> dict[str, Any]:
    return {"slope": 0.5, "median": 0.01, "p99": 0.02, "files": [20], **changes}


@pytest.mark.parametrize(
    ("changes", "losses", "problem"),
    [
        ({}, [1.0, 0.5, 0.5, 0.25], None),
        ({}, [1.0, 0.5, 0.75, 0.25], "1 losses differ, 0 are missing"),
        ({}, [1.0, 0.5, 0.5], "0 losses differ, 1 are missing"),
        ({"slope": 1.5}, [1.0, 0.5, 0.5, 0.25], "rank 0 grows by 1.50 MiB per 1,000 steps"),
        ({"files": [20, 21]}, [1.0, 0.5, 0.5, 0.25], "rank 0 has had [20, 21] open files"),
        ({"p99": 0.05}, [1.0, 0.5, 0.5, 0.25], "rank 0's p99 step took 5.0 medians"),
    ],
)
def test_what_a_long_run_must_show(
    changes: dict[str, Any], losses: list[float], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "state", lambda folder, step: {"same": 1})
    for name, steps, values in (("disturbed", [0, 1, 1, 2], losses), ("calm", [0, 1, 2], [1.0, 0.5, 0.25])):
        (tmp_path / name).mkdir()
        data = b"".join(kills.RECORD.pack(*pair) for pair in zip(steps, values, strict=False))
        (tmp_path / name / "losses").write_bytes(data + b"cut")
    figures, problems = kills.judge(tmp_path / "disturbed", 3, 1, [calm(**changes), calm()])
    assert len(figures) == 4
    assert [text.split(", same state")[0] for text in problems] == ([problem] if problem else [])


def test_parts_run_in_turn_and_all_of_them_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, list[str]]] = []

    def part(name: str) -> Any:
        return lambda arguments: ran.append((name, list(arguments))) or name == "mutants"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "PARTS", {name: part(name) for name in soak.PARTS})
    assert soak.main([]) == 1
    assert [name for name, _ in ran] == ["tests", "mutants", "kills", "page"]
    assert "failed: mutants" in capsys.readouterr().err
    assert soak.main(["kills", "--minutes", "2"]) == 0
    assert ran[-1] == ("kills", ["--minutes", "2"])
    assert soak.main(["kill"]) == 2
    assert "use one of" in capsys.readouterr().err
