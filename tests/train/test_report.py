from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from distmuon.errors import DataError
from distmuon.train.report import summary_lines, write_report
from distmuon.train.report.read import load_runs
from tests.train.synthetic_runs import write_run

HOSTILE = '<script>alert("x")</script> $\\frac{'


@pytest.fixture
def muon(tmp_path: Path) -> Path:
    evals = {10: 3.0, 15: 2.4, 20: 2.25}
    return write_run(tmp_path / "muon", "muon-run", [3.0] * 20, evals=evals, wire=1500.0)


@pytest.fixture
def adamw(tmp_path: Path) -> Path:
    config = {"optimizer": {"lr": 0.003, "name": "adamw"}}
    return write_run(tmp_path / "adamw", "adamw-run", [3.5] * 20, evals={10: 3.2, 20: 2.5}, config=config)


class _Page(HTMLParser):
    """Text, tables and tags of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "source", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data + " "
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def row(self, title: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == title)


def render(run: Path, *others: Path) -> _Page:
    return _Page(write_report(run, others).read_text(encoding="utf-8"))


def test_result_beside_the_other_run(muon: Path, adamw: Path) -> None:
    page = render(muon, adamw)
    assert page.row("validation loss (nats per token)") == ["2.2500", "2.5000"]
    assert page.row("validation accuracy") == ["37.5 %", "37.5 %"]
    assert page.row("bits per byte") == ["1.2345", "1.2345"]
    assert page.row("tokens") == ["2,000", "2,000"]
    assert page.row("wall time") == ["75.00 s", "75.00 s"]
    assert page.row("tokens per second (median)") == ["400", "400"]
    assert "Final validation loss of muon-run is 10.00% lower than that of adamw-run." in page.text
    reached = "muon-run reached the final loss of adamw-run by step 15 of 20: a speed-up of at least 1.33 in steps."
    assert reached in page.text
    assert "failed" not in page.text
    assert "not finished" not in page.text


def test_the_other_direction(muon: Path, adamw: Path) -> None:
    lines = summary_lines(adamw, [muon])
    assert lines[0] == "final validation loss  adamw-run  2.5000  at step 20"
    assert lines[1] == "final validation loss  muon-run   2.2500  at step 20"
    assert lines[2] == "Final validation loss of adamw-run is 11.11% higher than that of muon-run."
    assert lines[3].startswith("muon-run reached the final loss of adamw-run by step 15 of 20")
    assert len(lines) == 4


def test_runs_with_different_batches_are_compared_by_tokens(tmp_path: Path, adamw: Path) -> None:
    run = write_run(tmp_path / "big", "big", [3.0] * 20, evals={10: 2.4, 20: 2.0}, tokens_per_step=400)
    lines = "\n".join(summary_lines(run, [adamw]))
    assert "by step 10, after 4,000 tokens of 2,000: a speed-up of at least 0.50 in tokens." in lines


def test_settings_that_differ_come_first(muon: Path, adamw: Path) -> None:
    page = render(muon, adamw)
    keys = [row[0] for row in page.rows if row[0].startswith("optimizer.")]
    assert keys == ["optimizer.lr", "optimizer.name"] * 2
    assert page.row("optimizer.lr") == ["0.02", "0.003"]
    config = {"optimizer": {"lr": 0.02, "name": "adamw"}}
    same_lr = write_run(muon.parent / "same", "same", [3.0] * 4, config=config)
    page = render(muon, same_lr)
    keys = [row[0] for row in page.rows if row[0].startswith("optimizer.")]
    assert keys == ["optimizer.name", "optimizer.lr", "optimizer.name"]


def test_step_time_without_the_warm_up(muon: Path) -> None:
    page = render(muon)
    assert page.row("forward_backward") == ["150 ms", "60.0 %"]
    assert page.row("newton_schulz") == ["50.00 ms", "20.0 %"]
    assert page.row("not split") == ["50.00 ms", "20.0 %"]
    assert page.row("whole step") == ["250 ms", "100.0 %"]
    assert "muon-run: 18 steps, the first 2 left out" in page.text
    assert "complete" not in [row[0] for row in page.rows], "a part without time is not shown"
    styles = [attrs.get("style") or "" for _, attrs in page.tags]
    widths = [style.split(";")[0] for style in styles if "width:" in style]
    assert widths == ["width:60.000%", "width:20.000%", "width:20.000%"]


def test_skipped_steps_do_not_count_for_speed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "s", "skips", [3.0] * 20, skipped=(4, 5, 6, 7, 8))
    assert "skips: 14 steps, the first 1 left out" in render(run).text


def test_traffic_state_and_routing(muon: Path, adamw: Path) -> None:
    page = render(muon, adamw)
    assert ["muon-run", "reduce_scatter", "float32", "2", "3.0", "2.93 KiB", "1.46 KiB"] in page.rows
    assert ["adamw-run", "1,000 B", "1.500"] in page.rows
    assert ["muon-run", "2", "2.00 KiB", "3.00 KiB", "1.500", "4.00 KiB"] in page.rows
    assert page.row("muon") == ["6", "600", "75.0 %"]
    assert page.row("embedding") == ["adamw", "1", "200"]
    assert page.row("torch")[0] == "2.13.0"
    assert page.row("source")[0] == "some-text"


def test_hostile_names_are_text(tmp_path: Path, muon: Path) -> None:
    config = {"<img src=x>": '"><script>'}
    end = {"type": "error", "step": 3, "message": HOSTILE}
    run = write_run(tmp_path / "h", HOSTILE, [1.0, 2.0, 3.0], config=config, data={"<b>": "</td>"}, end=end)
    page = render(run, muon)
    names = [name for name, _ in page.tags]
    assert "script" not in names
    assert names.count("img") == 1
    assert page.text.count('<script>alert("x")</script>') > 3
    assert page.row("<img src=x>")[0] == '"><script>'


def test_labels_are_short_printable_and_distinct(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"r{i}", name, [1.0]) for i, name in enumerate(["_a\n\x1b[2J", "x" * 99, "x" * 99])]
    labels = [run.label for run in load_runs(paths[0], paths[1:])]
    assert labels == ["_a??[2J", "x" * 37 + "...", "x" * 37 + "... (2)"]
    render(paths[0], *paths[1:])
    assert len(load_runs(paths[0], [paths[0], tmp_path / "r1" / ".." / "r0"])) == 1


def test_the_page_is_self_contained(muon: Path) -> None:
    html = write_report(muon).read_text(encoding="utf-8")
    page = _Page(html)
    assert not {"script", "link", "a", "iframe"} & {name for name, _ in page.tags}
    assert "http" not in html
    assert "url(" not in html
    image = next(attrs for name, attrs in page.tags if name == "img")
    assert (image["src"] or "").startswith("data:image/png;base64,")
    night = html[html.index("@media (prefers-color-scheme:dark){") :]
    assert ".run0{background:#56B4E9}" in night
    assert 'name="viewport"' in html


def test_the_curves_are_a_png_with_the_colours_of_the_runs(muon: Path, adamw: Path) -> None:
    write_report(muon, [adamw])
    image = Image.open(muon / "loss.png").convert("RGB")
    assert image.size == (1280, 1200)
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert (0x00, 0x9E, 0x73) not in colours, "the third colour belongs to a third run"
    assert sorted(path.name for path in muon.iterdir()) == ["loss.png", "metrics.jsonl", "report.html"]


def test_a_failed_run_says_so_at_the_top(tmp_path: Path, adamw: Path) -> None:
    end = {"type": "error", "step": 4, "message": "rank 1 ran out of memory"}
    run = write_run(tmp_path / "f", "broken", [3.0] * 4, evals={2: 2.75}, end=end, skipped=(2, 3))
    page = render(run, adamw)
    top = page.text[: page.text.index("Settings")]
    assert "broken failed at step 4: rank 1 ran out of memory" in top
    assert "broken skipped the update of 2 steps (2, 3)." in top
    assert "last validation loss, failed, step 2" in top
    assert "2.7500" in top
    assert "No comparison of broken with adamw-run: broken did not finish." in top
    assert page.row("skipped steps") == ["2", "0"]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "u", "going", [3.0] * 4, end={})
    text = render(run).text
    assert "going has not finished" in text
    assert "its last step on record is 4." in text
    assert "not measured" in text
    assert "the traffic is written at the end of a run" in text
    assert summary_lines(run)[0] == "last validation loss   going  not measured"


def test_a_cut_last_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "c", "cut", [3.0] * 4)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert "The last line of the metrics of cut was cut off" in render(run).text


@pytest.mark.parametrize("content", ["", '{"type": "run"'])
def test_a_run_without_any_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text(content)
    page = render(tmp_path / "empty")
    assert "empty has not finished" in page.text
    assert "No steps on record." in page.text


def test_losses_that_are_not_finite(tmp_path: Path, adamw: Path) -> None:
    run = write_run(tmp_path / "n", "diverged", [3.0, math.nan, math.nan], evals={3: math.nan}, end=None)
    page = render(run, adamw)
    assert "The training loss of diverged was not finite in 2 steps (2, 3)." in page.text
    assert page.row("validation loss (nats per token)")[0] == "not finite"
    assert "a final validation loss is not finite" in page.text


def test_different_data_is_pointed_out(tmp_path: Path, muon: Path) -> None:
    other = write_run(tmp_path / "o", "other", [3.0], data={"source": "code"})
    assert any("differ in their data (source)" in line for line in summary_lines(muon, [other]))


def test_a_directory_without_metrics(tmp_path: Path, muon: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        write_report(muon, [tmp_path / "nothing"])
    assert not (muon / "report.html").exists()


def test_terminal_lines_hold_no_control_characters(tmp_path: Path) -> None:
    end = {"type": "error", "step": 1, "message": "a\n\x1b[31mb"}
    assert all(line.isprintable() for line in summary_lines(write_run(tmp_path / "t", "t", [1.0], end=end)))


def test_png_in_the_page_is_the_file(muon: Path) -> None:
    html = write_report(muon).read_text(encoding="utf-8")
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)[0]
    assert base64.b64decode(encoded) == (muon / "loss.png").read_bytes()
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).format == "PNG"


TRACE = {
    "type": "trace",
    "first": 2,
    "last": 3,
    "ranks": [
        {"communication_s": 0.4, "hidden_s": 0.3, "exposed_s": 0.1},
        {"communication_s": 0.2, "hidden_s": 0.0, "exposed_s": 0.2},
    ],
}


def test_exposed_communication(tmp_path: Path, adamw: Path) -> None:
    run = write_run(tmp_path / "w", "waits", [3.0] * 20, exposed=0.05)
    page = render(run, adamw)
    at = page.rows.index(["run", "exposed per step", "share of the step"])
    assert page.rows[at + 1 : at + 3] == [["waits", "50.00 ms", "20.0 %"], ["run", *page.rows[at + 2][1:]]]
    assert Image.open(run / "loss.png").size == (1280, 1500)
    lines = summary_lines(run, [adamw])
    assert lines[2] == "exposed communication  waits      50.00 ms a step, 20.0 % of it"
    assert not any(line.startswith("timeline") for line in lines)


def test_a_timeline_says_what_was_hidden(tmp_path: Path) -> None:
    run = write_run(tmp_path / "t", "traced", [3.0] * 20, exposed=0.05, trace=TRACE)
    page = render(run)
    assert ["traced", "steps 2 to 3", "0", "200 ms", "150 ms", "50.00 ms", "75.0 %"] in page.rows
    assert ["traced", "steps 2 to 3", "1", "100 ms", "0.00 ms", "100 ms", "0.0 %"] in page.rows
    assert ["traced", "steps 2 to 3", "all", "", "", "", "50.0 %"] in page.rows
    lines = summary_lines(run)
    assert lines[1] == "exposed communication  traced  50.00 ms a step, 20.0 % of it; 50.0 % of communication hidden"
    assert lines[-1] == f"timeline: {run / 'trace.json'}"


def test_a_timeline_without_communication(tmp_path: Path) -> None:
    ranks = [{"communication_s": 0.0, "hidden_s": 0.0, "exposed_s": 0.0}]
    run = write_run(tmp_path / "t", "single", [3.0] * 20, trace={**TRACE, "ranks": ranks})
    assert "a run on one rank and a stock optimizer have none" in render(run).text
    assert [line for line in summary_lines(run) if "exposed" in line] == []
    run = write_run(tmp_path / "u", "quiet", [3.0] * 20, exposed=0.0, trace={**TRACE, "ranks": ranks})
    assert ["quiet", "0.00 ms", "0.0 %"] in render(run).rows
    assert "hidden" not in "\n".join(summary_lines(run))
