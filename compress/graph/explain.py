"""Questions to a channel graph: what goes together, and why a unit is held or free.

Answers are data that print as sentences. They speak of the structure alone; what masks make of it
is `compress.speedup.why`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from compress.errors import GraphError, closest
from compress.graph.labels import Grid, Labels, Pin, Tie, joined
from compress.graph.trace import location

if TYPE_CHECKING:
    from compress.graph.channels import ChannelGraph


@dataclass(frozen=True)
class Member:
    """Positions of one axis of a parameter; ``reads``: as a layer's inputs, not its outputs."""

    layer: str
    parameter: str
    axis: int
    positions: tuple[int, ...]
    reads: bool

    def __str__(self) -> str:
        return f"{self.parameter} axis {self.axis} [{ranges(self.positions)}]"


@dataclass(frozen=True)
class Group:
    """Units that lie on the same axes of the same parameters: one unit goes from all of them.

    ``units`` counts them. ``held`` says why some or all of them cannot go; empty: all are free.
    """

    members: tuple[Member, ...]
    units: int
    held: tuple[str, ...]

    def __str__(self) -> str:
        members = "\n".join(f"  {member}" for member in self.members)
        held = "".join(f"\n  held: it {reason}" for reason in self.held)
        return f"{count(self.units, 'unit')} of\n{members}{held}"


@dataclass(frozen=True)
class Explanation:
    """Why one unit of a layer can go or not; prints as a sentence.

    ``free``: whether it can; ``state`` says so in words. ``reason``: the clauses that say why.
    ``path``: from the layer to what holds it, one clause for each tie. ``members``: what goes with
    it.
    """

    layer: str
    channel: int
    free: bool
    state: str
    reason: str
    path: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()

    def __str__(self) -> str:
        steps = "".join(f" {step}," for step in self.path)
        reason = f"{steps} {'which' if self.path else 'it'} {self.reason}"
        return (
            f"channel {self.channel} of {self.layer} {self.state}:{reason}{with_it(self.members)}."
        )


@dataclass(frozen=True)
class ParameterAxis:
    """The labels along one axis of a parameter; (positions,), or (positions, n) in a field."""

    layer: str
    parameter: str
    axis: int
    labels: Labels
    reads: bool

    def positions(self, chosen: np.ndarray) -> tuple[int, ...]:
        """Where the labels are chosen (bool, one per label)."""
        hit = chosen[self.labels]
        return tuple(np.flatnonzero(hit if hit.ndim == 1 else hit.any(1)).tolist())


def parameter_axes(graph: ChannelGraph) -> list[ParameterAxis]:
    """Every labelled axis of every parameter and buffer, in the order of the run."""
    found = []
    for path, node in graph.trace.leaves.items():
        units, layer = graph.layers.get(path), layer_of(graph, path)
        for axis, labels in enumerate(graph.axes[node]):
            if labels is not None:
                reads = units is not None and axis != units.axis
                found.append(ParameterAxis(layer, path, axis, labels, reads))
        crossing = graph.space.fields.get(path)
        if crossing is not None:
            labels = crossing.labels.reshape(crossing.labels.shape[:2])
            labels = labels.T if crossing.axis == 1 else labels
            reads = units is not None and crossing.axis != units.axis
            found.append(ParameterAxis(layer, path, crossing.axis, labels, reads))
    return found


def tie_roots(graph: ChannelGraph, grids: bool = False) -> np.ndarray:
    """The roots by ties alone, pins left out; with ``grids`` a cell, its row and its column as one.

    (labels,), as `LabelSpace.roots`.
    """
    space = graph.space
    left, right = [t.left for t in space.ties], [t.right for t in space.ties]
    for grid in space.grids if grids else ():
        cells = grid.cells.reshape(-1)
        left += [cells, cells]
        right += [np.repeat(grid.rows, grid.cells.shape[1]),
                  np.tile(grid.columns, grid.cells.shape[0])]  # fmt: skip
    return joined(np.arange(space.size), left, right)


# -- groups --------------------------------------------------------------------------------


