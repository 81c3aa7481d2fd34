from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from distmuon.train.report.curves import LIGHT, figure, smooth, thin
from distmuon.train.report.markup import duration, number, percent, size, tag
from distmuon.train.report.read import load_runs
from tests.train.synthetic_runs import write_run


def test_thin_keeps_the_extremes() -> None:
    x = np.arange(100_000, dtype=float)
    y = np.sin(x / 5000)
    y[54_321], y[77_777], y[10] = 9.0, -9.0, math.nan
    thin_x, thin_y = thin(x, y, 1000)
    assert 500 <= len(thin_x) <= 1000
    assert np.all(np.diff(thin_x) > 0)
    assert {9.0, -9.0} <= set(thin_y.tolist())
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    short_x, short_y = thin(x[:20], y[:20], 1000)
    assert len(short_x) == len(short_y) == 19, "only the value that is not finite is gone"


def test_the_figure_of_a_long_run_is_thinned_and_names_its_runs(tmp_path: Path) -> None:
    long = write_run(tmp_path / "long", "_$x_{$", [3.0 + math.sin(step) for step in range(3000)])
    drawn = figure(load_runs(long), LIGHT)
    assert all(0 < len(np.asarray(line.get_xdata())) <= 1000 for axes in drawn.axes for line in axes.lines[:2])
    labels = [axes.get_ylabel() for axes in drawn.axes]
    assert labels == ["loss (nats per token)", "learning rate", "gradient norm"]
    assert {axes.get_xlabel() for axes in drawn.axes} == {"optimizer step"}
    legend = drawn.axes[0].get_legend()
    assert legend is not None
    name = legend.get_texts()[0]
    assert name.get_text() == " _$x_{$"
    assert not name.get_parse_math()


def test_the_first_steps_do_not_flatten_the_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "fall", "fall", [50.0, *[3.0 - step / 100 for step in range(99)]])
    loss, rate, _ = figure(load_runs(run), LIGHT).axes
    assert 3.0 < loss.get_ylim()[1] < 4.0
    assert rate.get_ylim()[0] == 0.0


def test_a_gradient_norm_with_spikes_is_drawn_on_a_log_axis(tmp_path: Path) -> None:
    run = write_run(tmp_path / "s", "spiky", [3.0] * 20)
    assert figure(load_runs(run), LIGHT).axes[2].get_yscale() == "linear"
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"grad_norm": 1.0', '"grad_norm": 500.0', 1))
    assert figure(load_runs(run), LIGHT).axes[2].get_yscale() == "log"


def test_smooth_is_a_mean_that_starts_at_the_first_value() -> None:
    y = np.array([8.0, 4.0, 2.0, math.nan, 6.0, math.nan])
    np.testing.assert_allclose(smooth(y, 3), [8.0, 14 / 3, 3.0, 4.0, 6.0, 6.0])
    np.testing.assert_allclose(smooth(y[:3], 1), y[:3])
    assert math.isnan(smooth(np.array([math.nan]), 3)[0])


def test_formats() -> None:
    assert [size(b) for b in (0, 1023, 1536, 5 << 30)] == ["0 B", "1,023 B", "1.50 KiB", "5.00 GiB"]
    assert [duration(s) for s in (0.0042, 0.5, 2.0, 5400.0)] == ["4.20 ms", "500 ms", "2.00 s", "90.0 min"]
    assert (number(None), number(math.inf), number(1234.5, 1)) == ("-", "not finite", "1,234.5")
    assert (percent(None), percent(0.123)) == ("-", "12.3 %")
    assert tag("td", "<&", class_='"') == '<td class="&quot;">&lt;&amp;</td>'


def test_exposed_communication_is_drawn_in_percent_of_the_step(tmp_path: Path) -> None:
    without = write_run(tmp_path / "w", "without", [3.0] * 20)
    exposed = write_run(tmp_path / "e", "exposed", [3.0] * 20, exposed=0.05)
    assert len(figure(load_runs(without), LIGHT).axes) == 3
    axes = figure(load_runs(without, [exposed]), LIGHT).axes[3]
    assert axes.get_ylabel() == "exposed\ncomm. (%)"
    heights = [np.asarray(line.get_ydata()) for line in axes.lines if len(np.asarray(line.get_ydata()))]
    assert len(heights) == 2, "a curve and its smoothed one, of one run"
    assert max(h.max() for h in heights) == 20.0
    assert axes.get_ylim()[0] == 0.0
