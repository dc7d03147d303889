"""The two forms of a report: an HTML page by itself, and Markdown with pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2

from compress.charts import Bars, Picture, svg
from compress.charts.chart import PALETTE
from compress.charts.figure import can_draw, save_figure
from compress.files import write_atomically
from compress.measure import Table

if TYPE_CHECKING:
    from compress.reports.report import PruningReport

_LONGEST_NUMBER = 26  # letters, with its share or range
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&#])")


def html_page(report: PruningReport) -> str:
    """The page, with style, code and pictures in it."""
    template = _environment(html=True).get_template("page.html.jinja")
    return template.render(report=report, palette=PALETTE[:-1])


def markdown_page(report: PruningReport, target: Path) -> tuple[Path, ...]:
    """Write Markdown and, where matplotlib is there, its pictures in a folder beside it."""
    figures = report.figures() if can_draw() else {}
    folder = target.with_suffix("")
    pictures = {name: folder / f"{name}.png" for name in figures}
    if pictures:
        folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, pictures[name])
    template = _environment(html=False).get_template("page.md.jinja")
    links = {name: quote(f"{folder.name}/{path.name}") for name, path in pictures.items()}
    text = re.sub(r"\n{3,}", "\n\n", template.render(report=report, pictures=links))
    write_atomically(target, lambda file: file.write_text(text, encoding="utf-8"))
    return (target, *pictures.values())


@cache
def _environment(html: bool) -> jinja2.Environment:
    """Everything that is printed is escaped, in HTML as in Markdown."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("compress.reports"),
        autoescape=html,
        finalize=None if html else _in_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    helpers: dict[str, Callable[..., Any]] = {
        "svg": svg, "legend": _legend, "numeric": _numeric, "markdown_table": _markdown_table,
        "link": _Markdown,
    }  # fmt: skip
    found.filters |= helpers
    return found


def _legend(picture: Picture) -> list[dict[str, str]]:
    """What each colour of a picture is: name, colour, fill or marker; none where it is only one."""
    if isinstance(picture, Bars):
        found = [{"name": s.name, "colour": s.colour, "kind": s.fill} for s in picture.segments]
    else:
        found = [
            {"name": s.name, "colour": s.colour, "kind": s.marker if s.style != "rings" else "ring"}
            for s in picture.series
        ]
    return found if len(found) > 1 else []


def _numeric(table: Table) -> list[bool]:
    """Of each column, whether there are numbers in it."""
    columns = ([row[i] for row in table.rows if row[i]] for i in range(len(table.columns)))
    return [
        bool(cells) and all(c[0].isdigit() and len(c) <= _LONGEST_NUMBER for c in cells)
        for cells in columns
    ]


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _in_markdown(value: Any) -> Any:
    """Text as it is: no name is markup, a cell of a table or a line of its own."""
    if not isinstance(value, str) or isinstance(value, _Markdown):
        return value
    return _Markdown(_MARKDOWN.sub(r"\\\1", " ".join(value.split())))


def _markdown_table(table: Table) -> _Markdown:
    def cells(row: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_in_markdown, row))

    rows = tuple(map(cells, table.rows))
    return _Markdown(Table(cells(table.columns), rows, _in_markdown(table.caption)).markdown())
