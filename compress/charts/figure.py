"""Charts as matplotlib figures: for papers, and wherever a picture has to be a file."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.charts.chart import GREY, PALETTE, Bars, Curves, Picture, Series
from compress.errors import ChartError
from compress.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "cross": "x"}
_DRAWN = {"line": "-", "steps": "-", "points": "none", "rings": "none"}


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise ChartError where it is missing."""
    if not can_draw():
        raise ChartError("figures need matplotlib: pip install 'compress-torch[report]'")


def draw(picture: Picture) -> Figure:
    """A matplotlib figure of a chart, which can be changed before it is saved.

    Raises:
        ChartError: matplotlib is not installed.
    """
    require_matplotlib()
    return _bars(picture) if isinstance(picture, Bars) else _curves(picture)


def save(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Draw a chart to a .png, .svg or .pdf file.

    Raises:
        ChartError: matplotlib is not installed, or there is no such kind of file.
    """
    check_format(path)
    save_figure(draw(picture), path)


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise ChartError for a file that no figure can be saved to."""
    if Path(path).suffix not in FORMATS:
        raise ChartError(
            f"{os.fspath(path)}: plots {', '.join(FORMATS)}; pass a file name with one of them"
        )


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a figure, whole or not at all."""
    kind = Path(path).suffix[1:]
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format=kind))


def _curves(chart: Curves) -> Figure:
    figure, axes = _empty(7.2, 4.4)
    from matplotlib.ticker import EngFormatter

    for order, series in enumerate(chart.series):
        _draw_series(axes, series, order)
    if chart.level is not None:
        axes.axhline(chart.level, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=_plain(chart.title))
    if any(abs(x) >= 1000 for series in chart.series for x, _ in series.points):
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    columns = 1 + len(chart.series) // 26
    figure.set_figwidth(7.2 + 1.6 * (columns - 1))
    small = {"fontsize": 7} if len(chart.series) > len(PALETTE) else {}
    figure.legend(frameon=False, loc="outside right upper", ncols=columns, **small)
    return figure


def _draw_series(axes: Any, series: Series, order: int) -> None:
    rings = series.style == "rings"
    many = len(series.points) > 40 or series.style == "points"
    axes.plot(
        [x for x, _ in series.points],
        [y for _, y in series.points],
        marker=_MARKERS[series.marker],
        markersize=12 if rings else 4 if many else 5,
        markerfacecolor="none" if rings else series.colour,
        markeredgewidth=1.6 if rings or series.marker == "cross" else 0.0,
        linewidth=1.3,
        linestyle=_DRAWN[series.style],
        drawstyle="steps-post" if series.style == "steps" else "default",
        color=series.colour,
        label=_plain(series.name),
        zorder=3 + order * 0.01,
    )


def _bars(chart: Bars) -> Figure:
    headings = sum(a.group != b.group for a, b in pairwise(chart.rows))
    figure, axes = _empty(7.2, 1.2 + 0.2 * (len(chart.rows) + headings))
    axes.grid(visible=False, axis="y")
    place, places, group = 0.0, [], chart.rows[0].group if chart.rows else ""
    for row in chart.rows:
        place += 1.8 if row.group != group else 1.0
        group = row.group
        places.append(place)
    left = [0.0] * len(chart.rows)
    for index, segment in enumerate(chart.segments):
        lengths = [row.lengths[index] for row in chart.rows]
        axes.barh(
            places, lengths, left=left, height=0.72, color=segment.colour,
            label=_plain(segment.name), alpha=0.35 if segment.fill == "faint" else 1.0,
            hatch="////" if segment.fill == "hatched" else None, edgecolor="white", linewidth=0.0,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    for at, end, row in zip(places, left, chart.rows, strict=True):
        axes.text(end + chart.longest * 0.01, at, _plain(row.text), va="center", fontsize=7)
    names = [_plain(f"{row.group}: {row.name}" if row.group else row.name) for row in chart.rows]
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(place + 1, 0)
    axes.set_xlim(0, chart.longest * 1.2)
    axes.set(xlabel=_plain(chart.x_label), title=_plain(chart.title))
    if len(chart.segments) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=len(chart.segments))
    return figure


def _plain(text: str) -> str:
    """Text as it is: no formula between dollars, and no name left out for its underscore."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _empty(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
