"""Reports: the page parses, is one file, has every number, and shows names as text."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise
from test_search_results import RESULT
from torch import Tensor, nn

import compress
from compress import ChannelGraph, Masks, ModelSpeedup
from compress.errors import ReportError
from compress.measure import Table, compare
from compress.reports import PruningReport
from compress.reports.sections import Tile
from compress.search import Sensitivity
from compress.training.fine_tuning import Epoch

X = torch.rand(2, 3, 8, 8)
EVIL = "<script>alert('x')</script> | *a* & _b_"
VOID = {"meta", "input"}


class Net(nn.Module):
    """A residual pair, a layer of its own, a head of which nothing can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv3(x + self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


def masked() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    randomise(model)
    model.eval()
    first, own = torch.ones(8, 3, 3, 3), torch.ones(6, 8, 1, 1)
    first[:3], own[:2] = 0, 0
    Masks({"conv1": {"weight": first}, "conv3": {"weight": own}}).apply(model)
    return model


@pytest.fixture(scope="module")
def everything() -> PruningReport:
    model, small = masked(), masked()
    speedup = ModelSpeedup(small, X)
    speedup.speedup_model()
    models = {"dense": Net(), EVIL: model, "small": small}
    curves = {"conv1": {0.25: 0.9, 0.5: 0.8}, EVIL: {0.25: 0.7, 0.5: 0.1}}
    return compress.report(
        f"Report of {EVIL}",
        measurements=compare(models, X, warmup=1, repeats=3),
        scores={f"accuracy {EVIL}": {"dense": 0.93125, "small": 0.925}},
        speedup=speedup,
        verification=compress.verify(small, model, X),
        sensitivity=Sensitivity(curves, 0.95),
        search=replace(RESULT, pruner=EVIL),
        training={EVIL: [Epoch(2.0, 0.1, 0.5), Epoch(1.234, 0.01, 0.75)]},
        tables={EVIL: Table(("name", "value"), ((EVIL, "42"),))},
        notes=[f"A note: {EVIL}"],
    )


class Page(HTMLParser):
    """Tags in balance, what they refer to, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_is_well_formed_and_says_what_it_is(everything: PruningReport) -> None:
    page = Page(everything.html())
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        assert (attrs.get("href") or "#main")[1:] in ids, "a link within the page"
        assert all(name in ids for name in (attrs.get("aria-labelledby") or "main").split())
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == 1 and names.count("main") == 1
    assert names.count("h2") == names.count("section") == len(everything.sections)
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(pictures) == 8 and all(each["aria-label"] for each in pictures)


def test_the_page_needs_no_other_file(everything: PruningReport) -> None:
    text = everything.html()
    for tag, attrs in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attrs and not (attrs.get("href") or "#").strip("#").startswith("http")
    assert "url(http" not in text and "@import" not in text and "fetch(" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_names_are_shown_as_they_are(everything: PruningReport) -> None:
    text = everything.html()
    assert "<script>alert" not in text and "alert('x')</script>" not in text
    assert [tag for tag, _ in Page(text).tags].count("script") == 2
    assert EVIL in Page(text).cells


def test_every_number_of_the_tables_is_on_the_page(everything: PruningReport) -> None:
    cells = Page(everything.html()).cells
    for section in everything.sections:
        for table in section.tables:
            assert all(cell in cells for row in table.rows for cell in row)
    assert "0.9313" in cells and "1.234" in cells and "42" in cells
    (row,) = [row for row in section_of(everything, "layers").tables[0].rows if row[0] == "conv3"]
    assert row[:6] == ("conv3", "", "6", "2", "2", "4")


def section_of(report: PruningReport, name: str) -> Any:
    return next(section for section in report.sections if section.name == name)


def test_layers_say_why_they_stay_and_where(everything: PruningReport) -> None:
    rows = {row[0]: row for row in section_of(everything, "layers").tables[0].rows}
    assert list(rows) == ["conv1", "conv2", "conv3", "fc"]
    assert rows["conv1"][1] == rows["conv2"][1] == "G1"
    assert rows["conv1"][3:5] == ("3", "0") and "test_reports.py:" in rows["conv1"][6]
    bars = {
        bar.name: bar.lengths for bar in section_of(everything, "layers").pictures[0].chart.rows
    }
    assert bars["conv1"] == (5, 3, 0) and bars["conv3"] == (4, 0, 2)


def test_the_graph_knows_what_goes_together(everything: PruningReport) -> None:
    found = section_of(everything, "graph").map
    boxes = {box.name: box for box in found.boxes}
    assert boxes["conv1"].group == boxes["conv2"].group == 1 and boxes["conv3"].group == 0
    assert found.groups == (("conv1", "conv2"),)
    assert (boxes["conv3"].units, boxes["conv3"].left) == (6, 4)
    assert "is an output of the model" in boxes["fc"].held
    assert [found.boxes[i].name for i in boxes["conv1"].next] == ["conv2", "add"]
    places = {(box.x, box.y) for box in found.boxes}
    assert len(places) == len(boxes), "no box is on another"
    assert all(0 < box.x < found.width and 0 < box.y < found.height for box in found.boxes)


def test_a_speedup_has_the_graph_of_the_model_as_it_was() -> None:
    model = masked()
    speedup = ModelSpeedup(model, X)
    before = {path: len(units.labels) for path, units in speedup.graph.layers.items()}
    speedup.speedup_model()
    assert model.conv3.out_channels == 4
    assert {p: len(u.labels) for p, u in speedup.graph.layers.items()} == before
    assert before["conv3.weight"] == 6


def test_tiles_compare_the_last_model_with_the_first(everything: PruningReport) -> None:
    tiles = {tile.label: tile for tile in everything.tiles}
    sizes = [sum(p.numel() for p in Net().parameters())]
    sizes.append(sizes[0] - 2 * 9 - 2 * 4)
    assert tiles["parameters left"].value == f"{sizes[1] / sizes[0]:.0%}"
    assert tiles["largest difference to the masked model"].note == "the same, up to rounding"
    assert tiles[f"accuracy {EVIL}"].value == "0.925"
    assert tiles["performance of what the search took"] == Tile(
        "0.9", "performance of what the search took", "0.99 before"
    )
    assert tiles["parameters left by the search"].value == "30%"


def test_how_it_was_measured_is_told(everything: PruningReport) -> None:
    rows = dict(section_of(everything, "conditions").tables[0].rows)
    assert rows["numbers"] == "float32" and rows["batch"] == "2" and rows["device"][:3] == "cpu"
    assert rows["passes"].startswith("1 not counted, then 3")
    assert rows["torch"] == torch.__version__ and rows["threads"] == str(torch.get_num_threads())
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", rows["measured"])


def test_markdown_with_pictures_beside_it(everything: PruningReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = everything.write(tmp_path / "a page.md")
    text = files[0].read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {*links} == {f"a%20page/{path.name}" for path in files[1:]} and len(links) == 8
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    assert "| 0.9313 |" in text and "<script" not in re.sub(r"\\<", "", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, "no name makes a column"


def test_without_matplotlib_the_page_is_whole_and_markdown_says_so(
    everything: PruningReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "compress.charts.figure.find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    everything.write(tmp_path / "page.md")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert "pip install 'compress-torch[report]'" in (tmp_path / "page.md").read_text()
    everything.write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == everything.html()


def test_every_part_may_be_the_only_one() -> None:
    graph = compress.report(graph=ChannelGraph(Net(), X))
    assert [section.name for section in graph.sections] == ["graph", "conditions"]
    planned = compress.report(speedup=ModelSpeedup(masked(), X).report)
    assert [section.name for section in planned.sections] == ["layers", "conditions"]
    before = compress.report(speedup=ModelSpeedup(masked(), X))
    assert "planned: nothing is done yet" in section_of(before, "layers").text[0]
    assert "graph" in [section.name for section in before.sections]
    for made in (graph, planned, before, compress.report(search=RESULT)):
        Page(made.html())
    noted = compress.report(notes="only this", environment={"torch": "2"})
    assert section_of(noted, "notes").text == ("only this",)
    assert "srcdoc=" in noted._repr_html_() and "<html" not in noted._repr_html_()


def test_errors_name_every_part(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is nothing to report; pass measurements="):
        compress.report("Nothing")
    with pytest.raises(ReportError) as caught:
        compress.report(search="folder", training={"a": 3}, tables=[1])  # type: ignore[arg-type]
    for words in ("search: got str; expected a SearchResult", "training: got", "tables: got list"):
        assert words in str(caught.value)
    measured = compare({"dense": Net()}, X, warmup=0, repeats=1)
    with pytest.raises(ReportError, match=r"scores: 'a' has numbers for \['small'\]"):
        compress.report(measurements=measured, scores={"a": {"small": 1.0}})
    with pytest.raises(ReportError, match=r"page\.pdf: reports are \.html and \.md"):
        compress.report(measurements=measured).write(tmp_path / "page.pdf")


def test_a_large_model_gives_a_small_page_quickly() -> None:
    layers = [nn.Linear(8, 8) for _ in range(500)]
    model = nn.Sequential(*layers)
    made = compress.report(graph=ChannelGraph(model, torch.rand(1, 8)))
    text = made.html()
    assert text.count('role="button"') == 502 and len(text) < 1_000_000
