"""The channel graph: a trace with a label on every position that could be removed.

It knows nothing of masks: it is what the model's structure alone says about which positions of
which parameters must go together, and which cannot go at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from torch import fx, nn

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.run import record
from compress.graph.trace import Trace
from compress.rules.registry import OPAQUE, Call, Rule, Units, no_axes, rule_for, shape_of


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the trace with the rule for its function."""

    call: Call
    rule: Rule


@dataclass(frozen=True)
class LayerUnits:
    """The output units of a weight: their labels, and the weight's axis that they lie along.

    ``follows``: they are the input's own channels (a depthwise convolution), not new ones.
    """

    labels: np.ndarray
    axis: int
    follows: bool


def location(node: fx.Node) -> str:
    """``layer1.0 (resnet.py:92)``: where in the user's model a node comes from."""
    source = node.meta["source"]
    where = f"{source[0].rpartition('/')[2]}:{source[1]}" if source else ""
    module = node.meta["module"] or "the model's forward"
    return f"{module} ({where})" if where else module


class ChannelGraph:
    """``ChannelGraph(model, dummy_input)``: labels for every axis of every tensor of one run.

    ``trace`` is the recorded run (an fx graph, or ``graph.networkx()``), ``axes`` maps a node to
    its label vectors, ``root`` maps a label to the smallest label of its class: positions with the
    same root are removed together, and root 0 never is.
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
            for axes in _each(self.axes[output]):
                self.space.pin_all(axes, output, "is an output of the model")
        for path, crossing in self.space.fields.items():
            weight = self.trace.leaves[path]
            if len(weight.users) != self.space.field_uses[path]:  # something else reads it, too
                self.space.pin(crossing.labels.reshape(-1), weight, "is read in more than one way")
        # What is computed for nothing (attention's mean weights) need not be computed rightly.
        idle = {s.call.node for s in self.steps if s.rule.any_size} - self.trace.used()
        self.space.pins = [pin for pin in self.space.pins if pin.node not in idle]
        self.root = self.space.roots()
        if not self.trace.complete:
            self.pin_everything("runs in a model with code that cannot be traced")

    def _label(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            if node.meta["name"] == "constant" or not node.users:  # only looked at
                return no_axes(node.meta["shape"])
            return tuple(self.space.fresh(s) if s > 1 else None for s in node.meta["shape"])
        if node.op == "placeholder":
            return no_axes(node.meta["shape"])
        if node.meta["name"] == "getitem_output":
            source, key = node.args
            assert isinstance(source, fx.Node)
            return self.axes[source][key]
        call = Call(node)
        rule = rule_for(call.name)
        try:
            axes = rule.labels(call, self.axes.__getitem__, self.space)
        except Exception as error:
            # A form of the call that the rule did not foresee must not stop the user: it stays.
            rule, what = OPAQUE, f"confuses the rule for {call.name} ({type(error).__name__})"
            axes = OPAQUE.labels(call, self.axes.__getitem__, self.space, what)
        self.steps.append(Step(call, rule))
        return axes

    # -- pins that experience adds ---------------------------------------------------------

    def pin(self, node: fx.Node, axes: list[int] | None, reason: str) -> bool:
        """Keep some axes of a node's output, or all of its inputs and output, as they are.

        Returns whether that was news.
        """
        if axes is None:
            for each in (node, *node.all_input_nodes):
                for several in _each(self.axes[each]):
                    self.space.pin_all(several, node, reason)
        else:
            self.space.pin_all((self.axes[node][i] for i in axes), node, reason)
        return self.renew()

    def pin_module(self, path: str, reason: str) -> bool:
        """Keep every axis of what ran in one module; returns whether that was news."""
        for node in self.trace.nodes:
            if node.op == "call_function" and node.meta["module"] == path:
                for axes in _each(self.axes[node]):
                    self.space.pin_all(axes, node, reason)
        return self.renew()

    def pin_everything(self, reason: str) -> None:
        """Keep every axis of every tensor: the model cannot shrink."""
        for node in self.trace.nodes:
            for axes in _each(self.axes[node]):
                self.space.pin_all(axes, node, reason)
        self.renew()

    def renew(self) -> bool:
        """Join the labels anew after pins and ties were added; returns whether that changed any."""
        before, self.root = self.root, self.space.roots()
        self.__dict__.pop("nearest_pin", None)
        return not np.array_equal(before, self.root)

    # -- queries ---------------------------------------------------------------------------

    def networkx(self) -> nx.DiGraph:
        """The trace as a ``networkx.DiGraph`` from producer to consumer."""
        return self.trace.networkx()

    def axis(self, node: fx.Node, axis: int) -> Axis:
        return self.axes[node][axis]  # type: ignore[no-any-return]

    @cached_property
    def layers(self) -> dict[str, LayerUnits]:
        """Every weight that makes units, by its path (of several calls, the first)."""
        found: dict[str, LayerUnits] = {}
        for step in self.steps:
            for made in step.rule.makes(step.call):
                if made.weight.op == "get_attr":
                    found.setdefault(str(made.weight.target), self._units(step.call, made))
        return found

    def _units(self, call: Call, made: Units) -> LayerUnits:
        if made.axis is None:
            labels, size = self.axes[made.weight][made.weight_axis], shape_of(made.weight)
            labels = np.zeros(size[made.weight_axis], np.int64) if labels is None else labels
            return LayerUnits(labels, made.weight_axis, False)
        labels, source = self.axes[call.node][made.axis], self.axes[made.source][made.axis]
        labels = np.zeros(call.shape[made.axis], np.int64) if labels is None else labels
        passes = source is not None and np.array_equal(self.root[labels], self.root[source])
        return LayerUnits(labels, made.weight_axis, bool(passes))

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
        """Why a label that is tied to 0 stays: a pin that it reaches by ties, and where that is."""
        pin = int(self.nearest_pin[label])
        if pin < 0:
            return "cannot shrink"
        return f"{self.space.pins[pin].reason} at {location(self.space.pins[pin].node)}"

    @cached_property
    def nearest_pin(self) -> np.ndarray:
        """For each label, the index of the pin fewest ties away; -1 where there is none."""
        nearest = np.full(self.space.size, -1)
        for index in reversed(range(len(self.space.pins))):
            nearest[self.space.pins[index].labels] = index
        if not self.space.ties:
            return nearest
        left = np.concatenate([t.left for t in self.space.ties])
        right = np.concatenate([t.right for t in self.space.ties])
        while True:
            before = nearest.copy()
            for a, b in ((left, right), (right, left)):
                reached = (before[a] < 0) & (before[b] >= 0)
                nearest[a[reached]] = before[b[reached]]
            if np.array_equal(before, nearest):
                return nearest


def _each(axes: Any) -> Iterator[Axes]:
    """The axes of each output of a call with one output or several."""
    if axes and isinstance(axes[0], tuple):
        yield from (a for a in axes if a is not None)
    elif axes is not None:
        yield axes
