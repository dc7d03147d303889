"""Draw a channel graph: layers as boxes, coupled layers in one colour, what holds them by name."""

from __future__ import annotations

import os
import shutil
import textwrap
from importlib.util import find_spec
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import fx

from compress.errors import GraphError
from compress.graph.explain import couplings, layer_of
from compress.rules.registry import OPAQUE, rule_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compress.graph.channels import ChannelGraph

FORMATS = (".svg", ".png", ".pdf")
# Light enough for black text; after so many groups they begin again.
_COLOURS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#ffff99", "#fb9a99", "#99d8c9", "#d9b38c")
_COLUMN, _ROW = 2.6, 0.8  # inches
_ALONE, _MEETING, _EDGE, _HELD = "#ffffff", "#e8e8e8", "#666666", "#c00000"


def draw(graph: ChannelGraph, path: str | os.PathLike[str]) -> None:
    """See `ChannelGraph.draw`."""
    target = Path(path)
    if target.suffix not in FORMATS:
        raise GraphError(f"{target}: draws {', '.join(FORMATS)}; pass a file name with one of them")
    if not target.parent.is_dir():
        raise GraphError(f"{target}: the folder {target.parent} does not exist; make it first")
    boxes = layer_graph(graph)
    if find_spec("graphviz") is not None and shutil.which("dot") is not None:
        _with_graphviz(boxes, target)
    elif find_spec("matplotlib") is not None:
        _with_matplotlib(boxes, target)
    else:
        raise GraphError(
            f"{target}: drawing needs matplotlib, or graphviz with its program dot; "
            "pip install 'compress-torch[draw]'"
        )


def layer_graph(graph: ChannelGraph) -> nx.DiGraph:
    """Layers, and the calls where several meet, as a ``networkx.DiGraph`` of fx nodes.

    Each has a ``label``, a ``colour`` (of its coupled group), ``held`` (the reason, or ""),
    ``box`` (whether it is a layer) and ``layer`` (its name, or ""). Norms, activations and reshapes
    are left out.
    """
    result = nx.DiGraph()
    makes = {step.call.node: step.rule.makes(step.call) for step in graph.steps}
    colours, shown = _colours(graph), dict[fx.Node, list[fx.Node]]()
    for node in graph.trace.nodes:
        sources = [shown[source] for source in node.all_input_nodes if shown.get(source)]
        before = list(dict.fromkeys(each for several in sources for each in several))
        made = [each for each in makes.get(node, ()) if each.weight.op == "get_attr"]
        shown[node] = before
        if node.op == "placeholder":
            _add(result, node, "input", _MEETING, before)
        elif made:
            path = str(made[0].weight.target)
            _add(result, node, _layer_label(graph, path), colours.get(path, _ALONE), before,
                 held=_held(graph, path), layer=layer_of(graph, path), box=True)  # fmt: skip
        elif _is_opaque_layer(node):
            _add(result, node, node.meta["module"] or node.meta["name"], _ALONE, before,
                 held=f"{node.meta['name']} has no rule", box=True)  # fmt: skip
        elif len(before) > 1:
            _add(result, node, node.meta["name"], _MEETING, before)
        else:
            continue
        shown[node] = [node]
    ends = dict.fromkeys(e for output in graph.trace.outputs for e in shown.get(output, ()))
    _add(result, "output", "output", _MEETING, list(ends))
    unused = [n for n in result if result.degree(n) == 0]
    result.remove_nodes_from(unused)
    return result


def _add(
    graph: nx.DiGraph, node: Any, label: str, colour: str, before: list[fx.Node],
    held: str = "", layer: str = "", box: bool = False,
) -> None:  # fmt: skip
    graph.add_node(node, label=label, colour=colour, held=held, layer=layer, box=box)
    graph.add_edges_from((source, node) for source in before)


def _is_opaque_layer(node: fx.Node) -> bool:
    leaves = (source.meta.get("name") for source in node.all_input_nodes)
    known = rule_for(node.meta["name"]) is not OPAQUE or node.meta["name"] == "getitem_output"
    return node.op == "call_function" and not known and "parameter" in leaves


def _layer_label(graph: ChannelGraph, path: str) -> str:
    return f"{layer_of(graph, path)}\n{len(graph.layers[path].labels)} units"


def _held(graph: ChannelGraph, path: str) -> str:
    """What holds all units of a layer; empty where any is free."""
    labels = graph.layers[path].labels
    if (graph.root[labels] != graph.root[0]).any():
        return ""
    pin = int(graph.nearest_pin[labels[0]])
    return graph.space.pins[pin].reason if pin >= 0 else graph.pin_reason(int(labels[0]))


