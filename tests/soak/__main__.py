"""``make soak``: all that takes too long for ``make test``, then docs/reliability.md from what it found.

``python -m tests.soak [PART] [--FLAG VALUE ...]``; without a part, all of them in turn.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import report
from tests.soak import kills, mutants

RUNS = Path("runs") / "soak"


def tests(arguments: Sequence[str]) -> int:
    """Every test there is."""
    command = [sys.executable, "-m", "pytest", "--soak", f"--fault-report={RUNS / 'tests.json'}", *arguments]
    return subprocess.run(command, check=False).returncode


def audit(_: Sequence[str]) -> int:
    """Known vulnerabilities of what is installed; needs pip-audit and an index that answers its questions."""
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed: pip install pip-audit", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "pip_audit", "--progress-spinner", "off"], check=False).returncode


def page(_: Sequence[str]) -> int:
    """The tables of docs/reliability.md, from the reports of the parts that have run."""
    return report.main([str(path) for path in sorted(RUNS.glob("*.json"))])


PARTS: dict[str, Callable[[Sequence[str]], int]] = {
    "tests": tests,
    "mutants": lambda arguments: mutants.main(["--report", str(RUNS / "mutants.json"), *arguments]),
    "kills": lambda arguments: kills.main(["--report", str(RUNS / "kills.json"), *arguments]),
    "page": page,
    "audit": audit,
}
# An audit asks a server that not every machine can reach.
ALL = ("tests", "mutants", "kills", "page")


def main(arguments: Sequence[str]) -> int:
    """Run one part, or all; exit status 1 if one of them failed."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if arguments and arguments[0] not in PARTS:
        print(f'"{arguments[0]}" is no part; use one of {", ".join(PARTS)}.', file=sys.stderr)
        return 2
    parts, rest = ([arguments[0]], arguments[1:]) if arguments else (list(ALL), ())
    failed = [name for name in parts if PARTS[name](rest)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
