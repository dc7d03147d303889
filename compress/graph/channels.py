"""The channel graph: a trace with a label on every position that could be removed.

It knows nothing of masks: it is what the model's structure alone says about which positions of which
parameters must go together, and which cannot go at all.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from torch import fx, nn

from compress.graph.labels import Axes, Axis, LabelSpace, Pin
from compress.graph.trace import Trace, record
from compress.rules.registry import Call, Rule, no_axes, rule_for


@dataclass(frozen=True)
class Step:
    """One call of the trace with the rule for its function."""

    call: Call
    rule: Rule


def location(node: fx.Node) -> str:
    """``layer1.0 (resnet.py:92)``: where in the user's model a node comes from."""
    source = node.meta["source"]
    where = f"{source[0].rpartition('/')[2]}:{source[1]}" if source else ""
    module = node.meta["module"] or "the model's forward"
    return f"{module} ({where})" if where else module


class ChannelGraph:
    """``ChannelGraph(model, dummy_input)``: labels for every axis of every tensor of one run.

    ``trace`` is the recorded run (an fx graph, or ``graph.networkx()``), ``axes`` maps a node to its
    label vectors, ``root`` maps a label to the smallest label of its class: positions with the same
    root are removed together, and root 0 never is.
    """

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        self.model = model
        self.trace: Trace = record(model, dummy_input)
        self.space = LabelSpace()
        self.axes: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        for node in self.trace.nodes:
            self.axes[node] = self._label(node)
        for output in self.trace.outputs:
            self.space.pin_all(self.axes[output], output, "is an output of the model")
        if not self.trace.complete:
            self._pin_everything()
        self.root = self.space.roots()

    def _label(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            if node.meta["name"] == "constant":
                return no_axes(node.meta["shape"])
            return tuple(self.space.fresh(s) if s > 1 else None for s in node.meta["shape"])
        if node.op == "placeholder":
            return no_axes(node.meta["shape"])
        if node.meta["name"] == "getitem_output":
            source, key = node.args
            return self.axes[source][_position(source, key)]  # type: ignore[index]
        call = Call(node)
        rule = rule_for(call.name)
        self.steps.append(Step(call, rule))
        return rule.labels(call, self.axes.__getitem__, self.space)

    def _pin_everything(self) -> None:
        for node in self.trace.nodes:
            for axes in _each(self.axes[node]):
                self.space.pin_all(axes, node, "runs in a model with code that cannot be traced")

    # -- pins that experience adds ---------------------------------------------------------

    def pin(self, node: fx.Node, reason: str) -> None:
        """Keep all axes of a node's inputs and output as they are."""
        for each in (node, *node.all_input_nodes):
            for axes in _each(self.axes[each]):
                self.space.pin_all(axes, node, reason)
        self.root = self.space.roots()

    # -- queries ---------------------------------------------------------------------------

    def networkx(self) -> nx.DiGraph:
        """The trace as a ``networkx.DiGraph`` from producer to consumer."""
        return self.trace.networkx()

    def axis(self, node: fx.Node, axis: int) -> Axis:
        return self.axes[node][axis]  # type: ignore[no-any-return]

    def parameter_labels(self, path: str, axis: int) -> np.ndarray | None:
        """Root label of each position along one axis of a parameter; None if it is not in the run.

        Equal roots go together, 0 stays.
        """
        node = self.trace.leaves.get(path)
        if node is None:
            return None
        labels = self.axes[node][axis]
        size = node.meta["shape"][axis]
        return np.zeros(size, np.int64) if labels is None else self.root[labels]

    @cached_property
    def output_axes(self) -> dict[str, int]:
        """For each weight that makes units (channels, features): the axis that they lie along."""
        found: dict[str, int] = {}
        for step in self.steps:
            made = step.rule.weight(step.call)
            if made is not None and made[0].op == "get_attr":
                found[str(made[0].target)] = made[1]
        return found

    @cached_property
    def vectors(self) -> list[np.ndarray]:
        """Every distinct label vector of the graph."""
        found: dict[int, np.ndarray] = {}
        for value in self.axes.values():
            for axes in _each(value):
                for axis in axes:
                    if axis is not None:
                        found[id(axis)] = axis
        return list(found.values())

    def pin_reason(self, label: int) -> str:
        """Why a label that is tied to 0 stays: the pin it reaches by the fewest ties."""
        if label == 0:
            return "cannot shrink"
        pinned = self._pins
        seen, queue = {label}, deque([label])
        while queue:
            at = queue.popleft()
            if at in pinned:
                return f"{pinned[at].reason} at {location(pinned[at].node)}"
            for near in self._neighbours.get(at, ()):
                if near not in seen:
                    seen.add(near)
                    queue.append(near)
        return "is tied to a fixed size"

    @property
    def _pins(self) -> dict[int, Pin]:
        found: dict[int, Pin] = {}
        for pin in self.space.pins:
            for label in pin.labels.tolist():
                found.setdefault(label, pin)
        return found

    @cached_property
    def _neighbours(self) -> dict[int, list[int]]:
        near: dict[int, list[int]] = defaultdict(list)
        for tie in self.space.ties:
            for a, b in zip(tie.left.tolist(), tie.right.tolist(), strict=True):
                near[a].append(b)
                near[b].append(a)
        return near


def _position(source: fx.Node, key: Any) -> int:
    keys = source.meta.get("keys")
    return keys.index(key) if keys else key  # type: ignore[no-any-return]


def _each(axes: Any) -> Iterator[Axes]:
    """The axes of each output of a call with one output or several."""
    if axes and isinstance(axes[0], tuple):
        yield from (a for a in axes if a is not None)
    elif axes is not None:
        yield axes


def users_of(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """How many calls use each node."""
    counts: dict[fx.Node, int] = defaultdict(int)
    for node in nodes:
        for source in node.all_input_nodes:
            counts[source] += 1
    return counts
