"""What a chart shows: points and lines over two axes, or bars of several segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

# Okabe & Ito 2008, Color Universal Design: without black and yellow, which paper or screen swallow.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#8a8a8a"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKERS = ("circle", "square", "diamond", "triangle", "cross")
_PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: ""}


@dataclass(frozen=True)
class Series:
    """Points ``(x, y)``, joined or not.

    ``style``: "line", "steps" (of y, after each x), "points" or "rings" (around other points).
    ``texts``: of each point, for who points at it.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str = "line"
    marker: str = "circle"
    colour: str = BLUE
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Series over two axes. ``level``: a dotted line at this y. ``alt``: what is to be seen."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    alt: str = ""
    level: float | None = None


@dataclass(frozen=True)
class Segment:
    """What one colour of a bar stands for; "full", "hatched" or "faint" (what is not there)."""

    name: str
    colour: str
    fill: str = "full"


@dataclass(frozen=True)
class Bar:
    """A row: its name, the length of each segment, and a text behind it."""

    name: str
    lengths: tuple[float, ...]
    text: str = ""
    group: str = ""


@dataclass(frozen=True)
class Bars:
    """Rows of bars, from above; a ``group`` that is new is a heading. All have one scale."""

    title: str
    segments: tuple[Segment, ...]
    rows: tuple[Bar, ...]
    alt: str = ""
    x_label: str = ""

    @property
    def longest(self) -> float:
        return max((sum(row.lengths) for row in self.rows), default=0.0) or 1.0


Picture = Curves | Bars


def colour_of(index: int, count: int) -> str:
    """Of series that are few, the palette's; of many, along a ramp from blue over grey to red."""
    if count <= len(PALETTE):
        return PALETTE[index]
    at = index / (count - 1) * 2
    start, end = (BLUE, GREY) if at < 1 else (GREY, RED)
    return _mixed(start, end, at % 1 if at < 2 else 1.0)


def marker_of(index: int, count: int) -> str:
    """A marker for each of few series, so that they differ in print, too."""
    return MARKERS[index % len(MARKERS)] if count <= len(PALETTE) else "circle"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at least two, that cover ``low`` to ``high``."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / (most - 1)
    power = 10.0 ** floor(log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    return [step * i for i in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """``11.2 M`` for 11200000; small numbers as they are."""
    if not isfinite(value):
        return str(value)
    power = next((p for p in _PREFIXES if abs(value) >= 10**p), 0)
    return f"{value / 10**power:.3g} {_PREFIXES[power]}".strip()


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if isfinite(x) and isfinite(y)]


def _mixed(start: str, end: str, share: float) -> str:
    pairs = ((int(start[i : i + 2], 16), int(end[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
