"""The page ``report.html``: one file without scripts or links, readable on a phone, light and dark."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path

from distmuon.train.report import sections
from distmuon.train.report.compare import cautions, comparisons, failures
from distmuon.train.report.curves import DARK, LIGHT, Theme, draw, smoothing_window
from distmuon.train.report.markup import Markup, join, tag
from distmuon.train.report.overlap import overlap
from distmuon.train.report.read import RunView, load_runs

_STYLE = """
:root{color-scheme:light dark;
--bg:#fff;--ink:#24292f;--soft:#59636e;--line:#d8dee4;--card:#f6f8fa;--bad:#b42318}
body{background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
margin:0 auto;max-width:56rem;padding:1rem}
h1{font-size:1.5rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin-bottom:.3rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}
.card{background:var(--card);color:var(--soft);font-size:.85rem;
border-radius:.5rem;padding:.7rem 1rem;flex:1 1 12rem}
.card .who{color:var(--ink);white-space:normal;overflow-wrap:anywhere;font-size:1rem}
.big{color:var(--ink);font-size:2rem;line-height:1.3}
.bad{border-left:4px solid var(--bad);padding:.1rem 0 .1rem .8rem;overflow-wrap:anywhere;white-space:pre-wrap}
.note{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td:first-child{min-width:8rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.who{white-space:nowrap}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em}
.bar{display:flex;height:1.6rem;margin:.1rem 0 .7rem}
.bar span{box-sizing:border-box;border-right:1px solid var(--bg)}
.bars{font-size:.9rem}
summary{cursor:pointer;margin:.4rem 0}
img{width:100%;height:auto;display:block}
"""
_DARK = ":root{--bg:#15181c;--ink:#d8dde3;--soft:#9aa4af;--line:#363c44;--card:#1f242a;--bad:#ff7b6b}"


def write_report(run_dir: Path, others: Sequence[Path] = ()) -> Path:
    """Write ``loss.png`` and ``report.html`` into the directory of a run, finished or not.

    Args:
        run_dir: directory of the run, with its ``metrics.jsonl``.
        others: directories of runs that are drawn beside it.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: a directory holds no readable metrics.
    """
    runs = load_runs(run_dir, others)
    light, dark = draw(runs, LIGHT), draw(runs, DARK)
    html = page(runs, light, dark)
    _replace(Path(run_dir) / "loss.png", light)
    target = Path(run_dir) / "report.html"
    _replace(target, html.encode("utf-8", "xmlcharrefreplace"))
    return target


def page(runs: Sequence[RunView], light: bytes, dark: bytes) -> str:
    """Put the page together.

    Args:
        runs: the run of the report, then the others.
        light: curves as PNG for a light page.
        dark: the same for a dark page.

    Returns:
        The HTML document.
    """
    title = f"Run {runs[0].label}"
    problems = [line for run in runs for line in failures(run)]
    remarks = [*comparisons(runs), *cautions(runs)]
    body = [
        tag("h1", title),
        *[tag("p", line, class_="bad") for line in problems],
        sections.headline(runs),
        *[tag("p", line) for line in remarks],
        _section("Settings", sections.settings(runs)),
        _section("Curves", _curves(runs, light, dark)),
        _section("Result", sections.results(runs)),
        _section("Where the time of a step went", sections.step_time(runs)),
        _section("Communication", sections.traffic(runs)),
        _section("Exposed communication", overlap(runs)),
        _section("Optimizer state", sections.state(runs)),
        _section("Routing", sections.routing(runs)),
        _section("Data and environment", sections.provenance(runs)),
    ]
    night = f"@media (prefers-color-scheme:dark){{{_DARK}{_colours(DARK)}}}"
    style = Markup(f"<style>{_STYLE}{_colours(LIGHT)}{night}</style>")
    viewport = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">')
    head = tag("head", viewport, tag("title", title), style)
    return f'<!DOCTYPE html>\n<html lang="en">{head}{tag("body", *body)}</html>\n'


def _section(title: str, content: Markup) -> Markup:
    return tag("section", tag("h2", title), content)


def _colours(theme: Theme) -> str:
    return "".join(f".run{index}{{background:{colour}}}" for index, colour in enumerate(theme.runs))


def _curves(runs: Sequence[RunView], light: bytes, dark: bytes) -> Markup:
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in (light, dark)]
    picture = Markup(
        f'<picture><source media="(prefers-color-scheme:dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="Loss, learning rate, gradient norm and exposed communication by optimizer step">'
        "</picture>"
    )
    windows = ", ".join(f"{run.label} {smoothing_window(len(run.metrics.steps)):,}" for run in runs)
    note = (
        f"Smoothed: mean over a number of steps ({windows}). "
        "The loss axis may cut off the first steps and spikes. "
        "Long runs are drawn through the lowest and highest value of every stretch."
    )
    return join([picture, tag("p", note, class_="note")])


def _replace(path: Path, content: bytes) -> None:
    """Write a file at once, so that a reader meanwhile sees the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