def _colours(graph: ChannelGraph) -> dict[str, str]:
    """A colour for each layer that is coupled with others, one for each group."""
    numbers: dict[frozenset[str], int] = {}
    found = {}
    for path, others in couplings(graph).items():
        if others:
            group = frozenset((layer_of(graph, path), *others))
            number = numbers.setdefault(group, len(numbers))
            found[path] = _COLOURS[number % len(_COLOURS)]
    return found


def _text(data: dict[str, Any]) -> str:
    held = textwrap.wrap(f"held: {data['held']}", 38) if data["held"] else []
    return "\n".join([data["label"], *held])


# -- graphviz ------------------------------------------------------------------------------


def _with_graphviz(boxes: nx.DiGraph, target: Path) -> None:
    import graphviz

    drawing = graphviz.Digraph(
        node_attr={"fontname": "Helvetica", "fontsize": "10", "style": "filled"},
        edge_attr={"color": _EDGE},
    )
    names = {node: f"n{index}" for index, node in enumerate(boxes)}
    for node, data in boxes.nodes(data=True):
        drawing.node(
            names[node], _text(data), shape="box" if data["box"] else "ellipse",
            fillcolor=data["colour"], color=_HELD if data["held"] else _EDGE,
        )  # fmt: skip
    for source, node in boxes.edges:
        drawing.edge(names[source], names[node])
    target.write_bytes(drawing.pipe(format=target.suffix[1:]))


# -- matplotlib ----------------------------------------------------------------------------


def _with_matplotlib(boxes: nx.DiGraph, target: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # text that can be searched
        layer_figure(boxes).savefig(target, dpi=110)


def layer_figure(boxes: nx.DiGraph) -> Figure:
    """What `layer_graph` found, as a matplotlib figure."""
    from matplotlib.figure import Figure

    places = layout(boxes)
    across = [x for x, _ in places.values()]
    height = 1 - min(y for _, y in places.values())
    width = max(across) - min(across) + 1.4
    figure = Figure(figsize=(_COLUMN * width, _ROW * height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(min(across) - 0.7, max(across) + 0.7)
    axes.set_ylim(0.6 - height, 0.6)
    for source, node in boxes.edges:
        (x, y), (to_x, to_y) = places[source], places[node]
        run, rise = (to_x - x) * _COLUMN * 72, (to_y - y) * _ROW * 72
        # An edge that passes other rows of its column goes around their boxes.
        bend = -165 / abs(rise) if y - to_y > 1 and x == to_x else 0.0
        nx.draw_networkx_edges(
            boxes, places, edgelist=[(source, node)], ax=axes, arrows=True, width=0.8, arrowsize=8,
            edge_color=_EDGE, node_size=0, connectionstyle=f"arc3,rad={bend:.3f}",
            min_source_margin=_margin(boxes.nodes[source], run, rise),
            min_target_margin=_margin(boxes.nodes[node], run, rise),
        )  # fmt: skip
    for node, data in boxes.nodes(data=True):
        style = "round,pad=0.35" if data["box"] else "round4,pad=0.25"
        frame = {"boxstyle": style, "facecolor": data["colour"], "linewidth": 0.8,
                 "edgecolor": _HELD if data["held"] else _EDGE}  # fmt: skip
        text = _text(data).replace("$", r"\$")  # no formula
        axes.text(*places[node], text, ha="center", va="center", fontsize=7, bbox=frame)
    return figure


def _margin(data: dict[str, Any], run: float, rise: float) -> float:
    """How far from the middle of a box its frame is in one direction, in points."""
    lines = _text(data).split("\n")
    half_width, half_height = 2.1 * max(map(len, lines)) + 6, 4.5 * len(lines) + 6
    length = hypot(run, rise)
    return min(
        half_width * length / abs(run) if run else length,
        half_height * length / abs(rise) if rise else length,
    )


def layout(boxes: nx.DiGraph) -> dict[Any, tuple[float, float]]:
    """x and y of every box: the rows by longest path from the input, downwards.

    Within a row boxes stand in the order of what they come from, at distance 1.
    """
    level: dict[Any, int] = {}
    for node in boxes:  # sources come first
        level[node] = max((level[source] + 1 for source in boxes.predecessors(node)), default=0)
    rows: dict[int, list[Any]] = {}
    for node, row in level.items():
        rows.setdefault(row, []).append(node)
    places: dict[Any, tuple[float, float]] = {}
    for row in sorted(rows):
        wanted = {
            node: sum(places[s][0] for s in boxes.predecessors(node))
            / max(boxes.in_degree(node), 1)
            for node in rows[row]
        }
        for index, node in enumerate(sorted(rows[row], key=wanted.__getitem__)):
            places[node] = index - (len(rows[row]) - 1) / 2, -float(row)
    return places
