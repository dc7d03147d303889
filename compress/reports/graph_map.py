"""The channel graph on a page: where its boxes and lines are, and what each box tells."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx

from compress.graph.channels import ChannelGraph
from compress.graph.draw import layer_graph, layout
from compress.reports.layers import Layers

_COLUMN, _ROW, _MARGIN = 230, 72, 24
_BOX, _HEIGHT = 204, 44
_LETTERS, _LETTER = 25, 7.6


@dataclass(frozen=True)
class Box:
    """A layer, or a call where several meet. ``next``: the boxes that its output goes to."""

    name: str
    text: str
    layer: bool
    x: float
    y: float
    width: float
    height: float
    group: int = 0
    units: int = 0
    left: int = 0
    held: str = ""
    why: str = ""
    next: tuple[int, ...] = ()


@dataclass(frozen=True)
class GraphMap:
    """Boxes, the lines between them as SVG paths, and the names in each coupled group."""

    boxes: tuple[Box, ...]
    lines: tuple[tuple[int, int, str], ...]
    groups: tuple[tuple[str, ...], ...]
    width: float
    height: float
    layers: nx.DiGraph = field(repr=False)

    def data(self) -> dict[str, object]:
        """What the page's code looks up."""
        kept = ("name", "layer", "group", "units", "left", "held", "why", "next")
        boxes = [{name: getattr(box, name) for name in kept} for box in self.boxes]
        return {"boxes": boxes, "groups": self.groups}


def graph_map(graph: ChannelGraph, layers: Layers) -> GraphMap:
    """Lay the layers of a graph out, from above."""
    drawn = layer_graph(graph)
    places, rows = layout(drawn), layers.named()
    order = sorted(drawn, key=lambda node: (-places[node][1], places[node][0]))
    number = {node: index for index, node in enumerate(order)}
    left = min(x for x, _ in places.values())
    boxes = []
    for node in order:
        data, (x, y) = drawn.nodes[node], places[node]
        name = data["layer"] or data["label"].partition("\n")[0]
        text = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
        row = rows.get(data["layer"])
        boxes.append(
            Box(
                name=name,
                text=text,
                layer=data["box"],
                x=_MARGIN + (x - left) * _COLUMN + _BOX / 2,
                y=_MARGIN - y * _ROW + _HEIGHT / 2,
                width=_BOX if data["box"] else max(len(text) * _LETTER + 20, 80),
                height=_HEIGHT if data["box"] else _HEIGHT * 0.6,
                group=row.group if row else 0,
                units=row.units if row else 0,
                left=row.left if row else 0,
                held=data["held"],
                why=row.why if row else "",
                next=tuple(number[n] for n in drawn.successors(node)),
            )
        )
    lines = tuple((i, j, _line(box, boxes[j])) for i, box in enumerate(boxes) for j in box.next)
    width = max(box.x for box in boxes) + _BOX / 2 + _MARGIN * 3
    height = max(box.y for box in boxes) + _HEIGHT / 2 + _MARGIN
    return GraphMap(tuple(boxes), lines, layers.groups, width, height, drawn)


def _line(source: Box, target: Box) -> str:
    """A curve down to the next row; around the boxes of a column where there are any between."""
    rows = (target.y - source.y) / _ROW
    if rows > 1.5 and source.x == target.x:
        begin, end = source.x + source.width / 2, target.x + target.width / 2
        # A curve gets three quarters of the way to the points that pull it.
        edge = source.x + _BOX / 2 + min(6 + 4 * rows, 50)
        out = edge + (edge - (begin + end) / 2) / 3
        return (
            f"M{begin:.1f} {source.y:.1f}C{out:.1f} {source.y:.1f} {out:.1f} {target.y:.1f} "
            f"{end:.1f} {target.y:.1f}"
        )
    top, bottom = source.y + source.height / 2, target.y - target.height / 2
    turn = max(bottom - (_ROW - _HEIGHT), top)  # down its own column until the last row
    middle = (turn + bottom) / 2
    return (
        f"M{source.x:.1f} {top:.1f}V{turn:.1f}C{source.x:.1f} {middle:.1f} {target.x:.1f} "
        f"{middle:.1f} {target.x:.1f} {bottom:.1f}"
    )
