"""F28, tests that test nothing: change the product in random places and count the changes that some test notices.

``python -m tests.soak mutants``. The changes are made in a copy of the repository; which ones is a matter of the seed.
Those that change nothing anybody could observe are listed, with the reason, in equivalent.toml and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import plugin
from tests.soak.mutate import Mutant, mutants

ROOT = Path(__file__).parents[2]
WANTED = 0.9
COPIED = ("benchmarks", "configs", "distmuon", "docs", "kernels", "launch", "tests", "pyproject.toml", "setup.py")
PLANNING = ["unit/test_placement.py", "unit/test_plan.py", "unit/test_owners.py"]
# The tests of each file, those that notice most at least cost first.
TESTS = {
    "distmuon/plan.py": [
        "unit/test_plan_accounts.py",
        *PLANNING,
        "unit/test_plan_layouts.py",
        "distributed/test_planned.py",
    ],
    "distmuon/placement.py": ["unit/test_dealing.py", *PLANNING, "unit/test_planner.py"],
    "distmuon/scaling.py": ["unit/test_scaling.py"],
    "distmuon/update.py": ["unit/test_update.py", "unit/test_adamw.py", "unit/test_muon.py"],
    "distmuon/checkpoint": [
        f"checkpoint/test_{name}.py" for name in ("directories", "mismatch", "corrupt", "cross", "reshard")
    ],
}


def main(arguments: Sequence[str]) -> int:
    """Try mutants until all of the sample are done or the time is over; exit status 1 below the wanted share."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak mutants", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="files whose name has this in it")
    parser.add_argument("--count", type=int, default=150, help="size of the sample; 0: all")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write a fault report")
    options = parser.parse_args(arguments)
    everything = [m for path in targets(options.only) for m in mutants(path, (ROOT / path).read_text())]
    counted = [mutant for mutant in everything if not is_equivalent(mutant)]
    chosen = random.Random(options.seed).sample(counted, min(options.count or len(counted), len(counted)))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(Path(folder) / "copy")
        results = bench.judge(chosen, start + 60 * options.minutes)
    killed, tried = sum(results.values()), len(results)
    for mutant in (mutant for mutant, noticed in results.items() if not noticed):
        print(f"survived  {mutant.name}")
    by_file = Counter(str(mutant.path) for mutant, noticed in results.items() if not noticed)
    lost = ", ".join(f"{number} in {name}" for name, number in by_file.items()) or "none"
    share = killed / max(tried, 1)
    figure = (
        f"{killed} of {tried} mutants killed ({share:.1%}), a sample of {len(counted)}; survivors: {lost}; "
        f"{len(everything) - len(counted)} known to change nothing are not counted"
    )
    print(figure)
    if options.report:
        row = {"faults": ["F28"], "test": "tests/soak/mutants.py", "figures": [figure]}
        row |= {"outcome": "passed" if share >= WANTED else "failed", "seconds": round(time.monotonic() - start, 1)}
        plugin.write(options.report, [row], plugin.environment())
    return 0 if share >= WANTED else 1


def targets(only: str) -> list[Path]:
    """The files to change, relative to the repository."""
    found = []
    for name in TESTS:
        path = ROOT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path.relative_to(ROOT) for path in found if only in str(path.relative_to(ROOT))]


def tests_of(path: Path) -> list[str]:
    """The test files that a changed file is tried with."""
    (files,) = [files for name, files in TESTS.items() if path.is_relative_to(name)]
    return [f"tests/{name}" for name in files]


def is_equivalent(mutant: Mutant) -> bool:
    """Whether a mutant is listed as one that changes nothing."""
    rows: list[dict[str, str]] = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text())["mutant"]
    return (str(mutant.path), mutant.text, mutant.change) in {(r["path"], r["text"], r["change"]) for r in rows}


class Bench:
    """A copy of the repository, and a server that runs tests in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        for name in COPIED:
            source, target = ROOT / name, root / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""}
        self.server = subprocess.Popen(
            [sys.executable, root / "tests/soak/forkserver.py"],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, files: Sequence[str], seconds: float) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"files": files, "seconds": seconds, "log": str(self.root / "log")}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def judge(self, chosen: Sequence[Mutant], deadline: float) -> dict[Mutant, bool]:
        """Whether tests notice each mutant, for as many as there is time for."""
        limits = {path: self.limit(tests_of(path)) for path in sorted({mutant.path for mutant in chosen})}
        results: dict[Mutant, bool] = {}
        for number, mutant in enumerate(chosen, start=1):
            if time.monotonic() > deadline:
                break
            original = (ROOT / mutant.path).read_text()
            self.put(mutant.path, mutant.source)
            answer = self.run(tests_of(mutant.path), limits[mutant.path])
            self.put(mutant.path, original)
            results[mutant] = answer["code"] != 0
            word = {0: "SURVIVED", -9: "too slow"}.get(answer["code"], "killed")
            print(f"{number:4d} {word:8s} {answer['seconds']:5.1f} s  {mutant.name}", flush=True)
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)
        return results

    def limit(self, files: Sequence[str]) -> float:
        """Seconds that unchanged code takes, with room; its tests must pass."""
        answer = self.run(files, 1800.0)
        if answer["code"] != 0:
            raise SystemExit((self.root / "log").read_text() + f"\nthe tests fail without a mutant: {files}")
        return 30.0 + 5 * float(answer["seconds"])

    def put(self, path: Path, text: str) -> None:
        """Replace a file and forget what was compiled from it."""
        (self.root / path).write_text(text)
        for compiled in (self.root / path).parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
