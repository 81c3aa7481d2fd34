"""``distmuon bench links``: the command line, the rows, the table, the picture; nothing is measured."""

from __future__ import annotations

from typing import Any

import pytest

from distmuon.benchmarks import links, links_chart, links_report
from distmuon.benchmarks.links_sweep import Sample, Sweep, label
from distmuon.benchmarks.namespaces import Network, NotPermittedError

Captured = pytest.CaptureFixture[str]


def test_defaults() -> None:
    options = links.parse([])
    assert (options.ranks, options.rounds, options.model) == (4, 12, "moe")
    assert options.rates == (None, 10e9, 3e9, 1e9, 300e6, 100e6)


def test_quick_is_shorter_and_gives_way() -> None:
    options = links.parse(["--quick", "--ranks", "2"])
    assert (options.ranks, options.rounds, options.rates) == (2, 2, (None, 1e9, 300e6))
    assert links.parse(["--quick", "--rates", "2G", "--rounds", "5"]).rates == (None, 2e9)


def test_speeds_are_sorted_and_unlimited_comes_first() -> None:
    assert links.rates("100M,2.5g, 1G,unlimited,100m") == (None, 2.5e9, 1e9, 100e6)
    assert links.rates("unlimited") == (None,)
    assert [label(rate) for rate in links.rates("100M,2.5G")] == ["unlimited", "2.5G", "100M"]


@pytest.mark.parametrize("text", ["fast", "100", "-1G", "10K", "nanG", "2000G", "0.5M", ""])
def test_other_speeds_are_refused(text: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        links.parse([f"--rates={text}"])
    assert caught.value.code == 2
    assert f'"{text}" is not a speed from 1M to 1000G' in capsys.readouterr().err


def test_too_few_ranks(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        links.parse(["--ranks", "1"])
    assert '"1" is not a whole number of 2 or more' in capsys.readouterr().err


def test_skipped_where_not_permitted(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def refuse(ranks: int) -> None:
        raise NotPermittedError('"ip netns add a" says "Operation not permitted"')

    monkeypatch.setattr(links, "isolated", refuse)
    monkeypatch.setattr(links.places, "write", lambda *_: pytest.fail("wrote a file"))
    assert links.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(
        'distmuon bench links: skipped, "ip netns add a" says "Operation not permitted"; it needs'
    )


def test_only_full_runs_write(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Any) -> None:
    monkeypatch.setattr(links, "measure", lambda options: results())
    monkeypatch.setattr(links, "RESULTS", tmp_path / "links.json")
    monkeypatch.setattr(links, "PICTURE", tmp_path / "docs" / "links.png")
    assert links.main(["--quick"]) == 0
    assert links.main(["--rounds", "12", "--json", str(tmp_path / "other.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
    assert links.main([]) == 0
    assert '"command": "distmuon bench links"' in (tmp_path / "links.json").read_text()
    assert (tmp_path / "docs" / "links.png").stat().st_size > 10_000


class Answers:
    """Ranks that take fixed seconds and keep what they were asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.sent = 0

    def all(self, **message: Any) -> list[Any]:
        self.asked.append(message)
        if message["do"] == "transfer":
            # 80 and 120 Mbit/s.
            return [message["count"] / 10e6, message["count"] / 15e6]
        if message["do"] == "sent":
            self.sent += 50
            return [self.sent, 3 * self.sent]
        return [
            {"start": 1.0, "end": 1.5, "newton_schulz": 0.1, "update": 0.02},
            {"start": 1.1, "end": 1.75, "newton_schulz": 0.2, "update": 0.01},
        ]


def test_everyone_takes_a_turn_at_every_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float | None] = []
    monkeypatch.setattr(Network, "set_rate", lambda network, rate: limits.append(rate))
    ranks: Any = Answers()
    sweep = Sweep(Network("net", 2), ranks, ["a", "b"])
    begun: list[str] = []
    sweep.run((None, 1e9), 4, begun.append)
    assert limits == [None, 1e9, 1e9, None, None, 1e9]
    assert begun[0] == "visit 1 of 3, unlimited: 2 rounds of 2"
    assert {key: len(samples) for key, samples in sweep.samples.items()} == {
        (name, rate): 4 for name in "ab" for rate in (None, 1e9)
    }
    # From the first start to the last end; bytes are a mean over the ranks, phases those of the slower one.
    assert sweep.samples["a", None][0] == Sample(seconds=0.75, sent=100.0, newton_schulz=0.2, update=0.02)
    assert sweep.goodput(1e9) == pytest.approx(8 / ((1 / 10e6 + 1 / 15e6) / 2))


def test_row() -> None:
    samples = [Sample(seconds, 1e6 * seconds, 0.0, 0.0) for seconds in (5.0, 1.0, 2.0, 3.0, 4.0)]
    row = links_report.row(1e9, samples, predicted=2.4)
    assert (row["low"], row["median"], row["high"], row["sent_bytes"]) == (2.0, 3.0, 4.0, 3e6)
    assert row["error"] == pytest.approx(-0.2)


def results() -> dict[str, Any]:
    def row(rate: float | None, median: float, error: float) -> dict[str, Any]:
        predicted = median * (1 + error)
        spread = {"low": 0.9 * median, "high": 1.1 * median}
        return {"rate": rate, "median": median, **spread, "predicted": predicted, "error": error, "sent_bytes": 23.3e6}

    rows = [row(None, 0.3, 0.0), row(1e9, 0.5, -0.05), row(1e8, 2.5, 0.25)]
    return {
        "machine": {"device": "a CPU", "versions": {"torch": "2"}},
        "model": "a model",
        "ranks": 4,
        "rounds": 12,
        "goodput": [{"rate": None, "bits": 2e10}, {"rate": 1e9, "bits": 9.56e8}, {"rate": 1e8, "bits": 9.56e7}],
        "contenders": [{"name": name, "planned_bytes": 23.2e6, "rows": rows} for name in ("one", "two")],
    }


def test_table() -> None:
    lines = links_report.table(results()).splitlines()
    assert lines[0] == "| seconds a step, 4 ranks | MB sent: planned / left | unlimited | 1G | 100M |"
    assert lines[2] == "| plain sockets get, Mbit/s | | 20000 | 956 | 96 |"
    assert lines[3] == "| one | 23.200 / 23.300 | 0.300 | 0.500 | 2.500 |"
    assert lines[4] == "| ... predicted | |  | 0.475 (-5.0%) | 3.125 (+25.0%) |"
    assert lines[-1] == "2 of 4 predictions lie within 20% of the measured median; the worst is off by 25.0%."


def test_picture_shows_every_point() -> None:
    times, errors = links_chart.draw(results()).axes
    # Of each contender a prediction, and per speed a bar and a point.
    assert len(times.lines) == 2 * (1 + 2 * 3)
    assert (times.get_xscale(), times.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in times.get_xticklabels()] == ["100M", "1G", "unlimited"]
    # Points, and the line at zero.
    assert len(errors.lines) == 2 * 2 + 1
