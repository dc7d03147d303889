"""Several models side by side: measured together, shown as text, Markdown or a rich table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text
from torch import nn

from compress.measure.latency import Latency, latencies
from compress.measure.summary import ModelSummary, model_size_mb, summarize


@dataclass(frozen=True)
class Measurement:
    """What `compare` measured of one model; ``size_mb`` is parameters and buffers, 10**6 bytes."""

    summary: ModelSummary
    latency: Latency
    size_mb: float


@dataclass(frozen=True)
class Table:
    """A titled grid of finished text: ``print`` it, `markdown` it, or hand it to a rich console."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __rich__(self) -> rich.table.Table:
        caption = rich.text.Text(self.caption) if self.caption else None
        grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        for index, column in enumerate(self.columns):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            grid.add_row(*map(rich.text.Text, row))
        return grid

    def __str__(self) -> str:
        # A file of fixed, ample width: the text must not depend on the terminal it is made in.
        console = rich.console.Console(file=io.StringIO(), width=1000, color_system=None)
        with console.capture() as capture:
            console.print(self)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join(line for line in lines if line)

    def markdown(self) -> str:
        """The table as GitHub Markdown, numbers to the right, the caption below."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join(lines + (["", self.caption] if self.caption else []))


def compare(
    models: Mapping[str, nn.Module], dummy_input: Any, *, warmup: int = 10, repeats: int = 50
) -> dict[str, Measurement]:
    """Measure named models on one input; their timed passes are taken in turn (see `latencies`)."""
    times = latencies(models, dummy_input, warmup=warmup, repeats=repeats)
    return {
        name: Measurement(summarize(model, dummy_input), times[name], model_size_mb(model))
        for name, model in models.items()
    }


def table(
    measurements: Mapping[str, Measurement],
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """One row per measurement; percentages are of the first row.

    ``extra`` adds columns before the others, as ``{column: {row name: text}}``. Raises ValueError
    when there is nothing to show or ``extra`` names a row that is not measured.
    """
    if not measurements:
        raise ValueError("table: no measurements; pass what compare() returned")
    extra = extra or {}
    for column, texts in extra.items():
        if unknown := sorted(set(texts) - set(measurements)):
            raise ValueError(
                f"table: extra column {column!r} has values for {unknown}, "
                f"but the rows are {list(measurements)}"
            )
    first = next(iter(measurements.values()))
    measured_columns = ("parameters", "mult-adds", "size MB", "latency ms (p10–p90)")
    rows = tuple(
        (name, *(texts.get(name, "") for texts in extra.values()), *_cells(each, first))
        for name, each in measurements.items()
    )
    return Table(("", *extra, *measured_columns), rows, first.latency.conditions)


def _cells(each: Measurement, first: Measurement) -> tuple[str, ...]:
    return (
        _count(each.summary.parameters_total, first.summary.parameters_total),
        _count(each.summary.mult_adds, first.summary.mult_adds),
        f"{each.size_mb:.2f}" if each.size_mb >= 0.1 else f"{each.size_mb:.3f}",
        str(each.latency),
    )


_UNITS = ((1e9, 1e9, "G"), (1e5, 1e6, "M"), (1e3, 1e3, "k"))  # from, divided by, name


def _count(number: int, reference: int) -> str:
    """With a unit, and with the share of the reference where it differs from it."""
    found = (f"{number / size:.2f} {name}" for least, size, name in _UNITS if number >= least)
    share = f" ({number / reference:.0%})" if reference and number != reference else ""
    return next(found, str(number)) + share
