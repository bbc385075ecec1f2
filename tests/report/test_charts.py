"""Charts: scales, ticks and thinning by property, drawings by what they contain."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.report.charts import Band, Line, Reference, compact, heatmap, line_chart, smooth, thin, ticks

finite = st.floats(-1e6, 1e6)


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    marks = ticks(low, low + span)

    assert 2 <= len(marks) <= 11
    assert all(low - 1e-6 * span <= mark <= low + span * (1 + 1e-6) for mark in marks)
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 3) in {1, 2, 5, 10}


def test_logarithmic_ticks_are_powers_of_ten() -> None:
    assert ticks(3e-4, 20, log=True) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
    assert ticks(2, 3, log=True) == [2, 3]


@given(st.lists(finite, min_size=1, max_size=80), st.integers(1, 30))
def test_thinning_keeps_the_mean_and_the_limit(values: list[float], most: int) -> None:
    xs, ys = thin(list(range(len(values))), values, most)

    assert len(xs) == len(ys) <= most
    assert min(values) - 1e-6 <= min(ys)
    assert max(ys) <= max(values) + 1e-6


@given(st.lists(finite, max_size=40), st.integers(0, 15))
def test_smoothing_equals_a_naive_average(values: list[float], window: int) -> None:
    reach = window // 2
    expected = [
        sum(near) / len(near) for index in range(len(values)) if (near := values[max(index - reach, 0) : index + reach + 1])
    ]
    assert smooth(values, window) == pytest.approx(expected)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan], 3)[0])


def points(chart: str, label: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(chart)
    [curve] = [node for node in root.iter() if node.get("data-label") == label]
    pairs = curve.get("points") or curve.get("data-points") or ""
    return [tuple(map(float, pair.split(","))) for pair in pairs.split()]  # type: ignore[misc]


def test_curve_rises_where_values_rise_and_skips_nan() -> None:
    drawn = points(line_chart("t", [Line("a", [0, 1, 2, 3], [0.0, 1.0, math.nan, 4.0], "c1")]), "a")

    assert len(drawn) == 3
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert [y for _, y in drawn] == sorted((y for _, y in drawn), reverse=True)


def test_logarithmic_curve_puts_equal_factors_at_equal_distances() -> None:
    drawn = points(line_chart("t", [Line("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, 0.0], "c1")], log=True), "a")

    heights = [y for _, y in drawn]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_values_outside_a_fixed_range_stay_inside_the_drawing() -> None:
    drawn = points(line_chart("t", [Line("a", [0, 1], [-5.0, 9.0], "c1")], y_range=(0, 1), height=200), "a")

    assert all(0 < y < 200 for _, y in drawn)


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_chart_of_nothing_is_empty(values: list[float]) -> None:
    assert line_chart("t", [Line("a", list(range(len(values))), values, "c1")]) == ""
    assert heatmap("t", [], 0.5) == ""


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0, 0.0], [-1.0, -1.0], [1e-9, 2e-9], [1e9, 3e9]])
def test_degenerate_values_can_be_drawn(values: list[float]) -> None:
    chart = line_chart("t", [Line("a", list(range(len(values))), values, "c1")], [Band("b", 0, 1, "c1")])

    assert len(points(chart, "a")) == len(values)


def test_labels_are_escaped_and_do_not_overlap() -> None:
    bands = [Band("<a>", 0, 99, "c1"), Band("second", 99, 100, "c2"), Band("third", 100, 101, "c2")]
    root = ElementTree.fromstring(line_chart("<t>", [Line('"a"', [0, 101], [0, 1], "c1")], bands, [Reference("a & b", 0.5)]))

    texts = [node for node in root.iter("text") if node.text in {"<a>", "second", "third"}]
    assert len({(node.get("y"), node.text) for node in texts}) == 3
    assert texts[1].get("y") != texts[2].get("y")
    assert "a & b" in [node.text for node in root.iter("text")]


def test_heatmap_colours_by_the_distance_from_balance() -> None:
    root = ElementTree.fromstring(heatmap("load", [[0.5, 0.25, 0.0]], 0.25))

    cells = [(cell.get("class"), cell.get("style")) for cell in root.iter("rect")]
    assert cells == [("cell over", "--weight:1.00"), ("cell under", "--weight:0.00"), ("cell under", "--weight:1.00")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_000, "12k"), (2.5e6, "2.5M"), (0.25, "0.25"), (1e-5, "1e-5"), (1000, "1,000"), (1250, "1,250"), (9_999, "9,999"),
     (-2000, "-2,000"), (999, "999"), (2e9, "2B"), (1e15, "1000T"),
     (0.001, "1e-3"), (2.5e-4, "2.5e-4"), (-0.002, "-2e-3"), (0.01, "0.01")],
)  # fmt: skip
def test_axis_numbers_are_short(value: float, text: str) -> None:
    assert compact(value) == text
