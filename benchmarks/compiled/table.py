"""Tables of compiled kernels for the terminal and for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distmuon.benchmarks.compiled.roofline import Work, product, symmetric
from distmuon.benchmarks.compiled.targets import TARGETS

MARKS = ("<!-- kernels -->\n", "<!-- /kernels -->\n")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Batch, rows and columns of matrices that one launch takes.
SHAPES = ((1, 1024, 1024), (16, 1024, 1024), (1, 1024, 4096), (64, 768, 2048), (1, 2048, 8192), (1, 4096, 16384))
TILE, DEPTH = 128, 64
FORMS = {"AB^T": "AA^T", "AB^T + C": "bA + cAA^T", "aX + PX": "aX + BX"}


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compiled(records: list[dict[str, Any]]) -> str:
    """One row per compiled kernel."""
    header = ["target", "kernel", "computes", "variant", "type", "tile", "stages", "warps", "registers", "spilled"]
    header += ["shared KiB", "CTAs/SM", "limited by", "matrix instructions", "LDG", "async copies"]
    return markdown(header, [compiled_row(record) for record in records])


def compiled_row(record: dict[str, Any]) -> list[object]:
    """The cells of one compiled kernel; counts are of the hot loop, or of the whole kernel where there is no loop."""
    variant = record["variant"] + ("" if record["aligned"] else ", odd sizes")
    names = ["target", "kernel", "form"]
    row = [*(record[name] for name in names), variant, DTYPES[record["dtype"]], record["tile"]]
    if "error" in record:
        return [*row, record["stages"], "", "does not compile", *[""] * 7]
    spilled = sum(record.get(name, 0) for name in ("spill_stores", "spill_loads", "spill_vector"))
    tensor = ", ".join(f"{count} {name}" for name, count in record["tensor"].items()) or "-"
    copies = record.get("async_copies", 0) + record.get("tma_loads", 0)
    row += [record["stages"], record["warps"], record["registers"], spilled, f"{record['shared'] / 1024:.0f}"]
    return [*row, record["ctas"], record["limited_by"], tensor, record["ldg"], copies]


def rivals(records: list[dict[str, Any]], ours: list[dict[str, Any]], target: str) -> str:
    """Registers, shared memory and CTAs per multiprocessor of public kernels and of these, tile by tile.

    Args:
        records: of public kernels.
        ours: of these kernels.
        target: the architecture.

    Returns:
        A table; cells read "registers / KiB / CTAs", with bytes spilled if there are any.
    """
    records = [record for record in records if record["target"] == target]
    tiles = list(dict.fromkeys(record["tile"] for record in records))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        name = f"{record['repository'].split('/')[1]} `{record['kernel']}`"
        rows.setdefault((record["computes"], name), {})[record["tile"]] = cell(record)
    for record in ours:
        computes = FORMS.get(record["form"])
        if record["target"] == target and computes and record["dtype"] == "bfloat16" and record["aligned"]:
            tile = f"{record['tile']} s{record['stages']} w{record['warps']}"
            rows.setdefault((computes, f"**distmuon, {record['variant']}**"), {})[tile] = cell(record)
    order = sorted(rows, key=lambda row: list(FORMS.values()).index(row[0]))
    body = [[computes, name, *(rows[computes, name].get(tile, "") for tile in tiles)] for computes, name in order]
    return markdown(["computes", "kernel", *tiles], body)


def cell(record: dict[str, Any]) -> str:
    """Registers, shared memory and CTAs in one cell."""
    spilled = record["spill_stores"] + record["spill_loads"]
    text = f"{record['registers']} / {record['shared'] / 1024:.0f} / {record['ctas']}"
    return f"{text}, spills {spilled} B" if spilled else text


def work() -> list[dict[str, Any]]:
    """Tiles, operations, bytes and bounds of the products of one Newton-Schulz step, by arithmetic."""
    rows = []
    for batch, m, n in SHAPES:
        launches = {
            "XX^T": symmetric(batch, m, n, TILE, DEPTH),
            "bA + cAA^T": symmetric(batch, m, m, TILE, DEPTH),
            "aX + BX": product(batch, m, n, (TILE, TILE), DEPTH),
        }
        for name, launch in launches.items():
            shape = f"{batch} x {m}x{n}"
            rows.append({"shape": shape, "computes": name, **vars(launch), "bounds": bounds(launch)})
    return rows


def bounds(launch: Work) -> dict[str, dict[str, Any]]:
    """Least microseconds on every target at its published peak numbers."""
    found = {name: launch.bound(target) for name, target in TARGETS.items()}
    return {name: {"microseconds": round(1e6 * time, 2), "by": by} for name, (time, by) in found.items()}


def work_table(rows: list[dict[str, Any]]) -> str:
    """The table of work."""
    header = ["matrices", "computes", "tiles", "GFLOP", "of full product", "MB"]
    header += [f"{target.name} ({target.device})" for target in TARGETS.values()]
    body = []
    for row in rows:
        part = f"{row['flops'] / row['full_flops']:.3f}"
        cells = [row["shape"], row["computes"], row["tiles"], f"{row['flops'] / 1e9:.2f}", part]
        cells.append(f"{row['bytes'] / 1e6:.1f}")
        body.append([*cells, *(f"{b['microseconds']:.1f} ({b['by']})" for b in row["bounds"].values())])
    return markdown(header, body)


def document(text: str, results: dict[str, Any], public: dict[str, Any]) -> str:
    """Put all tables between the marks of docs/kernels.md.

    Args:
        text: the document.
        results: what benchmarks/results/kernels.json holds.
        public: what benchmarks/results/rivals.json holds.

    Returns:
        The document with the tables of these results.
    """
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    tools = ", ".join(f"{name} {version}" for name, version in results["tools"].items())
    sources = ", ".join(
        f"[{name}](https://github.com/{name}) {commit[:10]}" for name, commit in public["commits"].items()
    )
    first = [row for row in results["kernels"] if row["default"] and row["aligned"] and row["dtype"] == "bfloat16"]
    parts = [
        f"Compiled, never run, with {tools}.",
        "## First choice of every target",
        compiled(first),
        "## Beside public kernels",
        f"Compiled by us from their public sources with the same tools, never run: {sources}. Cells read registers per "
        "thread / KiB of shared memory per CTA / CTAs per multiprocessor. s is stages, w is warps. "
        "Empty cells: tiles that do not ship, or that the kernel does not take. Ours carry the register limits of "
        "`kernels/tuning.py`; theirs have none.",
        *(f"### {target}\n\n{rivals(public['kernels'], results['kernels'], target)}" for target in public["targets"]),
        "## Work and bounds",
        f"By arithmetic at tiles of {TILE}x{TILE}x{DEPTH} in 16-bit types. The last columns are lower bounds in "
        "microseconds from published peak numbers and what sets them; no run can be faster, none was timed. A tile "
        "runs on one multiprocessor, so that few tiles leave the others idle.",
        work_table(results["work"]),
    ]
    return "\n".join([before + MARKS[0], "\n\n".join(parts), "", MARKS[1] + after])