def find_groups(graph: ChannelGraph) -> list[Group]:
    """See `ChannelGraph.groups`."""
    root, axes = tie_roots(graph), parameter_axes(graph)
    where: dict[int, list[int]] = {}
    for index, each in enumerate(axes):
        for label in np.unique(root[each.labels]).tolist():
            where.setdefault(label, []).append(index)
    where.pop(0, None)  # what no label stands for
    together: dict[tuple[int, ...], list[int]] = {}
    for label, indices in where.items():
        together.setdefault(tuple(indices), []).append(label)
    return [
        Group(
            tuple(_members(graph, root, roots, [axes[i] for i in indices])),
            len(roots),
            tuple(_held_by(graph, roots)),
        )
        for indices, roots in together.items()
    ]


def _members(
    graph: ChannelGraph, root: np.ndarray, roots: list[int], axes: Iterable[ParameterAxis]
) -> Iterator[Member]:
    chosen = np.isin(root, roots)
    for each in axes:
        positions = each.positions(chosen)
        if positions:
            yield Member(each.layer, each.parameter, each.axis, positions, each.reads)


def _held_by(graph: ChannelGraph, labels: list[int]) -> dict[str, None]:
    """The distinct reasons why some of these labels stay, in order."""
    held = [label for label in labels if graph.root[label] == graph.root[0]]
    _, first = np.unique(graph.nearest_pin[held], return_index=True) if held else ((), ())
    return dict.fromkeys(graph.pin_reason(held[i]) for i in sorted(first))


def coupled_layers(graph: ChannelGraph, layer: str, readers: bool = False) -> list[str]:
    """See `ChannelGraph.coupled`."""
    root = tie_roots(graph, grids=True)
    own = np.unique(root[units_of(graph, layer)])
    chosen = np.isin(root, own[own != 0])
    found = dict.fromkeys(
        each.layer
        for each in parameter_axes(graph)
        if (readers or not each.reads) and chosen[each.labels].any()
    )
    return [name for name in found if name not in (layer, layer_of(graph, layer))]


def couplings(graph: ChannelGraph) -> dict[str, tuple[str, ...]]:
    """For every weight that makes units: the other layers whose units are coupled with its own."""
    root = tie_roots(graph, grids=True)
    own = {path: np.unique(root[units.labels]).tolist() for path, units in graph.layers.items()}
    sharing: dict[int, list[str]] = {}
    for path, roots in own.items():
        for label in roots:
            sharing.setdefault(label, []).append(path)
    sharing.pop(0, None)
    # Thousands of labels are shared by the same layers: each such set is looked at once.
    sets = {label: tuple(paths) for label, paths in sharing.items()}
    found = {}
    for path, roots in own.items():
        distinct = {sets[label] for label in roots if label in sets}
        others = {other for paths in distinct for other in paths if other != path}
        found[path] = tuple(layer_of(graph, other) for other in graph.layers if other in others)
    return found


def units_of(graph: ChannelGraph, layer: str) -> Labels:
    """The labels of a layer's units, by the path of a module or of one of its parameters.

    Of a norm (or whatever follows another layer's channels) those of its first parameter.
    """
    for path, units in graph.layers.items():
        if layer in (path, layer_of(graph, path)):
            return units.labels
    for each in parameter_axes(graph):
        if layer in (each.parameter, each.layer) and each.labels.ndim == 1:
            return each.labels
    names = dict.fromkeys(layer_of(graph, path) for path in (*graph.layers, *graph.trace.leaves))
    example = closest(layer, names) or f", such as {next(iter(names), '')!r}"
    raise GraphError(
        f"{layer!r}: no layer with units by this name ran on the dummy input; pass the path of a "
        f"module{example}"
    )


def label_of(graph: ChannelGraph, layer: str, channel: int) -> int:
    """The label of one unit of a layer."""
    labels = units_of(graph, layer)
    if type(channel) is not int or not 0 <= channel < len(labels):
        raise GraphError(
            f"{layer}: channel {channel!r}; pass a whole number from 0 to {len(labels) - 1}"
        )
    return int(labels[channel])


# -- why -----------------------------------------------------------------------------------


def explain(graph: ChannelGraph, layer: str, channel: int) -> Explanation:
    """See `ChannelGraph.why`."""
    label = label_of(graph, layer, channel)
    members = members_with(graph, label, layer, channel)
    if graph.root[label] == graph.root[0]:
        path, reason = path_to_pin(graph, label)
        return Explanation(layer, channel, False, "is held", reason, tuple(path), members)
    for grid in graph.space.grids:
        line = _line_reason(graph, grid, label)
        if line is not None and not line[0]:
            return Explanation(layer, channel, False, "is held", line[1], (), members)
    conditions = [*_lines(graph, label), *(f"it {reason}" for reason in _counted(graph, label))]
    reason = "; ".join(["is tied to nothing that must stay", *conditions])
    return Explanation(layer, channel, True, "is free", reason, (), members)


