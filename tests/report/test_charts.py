"""Charts: where things are drawn, and that the values are there to read."""

import re

import numpy as np
import pytest

from vaeflow.report.charts import HEIGHT, WIDTH, Bar, bars, histogram, lines

EVIL = "<script>alert(1)</script>"


def numbers(svg, attribute):
    return [float(found) for found in re.findall(rf'{attribute}="([-\d.]+)"', svg)]


@pytest.mark.parametrize("values", [[1.0, 2, 4], [-1e6, -5e5, 1e6], [3.0, 3, 3], [1e-9, 2e-9, 0]])
def test_lines_stay_inside_and_keep_their_order(values):
    chart = lines("title", "epoch", "nats", {"train": (np.arange(3.0), np.array(values))})
    (points,) = re.findall(r'points="([^"]+)"', chart.svg)
    places = np.array([point.split(",") for point in points.split()], float)
    assert (places[:, 0] >= 0).all()
    assert (places[:, 0] <= WIDTH).all()
    assert (places[:, 1] >= 0).all()
    assert (places[:, 1] <= HEIGHT).all()
    assert np.array_equal(
        np.argsort(-places[:, 1], kind="stable"), np.argsort(values, kind="stable")
    )
    assert chart.header == ["epoch", "train"]
    assert [row[0] for row in chart.rows] == ["0", "1", "2"]
    assert len(re.findall("<title>", chart.svg)) == 3


def test_what_is_no_number_is_left_out():
    chart = lines("t", "x", "y", {"a": (np.arange(3.0), np.array([1, np.nan, 2]))})
    assert "nan" not in chart.svg
    assert [row[0] for row in chart.rows] == ["0", "2"]


def test_bars_are_as_long_as_their_values():
    rows = [Bar("one", 0.5, 0.1, 0.25), Bar("two", 1.0), Bar("none", 0.0), Bar("below", -1.0)]
    chart = bars("title", "AUROC", rows, 0.0, 1.0)
    one, two, none, below = numbers(chart.svg, "width")
    assert two == pytest.approx(2 * one, abs=0.2)
    assert none == below == 0
    assert chart.rows == [
        ["one", "0.5 ± 0.1", "0.25"],
        ["two", "1"],
        ["none", "0"],
        ["below", "-1"],
    ]
    assert "one: 0.5 ± 0.1; marked: 0.25" in chart.svg


def test_shares_of_a_histogram_are_those_of_numpy():
    rng = np.random.default_rng(0)
    groups = {"a": rng.normal(size=400), "b": rng.normal(2, 1, 100)}
    chart = histogram("title", "anomaly", groups, line=5.0)
    shares = [[float(cell.rstrip("%")) for cell in row[1:]] for row in chart.rows]
    np.testing.assert_allclose(np.sum(shares, axis=0), 100, atol=0.6)
    assert len(chart.rows) == 11  # of a hundred images
    assert "threshold: 5" in chart.svg
    assert len(histogram("t", "x", {"few": np.arange(4.0)}).rows) == 5


def test_names_stay_text():
    drawn = [
        lines(EVIL, EVIL, EVIL, {EVIL: (np.arange(2.0), np.arange(2.0))}),
        bars(EVIL, EVIL, [Bar(EVIL, 1.0)]),
        histogram(EVIL, EVIL, {EVIL: np.arange(4.0)}),
    ]
    for chart in drawn:
        assert "<script" not in chart.svg
        assert "&lt;script&gt;" in chart.svg
