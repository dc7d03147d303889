"""What a report has of each part: words, tables, pictures. Both forms of the page print it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.charts import Bar, Bars, Curves, Picture, Segment, Series
from compress.charts.chart import BLUE, colour_of, marker_of, number
from compress.graph.channels import ChannelGraph
from compress.graph.explain import count
from compress.measure import Measurement, Table, table
from compress.reports.graph_map import GraphMap, graph_map
from compress.reports.layers import Layers, layer_bars, layer_table, layers_of, without_empty
from compress.search.results import SearchResult
from compress.search.sensitivity import Sensitivity
from compress.speedup.compare import Verification
from compress.speedup.report import Report
from compress.training.fine_tuning import Epoch


@dataclass(frozen=True)
class Parts:
    """What was given to `compress.report`."""

    measurements: Mapping[str, Measurement]
    scores: Mapping[str, Mapping[str, float]]
    speedup: Report | None
    graph: ChannelGraph | None
    verification: Verification | None
    sensitivity: Sensitivity | None
    search: SearchResult | None
    training: Mapping[str, Sequence[Epoch]]
    tables: Mapping[str, Table]
    notes: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Tile:
    """A number that counts, what it is, and what it is beside."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart by a name for its file."""

    name: str
    chart: Picture


@dataclass(frozen=True)
class Section:
    """A part of the page; ``lists`` are texts under a heading, folded up at first."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Figure, ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()
    map: GraphMap | None = None


def sections_of(parts: Parts) -> tuple[Section, ...]:
    """All sections that there is something for, in the order in which they are read."""
    return tuple(_sections(parts))


def _sections(parts: Parts) -> Iterator[Section]:
    if parts.notes:
        yield Section("notes", "Notes", parts.notes)
    if parts.measurements:
        yield _measured(parts)
    layers = layers_of(parts.speedup, parts.graph)
    if parts.speedup is not None:
        yield _layers(parts.speedup, layers)
    if parts.verification is not None:
        yield _verified(parts.verification)
    if parts.graph is not None:
        yield _graph(parts.graph, layers)
    if parts.search is not None:
        yield _search(parts.search)
    if parts.sensitivity is not None:
        yield _sensitivity(parts.sensitivity)
    if parts.training:
        yield _training(parts.training)
    for index, (title, each) in enumerate(parts.tables.items()):
        yield Section(f"table-{index}", title, tables=(each,))
    yield _conditions(parts)


# -- the numbers that count ----------------------------------------------------------------


def tiles_of(parts: Parts) -> tuple[Tile, ...]:
    """The last model measured beside the first one, how exact it is, and what a search took."""
    return (*_measured_tiles(parts), *_exactness(parts), *_taken(parts.search))


def _measured_tiles(parts: Parts) -> Iterator[Tile]:
    if not parts.measurements:
        if parts.speedup is not None:
            before, after = parts.speedup.parameters_before, parts.speedup.parameters_after
            yield Tile(_share(after, before), "parameters left", _from(before, after))
        return
    names = list(parts.measurements)
    first, last = parts.measurements[names[0]], parts.measurements[names[-1]]
    a, b = first.summary, last.summary
    yield Tile(_share(b.parameters_total, a.parameters_total), "parameters left",
               _from(a.parameters_total, b.parameters_total))  # fmt: skip
    yield Tile(_share(b.mult_adds, a.mult_adds), "mult-adds left", _from(a.mult_adds, b.mult_adds))
    yield Tile(_share(last.size_mb, first.size_mb), "size left",
               f"{number(last.size_mb * 1e6)}B of {number(first.size_mb * 1e6)}B")  # fmt: skip
    was, now = first.latency.median_ms, last.latency.median_ms
    yield Tile(f"{was / now:.2f} ×", "as fast", f"{now:.2f} ms, was {was:.2f} ms")
    for name, values in parts.scores.items():
        if names[-1] in values:
            note = f"{values[names[0]]:.4g} before" if names[0] in values else ""
            yield Tile(f"{values[names[-1]]:.4g}", name, note)


def _exactness(parts: Parts) -> Iterator[Tile]:
    label = "largest difference to the masked model"
    if parts.verification is not None:
        same = "the same, up to rounding" if parts.verification.same else "NOT the same"
        yield Tile(f"{parts.verification.relative_error:.1e}", label, same)
    elif parts.speedup is not None and parts.speedup.relative_error is not None:
        yield Tile(f"{parts.speedup.relative_error:.1e}", label, "of the outputs' scale")


def _taken(found: SearchResult | None) -> Iterator[Tile]:
    if found is None:
        return
    best, whole = found.best, found.dense_parameters
    yield Tile(f"{best.performance:.4g}", "performance of what the search took",
               f"{found.dense:.4g} before")  # fmt: skip
    if whole is not None:
        yield Tile(_share(best.parameters, whole), "parameters left by the search",
                   _from(whole, best.parameters))  # fmt: skip


def _share(after: float, before: float) -> str:
    return f"{after / before:.0%}" if before else "–"


def _from(before: float, after: float) -> str:
    return f"{number(after)} of {number(before)}"


# -- sections ------------------------------------------------------------------------------


def _measured(parts: Parts) -> Section:
    extra = {
        column: {name: f"{value:.4g}" for name, value in values.items()}
        for column, values in parts.scores.items()
    }
    chart = Figure("measurements", _measured_bars(parts.measurements))
    pictures = (chart,) if len(parts.measurements) > 1 else ()
    return Section(
        "measurements", "Size and speed", tables=(table(parts.measurements, extra),),
        pictures=pictures,
    )  # fmt: skip


def _measured_bars(measurements: Mapping[str, Measurement]) -> Bars:
    rows: dict[str, list[tuple[str, float, str]]] = {}
    for name, each in measurements.items():
        counts, time = each.summary, each.latency.median_ms
        for what, value, text in (
            ("parameters", counts.parameters_total, number(counts.parameters_total)),
            ("mult-adds", counts.mult_adds, number(counts.mult_adds)),
            ("size", each.size_mb, f"{number(each.size_mb * 1e6)}B"),
            ("latency", time, f"{time:.2f} ms"),
        ):
            rows.setdefault(what, []).append((name, value, text))
    bars = tuple(
        Bar(name, (value / (several[0][1] or 1) * 100,), text, what)
        for what, several in rows.items()
        for name, value, text in several
    )
    names = ", ".join(measurements)
    alt = f"Parameters, mult-adds, size and latency of {names}, as shares of the first"
    segments = (Segment("share of the first", BLUE),)
    return Bars("Beside the dense model", segments, bars, alt, "% of the first model")


def _layers(report: Report, layers: Layers) -> Section:
    lists = [
        (f"Constants {what} ({len(names)})", names)
        for what, names in (
            ("added to biases", report.constants_folded),
            ("carried by one channel", report.constants_carried),
        )
        if names
    ]
    text = [report.summary(), *report.notes]
    stuck = [row.stuck for row in layers.rows if row.stuck]
    if stuck:
        text.append(
            f"{count(sum(stuck), 'unit')} of {count(len(stuck), 'layer')} masked and not removed: "
            "the table says what holds them, and in which file and line."
        )
    return Section(
        "layers", "Layers: what went, what stayed and why", tuple(text),
        tables=(layer_table(layers),), pictures=(Figure("layers", layer_bars(layers)),),
        lists=tuple(lists),
    )  # fmt: skip


def _verified(found: Verification) -> Section:
    rows = []
    for run in found.runs:
        name = f"{'drawn' if run.drawn else 'given'}, batch {run.batch_size}"
        errors = (f"{run.relative_error:.1e}", f"{run.absolute_error:.1e}")
        rows.append((name, *(("", "") if run.skipped else errors), run.problem))
    columns = ("input", "of the scale", "absolute", "problem")
    text = tuple(line for line in str(found).splitlines() if not line.startswith("batch size"))
    shown = without_empty(Table(columns, tuple(rows)))
    return Section("verification", "Does it compute the same?", text, (shown,))


def _graph(graph: ChannelGraph, layers: Layers) -> Section:
    found = graph_map(graph, layers)
    groups = tuple(f"G{i}: {', '.join(names)}" for i, names in enumerate(layers.groups, 1))
    held = tuple(f"{box.name}: it {box.held}" for box in found.boxes if box.held)
    lists = (
        (f"Coupled groups ({len(groups)})", groups),
        (f"Layers of which nothing can go ({len(held)})", held),
    )
    text = (
        "Layers, and the calls where several meet. Layers of one colour and number are coupled: "
        "their channels can only go together. A dashed frame: nothing of this layer can go.",
    )
    return Section(
        "graph", "Channel graph", text, lists=tuple(each for each in lists if each[1]), map=found
    )


def _search(found: SearchResult) -> Section:
    pictures = [Figure("search", found.chart("params"))]
    if any(trial.flops is not None for trial in found.trials):
        pictures.append(Figure("search-flops", found.chart("flops")))
    front = tuple(
        (str(t.number), f"{t.performance:.4g}", f"{t.parameters / 1e6:.3f}",
         "" if t.flops is None else f"{t.flops / 1e6:.2f}", f"{t.share:.1%}")
        for t in found.pareto()
    )  # fmt: skip
    columns = ("trial", "performance", "parameters M", "MFLOPs", "weights masked")
    caption = "Pareto front: none is better with as few parameters"
    return Section(
        "search", f"Search ({found.pruner})",
        (f"{len(found.trials)} candidates; trial {found.best.number} was taken.",),
        (found.table(), Table(columns, front, caption)), tuple(pictures),
    )  # fmt: skip


def _sensitivity(found: Sensitivity) -> Section:
    text = (
        f"How good the model is without a part of one of {len(found.performances)} layers (or "
        "groups of coupled layers), all others whole.",
    )
    return Section(
        "sensitivity", "Sensitivity", text, (found.table(),),
        (Figure("sensitivity", found.chart()),),
    )  # fmt: skip


def _training(training: Mapping[str, Sequence[Epoch]]) -> Section:
    pictures = [Figure("loss", _curve(training, "loss"))]
    if any(epoch.score is not None for epochs in training.values() for epoch in epochs):
        pictures.append(Figure("score", _curve(training, "score")))
    rows = tuple(
        (name, str(index), f"{epoch.loss:.4g}", f"{epoch.learning_rate:.3g}",
         "" if epoch.score is None else f"{epoch.score:.4g}")
        for name, epochs in training.items()
        for index, epoch in enumerate(epochs, 1)
    )  # fmt: skip
    columns = ("run", "epoch", "loss", "learning rate", "score")
    return Section("training", "Training", tables=(Table(columns, rows),), pictures=tuple(pictures))


def _curve(training: Mapping[str, Sequence[Epoch]], what: str) -> Curves:
    series = []
    for index, (name, epochs) in enumerate(training.items()):
        values = [(float(at), getattr(epoch, what)) for at, epoch in enumerate(epochs, 1)]
        points = tuple((at, value) for at, value in values if value is not None)
        count = len(training)
        series.append(
            Series(name, points, "line", marker_of(index, count), colour_of(index, count))
        )
    return Curves(
        f"{what.capitalize()} by epoch", "epoch", what, tuple(series),
        f"The {what} after each epoch of {', '.join(training)}",
    )  # fmt: skip


def _conditions(parts: Parts) -> Section:
    rows = [(name, value) for name, value in parts.environment.items() if name != "date"]
    text = []
    if parts.measurements:
        latency = next(iter(parts.measurements.values())).latency
        machine = f" ({latency.machine})" if latency.machine else ""
        rows = [
            ("device", latency.device + machine),
            ("threads", str(latency.threads)),
            ("numbers", latency.dtype),
            ("batch", str(latency.batch)),
            ("passes", f"{latency.warmup} not counted, then {latency.repeats}; models in turn"),
            ("measured", latency.date),
            *rows,
        ]  # fmt: skip
        text = [
            "Latency is the median of the passes, between the 10th and the 90th percentile. A "
            "mult-add is one multiplication with its addition; MB are 10⁶ bytes of parameters and "
            "buffers.",
        ]
    rows += [("this page", parts.environment["date"])] if "date" in parts.environment else []
    filled = tuple(row for row in rows if row[1])
    return Section("conditions", "How it was measured", tuple(text), (Table(("", ""), filled),))