def members_with(graph: ChannelGraph, label: int, layer: str, channel: int) -> tuple[Member, ...]:
    """Everything that goes with a label, but the unit that was asked about."""
    if label == 0:
        return ()
    root = tie_roots(graph)
    return tuple(
        member
        for member in _members(graph, root, [int(root[label])], parameter_axes(graph))
        if member.reads
        or layer not in (member.layer, member.parameter)
        or member.positions != (channel,)
    )


def path_to_pin(graph: ChannelGraph, label: int) -> tuple[list[str], str]:
    """The ties from a label to what holds it, a clause for each, and the clause of the pin."""
    ties, end = _shortest_path(graph, label)
    axes = parameter_axes(graph)
    steps, seen = [], label_name(axes, label)
    for tie, at in ties:
        name = label_name(axes, at)
        target = f"tied to {name}" if name and name != seen else "tied"
        steps.append(f"{target} by {tie.node.meta['name']} at {location(tie.node)}")
        seen = name or seen
    pinned = graph.nearest_pin[end]
    if pinned >= 0:
        return _merged(steps), pin_clause(graph, graph.space.pins[pinned])
    return _merged(steps), "is the only one of its axis" if label == 0 else "has a fixed place"


def _merged(steps: list[str]) -> list[str]:
    """Without a clause that repeats: a label may be tied twice in the same call."""
    return list(dict.fromkeys(steps))


def _shortest_path(graph: ChannelGraph, label: int) -> tuple[list[tuple[Tie, int]], int]:
    """The ties from a label to the nearest one that is pinned (or 0), with the labels reached."""
    pinned = np.zeros(graph.space.size, bool)
    pinned[0] = True
    for pin in graph.space.pins:
        pinned[pin.labels] = True
    ties = graph.space.ties
    if pinned[label] or not ties:
        return [], label
    ends = np.concatenate([t.left for t in ties] + [t.right for t in ties])
    others = np.concatenate([t.right for t in ties] + [t.left for t in ties])
    owner = np.repeat(np.arange(len(ties)), [len(t.left) for t in ties])
    owner = np.concatenate([owner, owner])
    order = np.argsort(ends, kind="stable")
    ends, others, owner = ends[order], others[order], owner[order]
    came: dict[int, tuple[int, int]] = {}
    queue = [label]
    for at in queue:
        if pinned[at]:
            break
        first, last = np.searchsorted(ends, [at, at + 1])
        for other, tie in zip(others[first:last].tolist(), owner[first:last].tolist(), strict=True):
            if other != label and other not in came:
                came[other] = at, tie
                queue.append(other)
    path, end = [], at
    while at != label:
        before, tie = came[at]
        path.append((ties[tie], at))
        at = before
    return path[::-1], end


def label_name(axes: Iterable[ParameterAxis], label: int) -> str:
    """``channel 7 of layer3.0.conv2``; empty for a label that no parameter carries."""
    for each in axes:
        places = np.flatnonzero((each.labels == label).reshape(len(each.labels), -1).any(1))
        if len(places):
            what = "input" if each.reads else "channel"
            return f"{what} {int(places[0])} of {each.layer}"
    return ""


def pin_clause(graph: ChannelGraph, pin: Pin) -> str:
    """Why a pin holds, where, and where a tensor of fixed size that it meets comes from."""
    text = f"{pin.reason} at {location(pin.node)}"
    if not pin.meets:
        return text
    size = len(pin.labels)
    fixed = [node for node in pin.node.all_input_nodes if _is_fixed(graph, node, size)]
    return f"{text} (the fixed one {_origin(graph, fixed[0], size)})" if fixed else text


def _is_fixed(graph: ChannelGraph, node: fx.Node, size: int) -> bool:
    """Whether a tensor has an axis of this size that has no labels."""
    axes, shape = graph.axes[node], node.meta["shape"]
    return any(axis is None and s == size for axis, s in zip(axes, shape, strict=False))


