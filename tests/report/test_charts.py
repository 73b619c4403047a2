"""SVG charts: ticks, labels, places."""

import math
import re

import pytest

from flowgrpo_jax.report.charts import Series, _label, _smooth, _ticks, chart, number


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.9268, True, "92.7%"),
        (0.0, False, "0"),
        (0.5436, False, "0.544"),
        (4e-4, False, "4e-4"),
        (-1.26e-7, False, "-1.3e-7"),
        (57600.0, False, "57,600"),
        (1.5e6, False, "1.5e6"),
    ],
)
def test_numbers_are_short(value, percent, text):
    """Oracle: the texts, written out by hand."""
    assert number(value, percent) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.31, 0.94, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3e-4, 2e-4, [-4e-4, -2e-4, 0, 2e-4]),
        (0.0, 300.0, [0, 100, 200, 300]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low, high, ticks):
    """Oracle: the ticks, written out by hand."""
    assert _ticks(low, high) == pytest.approx(ticks, abs=1e-12)


def test_labels_tell_neighbouring_ticks_apart():
    """Oracle: the texts, written out by hand."""
    assert _label(0.25, 0.25, False) == "0.25"
    assert _label(1.00002, 2e-5, False) == "1.00002"
    assert _label(2e-4, 2e-4, False) == "2e-4"
    assert _label(0.8, 0.2, True) == "80%"
    assert _label(0.875, 0.025, True) == "87.5%"


def test_the_running_mean_keeps_a_line_and_calms_noise():
    """Oracle: closed form; the mean of a line is the line, inside the window."""
    line = [0.1 * i for i in range(90)]
    assert _smooth(line)[3:-3] == pytest.approx(line[3:-3])
    zigzag = [(-1.0) ** i for i in range(90)]
    assert max(map(abs, _smooth(zigzag))) <= 1 / 4 + 1e-12


def test_points_lie_where_the_axes_say():
    """Oracle: the smallest value is lowest, the largest highest, x evenly spaced."""
    svg = chart("t", [Series("s", [(0, 0.0), (10, 1.0), (20, math.nan), (20, 0.5)])])
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in circles]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 < y2 < y0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.11)
    assert chart("t", [Series("s", [(0, math.inf)])]) == ""


def test_iterations_are_whole():
    """Oracle: the ticks, written out by hand; minutes may be halves."""
    series = [Series("s", [(0, 0.0), (2, 1.0)])]

    def ticks(svg):
        return re.findall(r'y="202" text-anchor="middle">([^<]+)<', svg)

    assert ticks(chart("t", series)) == ["0", "1", "2"]
    assert ticks(chart("t", series, "minutes")) == ["0", "0.5", "1", "1.5", "2"]


def test_flat_single_and_escaped_series_draw():
    """Oracle: well-formed XML whatever the name and the values."""
    from xml.dom.minidom import parseString

    for points in ([(0, 0.0)], [(0, 5.0), (9, 5.0)], [(0, -1e-9), (1, -1e-9)]):
        for noisy in (True, False):
            for percent in (True, False):
                series = Series("<a & b>", points, noisy=noisy)
                parseString(chart("<t>", [series], percent=percent, note="&"))
    many = [(i, float(i)) for i in range(100_000)]
    assert len(chart("t", [Series("s", many, noisy=True)])) < 20_000
