"""``compress.report``: what a user has of a pruned model, as one page. It measures nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from compress.charts import draw
from compress.errors import ReportError
from compress.files import write_atomically
from compress.graph.channels import ChannelGraph
from compress.graph.draw import layer_figure
from compress.measure import Measurement, Table
from compress.measure import environment as this_environment
from compress.reports.pages import html_page, markdown_page
from compress.reports.sections import Parts, Section, Tile, sections_of, tiles_of
from compress.search.results import SearchResult
from compress.search.sensitivity import Sensitivity
from compress.speedup.compare import Verification
from compress.speedup.report import Report
from compress.speedup.speedup import ModelSpeedup
from compress.training.fine_tuning import Epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_DRAWN = 150  # boxes: a picture of more cannot be read, and a page can be zoomed


@dataclass(frozen=True)
class PruningReport:
    """What is on the page, in order: the numbers that count, and sections. See `report`."""

    title: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]

    def html(self) -> str:
        """The page: one file, with no reference to any other."""
        return html_page(self)

    def figures(self) -> dict[str, Figure]:
        """Every picture as a matplotlib figure, by name, for papers; can be changed before saving.

        The channel graph is among them where it has no more than 150 boxes.

        Raises:
            ChartError: matplotlib is not installed.
        """
        found = {
            picture.name: draw(picture.chart)
            for section in self.sections
            for picture in section.pictures
        }
        for section in self.sections:
            if section.map is not None and len(section.map.boxes) <= _MOST_DRAWN:
                found[section.name] = layer_figure(section.map.layers)
        return found

    def write(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the page to a .html or a .md file; returns all files.

        Pictures of Markdown are PNG files in a folder beside it, named as it is; without
        matplotlib they are left out, and the text says so.

        Raises:
            ReportError: it is another kind of file.
            OSError: it cannot be written.
        """
        target = Path(path)
        if target.suffix == ".html":
            text = self.html()
            write_atomically(target, lambda file: file.write_text(text, encoding="utf-8"))
            return (target,)
        if target.suffix != ".md":
            raise ReportError(f"{target}: reports are .html and .md; pass a file name with one")
        return markdown_page(self, target)

    def _repr_html_(self) -> str:
        """In a notebook: the page in a frame of its own."""
        page = escape(self.html())
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe>'


def report(
    title: str = "Pruning report",
    *,
    measurements: Mapping[str, Measurement] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    speedup: ModelSpeedup | Report | None = None,
    graph: ChannelGraph | None = None,
    verification: Verification | None = None,
    sensitivity: Sensitivity | None = None,
    search: SearchResult | None = None,
    training: Mapping[str, Sequence[Epoch]] | None = None,
    tables: Mapping[str, Table] | None = None,
    notes: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> PruningReport:
    """Put together what there is of a pruned model; write it by ``.write("page.html")``.

    Args:
        title: of the page.
        measurements: what `compress.measure.compare` returned, the dense model first.
        scores: ``{"accuracy": {"dense": 0.93, "small": 0.92}}``: more columns beside them.
        speedup: a `ModelSpeedup`, before or after ``speedup_model()``, or its report alone.
        graph: the channel graph to show; by default that of the `ModelSpeedup`.
        verification: what `compress.verify` returned.
        sensitivity: what `sensitivity_analysis` returned.
        search: a search's ``result``.
        training: what `compress.training.fine_tune` returned, by a name: "fine-tuning".
        tables: any others, by their headings.
        notes: paragraphs for the top of the page.
        environment: versions and machine; those of now, by default.

    Raises:
        ReportError: there is nothing to report, or a part is of another kind; names each.
    """
    parts = Parts(
        measurements=measurements or {},
        scores=scores or {},
        speedup=speedup.report if isinstance(speedup, ModelSpeedup) else speedup,
        graph=speedup.graph if graph is None and isinstance(speedup, ModelSpeedup) else graph,
        verification=verification,
        sensitivity=sensitivity,
        search=search,
        training=training or {},
        tables=tables or {},
        notes=(notes,) if isinstance(notes, str) else tuple(notes),
        environment=this_environment() if environment is None else environment,
    )
    _check(parts)
    return PruningReport(title, tiles_of(parts), sections_of(parts))


_KINDS: dict[str, type[Any]] = {
    "speedup": Report,
    "graph": ChannelGraph,
    "verification": Verification,
    "sensitivity": Sensitivity,
    "search": SearchResult,
}
_VALUES: dict[str, tuple[type[Any], str]] = {
    "measurements": (Measurement, "what compress.measure.compare returned"),
    "scores": (Mapping, "{name: {model: number}}"),
    "training": (Sequence, "{name: what compress.training.fine_tune returned}"),
    "tables": (Table, "{heading: compress.measure.Table}"),
}


def _check(parts: Parts) -> None:
    problems = []
    for name, kind in _KINDS.items():
        value = getattr(parts, name)
        if value is not None and not isinstance(value, kind):
            problems.append(f"{name}: got {type(value).__name__}; expected a {kind.__name__}")
    for name, (kind, expected) in _VALUES.items():
        value = getattr(parts, name)
        good = isinstance(value, Mapping) and all(isinstance(v, kind) for v in value.values())
        if not good:
            problems.append(f"{name}: got {type(value).__name__}; expected {expected}")
    if problems:
        raise ReportError("\n  ".join(["this report cannot be made:", *problems]))
    rows = set(parts.measurements)
    for column, values in parts.scores.items():
        if unknown := sorted(set(values) - rows):
            raise ReportError(
                f"scores: {column!r} has numbers for {unknown}; expected some of those measured: "
                f"{list(parts.measurements)}"
            )
    given = {**vars(parts), "environment": None}
    if not any(value is not None and value not in ({}, ()) for value in given.values()):
        raise ReportError(
            "there is nothing to report; pass measurements=compare({...}, x), speedup=, search= …"
        )