def _origin(graph: ChannelGraph, node: fx.Node, size: int) -> str:
    """Where a tensor without labels got its fixed size from: a clause that follows "it"."""
    pins = {
        pin.node: pin
        for pin in reversed(graph.space.pins)
        if not pin.meets and len(pin.labels) == size
    }
    queue = [node]
    for at in queue:
        if at.op == "placeholder":
            return "is an input of the model"
        if at.op == "get_attr":
            return f"is {at.target}"
        sources = [s for s in at.all_input_nodes if _is_fixed(graph, s, size)]
        if at in pins and not sources:
            return f"{pins[at].reason} at {location(at)}"
        queue += [source for source in sources if source not in queue]
    return f"comes from {queue[-1].meta['name']} at {location(queue[-1])}"


def _line_reason(graph: ChannelGraph, grid: Grid, label: int) -> tuple[bool, str] | None:
    """For a cell of a grid: whether its row or column is free, and what that means for it."""
    found = np.argwhere(graph.root[grid.cells] == graph.root[label])
    if not len(found):
        return None
    row, column = found[0].tolist()
    lines = {"row": int(grid.rows[row]), "column": int(grid.columns[column])}
    held = {name: graph.root[line] == graph.root[0] for name, line in lines.items()}
    shape, where = " x ".join(map(str, grid.cells.shape)), location(grid.node)
    reasons = [f"its {name} {graph.pin_reason(lines[name])}" for name in lines if held[name]]
    why = "".join(f"; {reason}" for reason in reasons)
    if all(held.values()):
        return False, f"is a cell of {shape} at {where}, whose row and column are held{why}"
    free = " or ".join(f"whole {name}" for name in lines if not held[name])
    return True, f"is a cell of {shape} at {where} and goes with its {free}{why}"


def _lines(graph: ChannelGraph, label: int, what: str = "it", depth: int = 3) -> Iterator[str]:
    """What the grids say of a label, and then of the row or column that it would go with."""
    for grid in graph.space.grids:
        found = _line_reason(graph, grid, label)
        if found is None:
            continue
        yield f"{what} {found[1]}"
        row, column = np.argwhere(graph.root[grid.cells] == graph.root[label])[0].tolist()
        for name, line in (("row", grid.rows[row]), ("column", grid.columns[column])):
            if depth and graph.root[line] != graph.root[0]:
                yield from _lines(graph, int(line), f"that {name}", depth - 1)


def _counted(graph: ChannelGraph, label: int) -> Iterator[str]:
    for equal in graph.space.equal_parts:
        if len(equal.parts) > 1 and (graph.root[equal.parts] == graph.root[label]).any():
            yield f"goes with one of each of the {len(equal.parts)} parts at {location(equal.node)}"


# -- words ---------------------------------------------------------------------------------


def layer_of(graph: ChannelGraph, parameter: str) -> str:
    """The module that a parameter belongs to; its own path where a module of modules holds it."""
    path, _, inner = parameter.partition(".parametrizations.")
    if inner:
        return path
    path = parameter.rpartition(".")[0]
    if parameter in graph.layers and path:
        return path if parameter.endswith(".weight") else parameter
    module = graph.model.get_submodule(path)
    return parameter if next(module.children(), None) is not None or not path else path


def with_it(members: Iterable[Member], most: int = 6) -> str:
    """``; with it go channel 7 of bn1; then conv2 loses input 7``, or nothing."""
    made: dict[str, list[str]] = {}
    read: dict[str, None] = {}
    for member in members:
        if member.reads:
            read[member.layer] = None
        else:
            layers = made.setdefault(ranges(member.positions), [])
            layers += [] if member.layer in layers else [member.layer]
    channels = [f"channel {where} of {_listed(layers, most)}" for where, layers in made.items()]
    text = f"; with it go {_listed(channels, most)}" if channels else ""
    return text + (f"; it is an input of {_listed(list(read), most)}" if read else "")


def _listed(items: list[str], most: int) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def ranges(positions: Iterable[int]) -> str:
    """``0-3, 7`` for (0, 1, 2, 3, 7)."""
    parts: list[list[int]] = []
    for position in positions:
        if parts and position == parts[-1][1] + 1:
            parts[-1][1] = position
        else:
            parts.append([position, position])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
