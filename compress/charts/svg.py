"""Charts as SVG for a page: text and axes in the page's own colour, so that dark pages work.

No matplotlib is needed. Names go through the template's escaping, as all text does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import jinja2
from markupsafe import Markup

from compress.charts.chart import Bars, Curves, Picture, Series, finite, number, ticks

_WIDTH, _HEIGHT = 520, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 28, 12, 46
_ROW, _HEADING = 20, 26
_NAMES, _TEXTS = 186, 96  # what a bar has at its left and right
_LETTERS = 23


@dataclass(frozen=True)
class _Axes:
    """From values to places."""

    x: list[float]
    y: list[float]

    @staticmethod
    def of(chart: Curves) -> _Axes:
        points = [point for series in chart.series for point in finite(series.points)]
        across, up = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
        up = up if chart.level is None else [*up, chart.level]
        return _Axes(ticks(min(across), max(across)), ticks(min(up), max(up)))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[-1] - self.x[0])
        up = (y - self.y[0]) / (self.y[-1] - self.y[0])
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )


def svg(picture: Picture) -> Markup:
    """An ``<svg>`` element to be put into a page, as a picture with its alternative text."""
    if isinstance(picture, Bars):
        return _rendered("bars.svg.jinja", chart=picture, **_rows(picture))
    axes = _Axes.of(picture)
    lines = [_line(series, axes) for series in picture.series]
    level = None if picture.level is None else axes.place(axes.x[0], picture.level)[1]
    return _rendered(
        "curves.svg.jinja",
        chart=picture,
        lines=lines,
        level=level,
        box=(_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        size=(_WIDTH, _HEIGHT),
        across=[(axes.place(x, axes.y[0])[0], number(x)) for x in axes.x],
        up=[(axes.place(axes.x[0], y)[1], number(y)) for y in axes.y],
    )


def _line(series: Series, axes: _Axes) -> dict[str, object]:
    """Where the parts of a series are."""
    texts = series.texts or tuple(f"{number(x)}: {y:.4g}" for x, y in series.points)
    shown = [text for text, point in zip(texts, series.points, strict=True) if finite([point])]
    places = [axes.place(x, y) for x, y in finite(series.points)]
    joined = places
    if series.style == "steps":
        corners = pairwise(places)
        joined = [*places[:1], *(p for (_, y), b in corners for p in ((b[0], y), b))]
    return {
        "series": series,
        "path": " ".join(f"{x:g},{y:g}" for x, y in joined),
        "joined": series.style in ("line", "steps"),
        "points": list(zip(places, shown, strict=True)),
    }


def _rows(chart: Bars) -> dict[str, object]:
    """Where the bars are, and the size of it all."""
    scale = (_WIDTH - _NAMES - _TEXTS) / chart.longest
    rows, headings, top, group = [], [], 4, ""
    for row in chart.rows:
        if row.group != group:
            headings.append((top + 17, row.group))
            top, group = top + _HEADING, row.group
        left, parts = float(_NAMES), []
        for segment, length in zip(chart.segments, row.lengths, strict=True):
            parts.append((round(left, 1), round(length * scale, 1), segment))
            left += length * scale
        short = row.name if len(row.name) <= _LETTERS else f"…{row.name[1 - _LETTERS :]}"
        rows.append((top, short, row, parts, round(left + 6, 1)))
        top += _ROW
    return {"rows": rows, "headings": headings, "size": (_WIDTH, top + 4), "names": _NAMES - 8}


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("compress.charts"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _rendered(template: str, **values: object) -> Markup:
    return Markup(_environment().get_template(template).render(values))
