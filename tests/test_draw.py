"""Drawings of a channel graph: what is in them, with either of the two programs."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import ChannelGraph
from compress.errors import GraphError
from compress.graph import draw


class Solve(nn.Module):
    """A layer of a function that has no rule: (…, n) to (…, n)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features) + 0.1 * torch.rand(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, x.mT).mT


class Small(nn.Module):
    """A residual around two layers, an opaque one, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.solve, self.out = Solve(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.third(self.second(x).relu())
        return self.out(self.solve(x))


def graph() -> ChannelGraph:
    return ChannelGraph(Small(), torch.rand(2, 3, 4))


def test_layers_are_boxes_in_the_colour_of_their_group() -> None:
    boxes = draw.layer_graph(graph())
    data = {d["label"].partition("\n")[0]: d for _, d in boxes.nodes(data=True)}
    assert list(data) == ["input", "first", "second", "third", "add", "solve", "out", "output"]
    assert {name for name, d in data.items() if d["box"]} == {
        "first", "second", "third", "solve", "out",
    }  # fmt: skip
    assert data["first"]["colour"] == data["third"]["colour"] != data["second"]["colour"]
    assert data["first"]["label"] == "first\n4 units"
    assert data["third"]["held"] == "goes through linalg_solve, which has no rule"
    assert data["solve"]["held"] == "linalg_solve has no rule"
    assert data["out"]["held"] == "is an output of the model"
    assert data["second"]["held"] == ""
    label = {node: d["label"].partition("\n")[0] for node, d in boxes.nodes(data=True)}
    assert {(label[a], label[b]) for a, b in boxes.edges} == {
        ("input", "first"), ("first", "second"), ("second", "third"), ("third", "add"),
        ("first", "add"), ("add", "solve"), ("solve", "out"), ("out", "output"),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", draw.FORMATS)
def test_matplotlib_draws_every_format(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    target = tmp_path / f"graph{suffix}"
    graph().draw(target)
    content = target.read_bytes()
    assert content.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = content.decode()
        assert all(
            name in text for name in ("second", "4 units", "held: linalg_solve has no rule", "add")
        )


@pytest.mark.skipif(
    find_spec("graphviz") is None or shutil.which("dot") is None, reason="needs graphviz and dot"
)
def test_graphviz_draws_where_it_is_there(tmp_path: Path) -> None:
    graph().draw(tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert "graphviz" in text
    assert all(name in text for name in ("second", "4 units", "held: linalg_solve has no rule"))


def test_what_cannot_be_drawn_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GraphError, match=r"\.svg, \.png, \.pdf; pass a file name"):
        graph().draw(tmp_path / "graph.jpg")
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    with pytest.raises(GraphError, match=r"pip install 'compress-torch\[draw\]'"):
        graph().draw(tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"none.graph\.svg: the folder .*none does not exist"):
        graph().draw(tmp_path / "none" / "graph.svg")
