"""Charts: where things are in the SVG, colours and numbers; what matplotlib gets."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compress.charts import Bar, Bars, Curves, Segment, Series, draw, save, svg
from compress.charts.chart import BLUE, GREY, PALETTE, RED, colour_of, marker_of, number, ticks
from compress.errors import ChartError

LINE = Series("a <b> & $c$", ((0, 0), (1, 1), (2, float("nan"))), texts=("x", "<y>", "z"))
STEPS = Series("_steps", ((0, 0), (2, 1)), "steps", "cross", RED)
CURVES = Curves("Title", "across", "up", (LINE, STEPS), "What is seen", level=0.5)
BARS = Bars(
    "Bars",
    (Segment("kept", BLUE), Segment("gone", GREY, "faint")),
    (Bar("first", (3, 1), "3 of 4", "A"), Bar("second " * 9, (1, 0), "1", "B")),
)


def elements(picture: Curves | Bars, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg(picture)).iter(tag))


def test_points_are_where_they_should_be() -> None:
    first, second = (
        [tuple(map(float, point.split(","))) for point in each.attrib["points"].split()]
        for each in elements(CURVES, "polyline")
    )
    assert len(first) == 2, "what is no number is left out"
    (left, bottom), (middle, top) = first
    assert bottom > top and left < middle
    assert second == [(left, bottom), (2 * middle - left, bottom), (2 * middle - left, top)]


def test_names_are_text() -> None:
    titles = [each.text for each in elements(CURVES, "title")]
    assert "a <b> & $c$" in titles and "a <b> & $c$, <y>" in titles
    assert "<b>" not in svg(CURVES)
    assert "What is seen" in ElementTree.fromstring(svg(CURVES)).attrib["aria-label"]


def test_bars_have_one_scale_and_headings() -> None:
    kept, gone, small = (float(each.attrib["width"]) for each in elements(BARS, "rect"))
    assert kept == pytest.approx(3 * gone, abs=0.2) and small == pytest.approx(gone, abs=0.2)
    texts = [each.text for each in elements(BARS, "text")]
    assert texts[:2] == ["A", "B"] and "3 of 4" in texts
    assert any(text and text.startswith("…") for text in texts), "long names are cut"
    assert f"{'second ' * 9}: 1" in [each.text for each in elements(BARS, "title")]


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for low, high in ((0.873, 0.912), (-3, 1e7), (5, 5), (0, 0), (-2, -2)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


def test_numbers() -> None:
    assert [number(n) for n in (11_181_642, 950, 0.25, 0, -2500, 3e12)] == [
        "11.2 M", "950", "0.25", "0", "-2.5 k", "3 T",
    ]  # fmt: skip
    assert number(float("inf")) == "inf"


def test_few_series_differ_without_colour_and_many_have_a_ramp() -> None:
    assert len({marker_of(i, 5) for i in range(5)}) == 5
    assert [colour_of(i, 3) for i in range(3)] == list(PALETTE[:3])
    ramp = [colour_of(i, 21) for i in range(21)]
    assert (ramp[0], ramp[10], ramp[20]) == (BLUE, GREY, RED) and len(set(ramp)) == 21
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in ramp)


def test_matplotlib_draws_the_same() -> None:
    pytest.importorskip("matplotlib")
    figure = draw(CURVES)
    (axes,) = figure.axes
    assert axes.get_lines()[1].get_xydata().tolist() == [[0, 0], [2, 1]]
    assert axes.get_xlabel() == "across" and axes.get_title() == "Title"
    names = [text.get_text().lstrip("\u200b") for text in figure.legends[0].get_texts()]
    assert names == [r"a <b> & \$c\$", "_steps"], "no formula, and none is left out"
    (axes,) = draw(BARS).axes
    assert [patch.get_width() for patch in axes.patches] == [3, 1, 1, 0]


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kind, begin in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        save(CURVES, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(begin)
    with pytest.raises(ChartError, match=r"a\.gif: plots \.png, \.svg, \.pdf"):
        save(BARS, tmp_path / "a.gif")
