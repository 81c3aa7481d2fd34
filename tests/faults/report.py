"""Writes docs/reliability.md from fault reports: ``python -m tests.faults.report RUN.json [MORE.json ...]``.

The reports of several runs are joined in benchmarks/results/reliability.json, where a later result of a test replaces
an earlier one; without a report, the page is written again from that file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults import plugin

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = ("<!-- faults -->", "<!-- /faults -->")
HEADER = ("| | what goes wrong | what must hold | status | tests |", "|---|---|---|---|---|")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Join the reports and write the page; exit status 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("reports", nargs="*", type=Path, metavar="RUN.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    if options.reports:
        joined = join(json.loads(path.read_text(encoding="utf-8")) for path in options.reports)
        plugin.write(options.results, joined["tests"], joined["environment"])
    results = json.loads(options.results.read_text(encoding="utf-8"))
    options.out.write_text(with_tables(options.out.read_text(encoding="utf-8"), results), encoding="utf-8")
    bad = [row for row in results["tests"] if row["outcome"] in ("failed", "error")]
    for row in bad:
        print(f"{row['outcome']}: {row['test']}", file=sys.stderr)
    return 1 if bad else 0


def join(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One report of several; a skipped test does not replace one that ran."""
    tests: dict[str, Row] = {}
    environment: dict[str, Any] = {}
    for report in reports:
        environment = report["environment"]
        for row in report["tests"]:
            if row["outcome"] != "skipped" or row["test"] not in tests:
                tests[row["test"]] = row
    return {"environment": environment, "tests": sorted(tests.values(), key=lambda row: row["test"])}


def with_tables(page: str, results: dict[str, Any]) -> str:
    """Put the tables between the marks of the page."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    body = "\n".join(lines(results["tests"], results["environment"]))
    return f"{before}{MARKS[0]}\n\n{body}\n\n{MARKS[1]}{after}"


def lines(tests: Sequence[Row], environment: dict[str, Any]) -> Iterator[str]:
    """The generated part of the page."""
    table = plugin.read_table()
    by_fault = {name: [row for row in tests if name in row["faults"]] for name in table}
    statuses = Counter(status(rows).split(":")[0] for name, rows in by_fault.items() if name.startswith("F"))
    yield (
        f"{counts(tests)} on {described(environment)}. Of 28 faults: "
        + ", ".join(f"{number} {name}" for name, number in statuses.most_common())
        + "."
    )
    for letter, title in (("F", "Faults"), ("S", "Silent failures of other implementations")):
        chosen = {name: row for name, row in table.items() if name.startswith(letter)}
        yield from (
            "",
            f"## {title}",
            "",
            "| | what goes wrong | what must hold | status | tests |",
            "|---|---|---|---|---|",
        )
        for name, row in chosen.items():
            ran = by_fault[name]
            yield f"| {name} | {row['fault']} | {row['holds']} | {status(ran)} | {tested(ran)} |"
    yield from ("", "## Measured", "", "Numbers that differ between the cases of a test stand as a range.")
    for name, row in table.items():
        found = list(measured(by_fault[name]))
        if found:
            yield from ("", f"**{name}, {row['fault']}**", "", *found)


def described(environment: dict[str, Any]) -> str:
    """What the tests ran on, in words."""
    return "torch {torch}, Python {python}, {system}, {cores} cores".format(**environment)


def counts(tests: Sequence[Row]) -> str:
    """How many tests ended how."""
    ends = Counter(row["outcome"] for row in tests)
    order = [name for name in ("passed", "failed", "error", "skipped") if ends[name]]
    return ", ".join(f"{ends[name]} {name}" for name in order) or "0 tests"


def status(tests: Sequence[Row]) -> str:
    """What is known about a fault, in words."""
    ends = Counter(row["outcome"] for row in tests)
    if not tests:
        return "**no test**"
    if ends["failed"] or ends["error"]:
        return f"**FAILS**: {ends['failed'] + ends['error']} of {len(tests)} tests"
    if not ends["passed"]:
        return "**not run**"
    return "holds" if not ends["skipped"] else f"holds in part: {ends['skipped']} tests skipped"


def tested(tests: Sequence[Row]) -> str:
    """The files that test a fault, each with its outcomes; failed tests by name."""
    files: dict[str, list[Row]] = defaultdict(list)
    for row in tests:
        files[row["test"].split("::")[0]].append(row)
    cells = [f"`{name}`: {counts(rows)}" for name, rows in sorted(files.items())]
    failed = [f"`{row['test'].split('::')[-1]}`" for row in tests if row["outcome"] in ("failed", "error")]
    return "<br>".join([*cells, *failed]).replace("|", "\\|") or "-"


def measured(tests: Sequence[Row]) -> Iterator[str]:
    """The figures of a fault, one line for all cases of a test that differ in numbers only."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in tests:
        for sentence in row["figures"]:
            groups[row["test"].split("[")[0], NUMBER.sub("#", sentence)].append(sentence)
    for (test, _), sentences in groups.items():
        times = f" ({len(sentences)} times)" if len(sentences) > 1 else ""
        yield f"- {merged(sentences)}{times}: `{test}`"


def merged(sentences: Sequence[str]) -> str:
    """One sentence for several that differ in numbers only, each of which becomes a range."""
    columns = iter(list(zip(*(NUMBER.findall(sentence) for sentence in sentences), strict=True)))

    def span(_: re.Match[str]) -> str:
        texts = sorted(set(next(columns)), key=lambda text: float(text.replace(",", "")))
        return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"

    return NUMBER.sub(span, sentences[0]).rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
