"""The layers of a report: what was masked, removed and kept of each, and who goes together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compress.charts import Bar, Bars, Segment
from compress.charts.chart import BLUE, GREY, ORANGE
from compress.graph.channels import ChannelGraph
from compress.graph.explain import couplings, layer_of
from compress.measure import Table
from compress.speedup.report import Report

SEGMENTS = (
    Segment("kept", BLUE),
    Segment("masked, but kept", ORANGE, "hatched"),
    Segment("removed", GREY, "faint"),
)


@dataclass(frozen=True)
class Row:
    """A layer's units; ``stuck``: how many are masked and stay, and ``why``.

    ``group``: its coupled group, counted from 1; 0: it has none.
    """

    layer: str
    units: int
    masked: int = 0
    removed: int = 0
    stuck: int = 0
    why: str = ""
    group: int = 0

    @property
    def left(self) -> int:
        return self.units - self.removed


@dataclass(frozen=True)
class Layers:
    """All rows in the order of the run, and the names in each coupled group."""

    rows: tuple[Row, ...]
    groups: tuple[tuple[str, ...], ...]

    def named(self) -> dict[str, Row]:
        return {row.layer: row for row in self.rows}


def layers_of(report: Report | None, graph: ChannelGraph | None) -> Layers:
    """The layers that a speedup's report, a graph, or both tell of."""
    told = {} if report is None else {each.layer: each for each in report.layers}
    names, coupled = {name: each.units for name, each in told.items()}, {}
    if graph is not None:
        together = couplings(graph)
        by_name = {layer_of(graph, path): path for path in graph.layers}
        names = {name: len(graph.layers[path].labels) for name, path in by_name.items()} | names
        coupled = {name: together[path] for name, path in by_name.items()}
    coupled |= {name: each.coupled for name, each in told.items() if each.coupled}
    numbers = _numbered((name, *coupled.get(name, ())) for name in names)
    rows = []
    for name, units in names.items():
        group = numbers.get(frozenset((name, *coupled.get(name, ()))), 0)
        each = told.get(name)
        if each is None:
            rows.append(Row(name, units, group=group))
            continue
        reasons = [f"{count}: it {reason}" for reason, count in each.kept.items()]
        if each.unmasked_elsewhere:
            reasons.append(f"{each.unmasked_elsewhere} unmasked in a coupled layer")
        stuck, why = sum(each.kept.values()), "; ".join(reasons)
        rows.append(Row(name, units, each.masked, each.removed, stuck, why, group))
    return Layers(tuple(rows), _ordered(names, numbers))


def _numbered(groups: Iterable[tuple[str, ...]]) -> dict[frozenset[str], int]:
    """Groups of more than one, counted from 1."""
    found: dict[frozenset[str], int] = {}
    for names in groups:
        if len(names) > 1:
            found.setdefault(frozenset(names), len(found) + 1)
    return found


def _ordered(
    names: Iterable[str], numbers: dict[frozenset[str], int]
) -> tuple[tuple[str, ...], ...]:
    place = {name: index for index, name in enumerate(names)}
    return tuple(tuple(sorted(g, key=lambda n: place.get(n, len(place)))) for g in numbers)


def layer_bars(layers: Layers) -> Bars:
    """A bar of each layer's units: what is kept, what is masked but kept, what is gone."""
    rows = []
    for row in layers.rows:
        text = f"{row.left:,} of {row.units:,}" if row.removed else f"{row.units:,}"
        rows.append(Bar(row.layer, (row.left - row.stuck, row.stuck, row.removed), text))
    units, removed = (sum(getattr(row, n) for row in layers.rows) for n in ("units", "removed"))
    alt = f"{len(rows)} layers with {units:,} channels, {removed:,} of them removed"
    return Bars("Channels of each layer", SEGMENTS, tuple(rows), alt, "channels")


def layer_table(layers: Layers) -> Table:
    """The numbers of the bars, with the reasons."""
    columns = ("layer", "group", "units", "masked", "removed", "left", "masked, but kept: why")
    rows = tuple(
        (row.layer, f"G{row.group}" if row.group else "",
         *(f"{n:,}" for n in (row.units, row.masked, row.removed, row.left)), row.why)
        for row in layers.rows
    )  # fmt: skip
    return without_empty(Table(columns, rows))


def without_empty(table: Table) -> Table:
    """Without the columns that have nothing in any row."""
    used = [i for i, _ in enumerate(table.columns) if any(row[i] for row in table.rows)]
    rows = tuple(tuple(row[i] for i in used) for row in table.rows)
    return Table(tuple(table.columns[i] for i in used), rows, table.caption)
