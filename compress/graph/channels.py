"""The channel graph: a trace with a label on every position that could be removed.

It knows nothing of masks: it is what the model's structure alone says about which positions of
which parameters must go together, and which cannot go at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from torch import fx, nn

from compress.graph.draw import draw
from compress.graph.explain import (
    Explanation,
    Group,
    coupled_layers,
    explain,
    find_groups,
    pin_clause,
)
from compress.graph.labels import Axis, Labels, LabelSpace, each_output
from compress.graph.run import Masked, record
from compress.graph.trace import Trace
from compress.graph.walk import modules_of
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


class ChannelGraph:
    """``ChannelGraph(model, dummy_input)``: labels for every axis of every tensor of one run.

    ``trace`` is the recorded run (an fx graph, or ``graph.networkx()``), ``axes`` maps a node to
    its label vectors, ``root`` maps a label to the smallest label of its class: positions with the
    same root are removed together, and root 0 never is. With ``exact=False`` channels that
    statistics are taken over may go, which changes these. A model that looks at its data runs
    within ``masked()``, where its parameters have the values that count.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        exact: bool = True,
        masked: Masked = nullcontext,
    ) -> None:
        self.model = model
        self.modules = dict(modules_of(model))
        self.trace: Trace = record(model, dummy_input, masked)
        self.space = LabelSpace(exact=exact)
        self.axes: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        for node in self.trace.nodes:
            self.axes[node] = self._label(node)
        for output in self.trace.outputs:
            for axes in each_output(self.axes[output]):
                self.space.pin_all(axes, output, "is an output of the model")
        self.space.pin_unattached()
        self._pin_unread_places()
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

    def _pin_unread_places(self) -> None:
        """Keep what this run does not read of a table that it slices: a longer input reads it."""
        if not self.space.sliced:
            return
        unread = np.zeros(self.space.size, bool)
        for labels in self.space.sliced:
            unread[labels] = True
        for labels in {id(axis): axis for axis in self._axes_read()}.values():
            unread[labels] = False
        for leaf in self.trace.leaves.values():
            for axis in self.axes[leaf]:
                if axis is not None and unread[axis].any():
                    self.space.pin(axis[unread[axis]], leaf, "is not read in this run")

    def _axes_read(self) -> Iterator[Labels]:
        """The label vectors of what calls read, but for those that only hand positions on."""
        nodes = (n for s in self.steps if not s.rule.moves for n in s.call.inputs)
        for node in nodes:
            for axes in each_output(self.axes[node]):
                yield from (axis for axis in axes if axis is not None)

    def _label(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            if node.meta["name"] == "constant" or not node.users:  # only looked at
                return no_axes(node.meta["shape"])
            slid = all(rule_for(user.meta["name"]).slides for user in node.users)
            return tuple(
                self.space.fresh(size) if size > 1 and not (slid and axis > 1) else None
                for axis, size in enumerate(node.meta["shape"])
            )
        if node.op == "placeholder":
            return no_axes(node.meta["shape"])
        if node.meta["name"] == "getitem_output":
            source, key = node.args
            assert isinstance(source, fx.Node)
            return self.axes[source][key]
        call = Call(node, self.modules)
        rule = rule_for(call.name)
        try:
            axes = rule.labels(call, self.axes.__getitem__, self.space)
        except Exception as error:
            # A form of the call that the rule did not foresee must not stop the user: it stays.
            rule, what = OPAQUE, f"confuses the rule for {call.name} ({type(error).__name__})"
            axes = OPAQUE.labels(call, self.axes.__getitem__, self.space, what)
        self.steps.append(Step(call, rule))
        single = any(a is not None and len(a) == 1 for part in each_output(axes) for a in part)
        return self._without_single(axes, node) if single else axes

    def _without_single(self, axes: Any, node: fx.Node) -> Any:
        """Axes without labels on those of size 1, which other calls take for broadcasts."""
        if any(isinstance(part, tuple) for part in axes):
            return tuple(
                None if part is None else self._without_single(part, node) for part in axes
            )
        for axis in axes:
            if axis is not None and len(axis) == 1:
                self.space.pin(axis, node, "is the only one of its axis")
        return tuple(None if axis is None or len(axis) == 1 else axis for axis in axes)

    # -- pins that experience adds ---------------------------------------------------------

    def pin(self, node: fx.Node, axes: list[int] | None, reason: str) -> bool:
        """Keep some axes of a node's output, or all of its inputs and output, as they are.

        Returns whether that was news.
        """
        if axes is None:
            for each in (node, *node.all_input_nodes):
                for several in each_output(self.axes[each]):
                    self.space.pin_all(several, node, reason)
        else:
            self.space.pin_all((self.axes[node][i] for i in axes), node, reason)
        return self.renew()

    def pin_module(self, path: str, reason: str) -> bool:
        """Keep every axis of what ran in one module; returns whether that was news."""
        for node in self.trace.nodes:
            if node.op == "call_function" and node.meta["module"] == path:
                for axes in each_output(self.axes[node]):
                    self.space.pin_all(axes, node, reason)
        return self.renew()

    def pin_everything(self, reason: str) -> None:
        """Keep every axis of every tensor: the model cannot shrink."""
        for node in self.trace.nodes:
            for axes in each_output(self.axes[node]):
                self.space.pin_all(axes, node, reason)
        self.renew()

    def renew(self) -> bool:
        """Join the labels anew after pins and ties were added; returns whether that changed any."""
        before, self.root = self.root, self.space.roots()
        self.__dict__.pop("nearest_pin", None)
        return not np.array_equal(before, self.root)

    def experience(self) -> tuple[bytes, int]:
        """Equal as long as no cut has taught the graph what the model's code cannot follow."""
        return self.root.tobytes(), len(self.space.equal_parts)

    # -- queries ---------------------------------------------------------------------------

    def networkx(self) -> nx.DiGraph:
        """The trace as a ``networkx.DiGraph`` from producer to consumer."""
        return self.trace.networkx()

    def axis(self, node: fx.Node, axis: int) -> Axis:
        found: Axis = self.axes[node][axis]
        return found

    @cached_property
    def module_paths(self) -> dict[nn.Module, str]:
        """The first path of each module."""
        return {module: path for path, module in self.modules.items()}

    @cached_property
    def layers(self) -> dict[str, LayerUnits]:
        """Every weight that makes units, by its path (of several calls, the first)."""
        found: dict[str, LayerUnits] = {}
        for step in self.steps:
            for made in step.rule.makes(step.call):
                weight = self._parameter_of(made)
                if weight is not None:
                    found.setdefault(str(weight.target), self._units(step.call, made))
        return found

    def _parameter_of(self, made: Units) -> fx.Node | None:
        """The parameter with a row for each unit, as the weight that may be computed from it."""
        weight, axis = made.weight, made.weight_axis
        if weight.op == "get_attr" or self.axes[weight][axis] is None:
            return weight if weight.op == "get_attr" else None
        seen, stack = {weight}, [weight]
        while stack:
            news = [node for node in stack.pop().all_input_nodes if node not in seen]
            seen.update(news)
            stack += [node for node in news if node.op == "call_function"]
        alike = [n for n in seen if n.op == "get_attr" and shape_of(n) == shape_of(weight)]
        roots = self.root[self.axes[weight][axis]]
        labelled = [(n, self.axes[n][axis]) for n in alike if self.axes[n][axis] is not None]
        found = [n for n, labels in labelled if np.array_equal(self.root[labels], roots)]
        return found[0] if len(found) == 1 else None

    def _units(self, call: Call, made: Units) -> LayerUnits:
        of_weight = self.axes[made.weight][made.weight_axis]
        if made.axis is None:
            labels, size = of_weight, shape_of(made.weight)[made.weight_axis]
        else:
            labels, size = self.axes[call.node][made.axis], call.shape[made.axis]
            if labels is None and shape_of(made.weight)[made.weight_axis] == size:
                labels = of_weight  # pinned, with a reason
        labels = np.zeros(size, np.int64) if labels is None else labels
        return LayerUnits(labels, made.weight_axis, self.passes_on(made, labels))

    def passes_on(self, made: Units, labels: np.ndarray) -> bool:
        """Whether units are the input's own channels, one by one, and none of them new.

        Where a residual ties a layer's output to its input, the weight reads the same labels along
        another axis.
        """
        if made.axis is None:
            return False
        source, path = self.axes[made.source][made.axis], str(made.weight.target)
        if source is None or not np.array_equal(self.root[labels], self.root[source]):
            return False
        others = [a for i, a in enumerate(self.axes[made.weight]) if i != made.weight_axis]
        reads = any(
            a is not None and np.array_equal(self.root[a], self.root[source]) for a in others
        )
        return not reads and path not in self.space.fields

    @cached_property
    def vectors(self) -> list[np.ndarray]:
        """Every distinct label vector of the graph."""
        found: dict[int, np.ndarray] = {}
        for value in self.axes.values():
            for axes in each_output(value):
                for axis in axes:
                    if axis is not None:
                        found[id(axis)] = axis
        return list(found.values())

    def groups(self) -> list[Group]:
        """The coupled groups: which positions of which axes of which parameters go together."""
        return find_groups(self)

    def coupled(self, layer: str, readers: bool = False) -> list[str]:
        """Names of the layers whose units go together with those of ``layer``, in order.

        Residual streams, the norms that follow, the queries and keys of the same heads. With
        ``readers`` those, too, that lose inputs on that account. Errors: ``GraphError`` where the
        model has no such layer.
        """
        return coupled_layers(self, layer, readers)

    def why(self, layer: str, channel: int) -> Explanation:
        """Whether the structure lets one unit of a layer go, and why; prints as a sentence.

        If it is held: by which ties, through which calls, to which pin. If it is free: what would
        go with it. Errors: ``GraphError`` where there is no such layer or channel.
        """
        return explain(self, layer, channel)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the layers to an SVG, PNG or PDF file.

        Boxes are layers, coupled ones have a colour in common; what is held has a red frame and
        says by what. Graphviz draws it where it and its program ``dot`` are installed, else
        matplotlib. Errors: ``GraphError`` where neither is, or for another kind of file.
        """
        draw(self, path)

    def pin_reason(self, label: int) -> str:
        """Why a label that is tied to 0 stays: a pin that it reaches by ties, and where that is."""
        pin = int(self.nearest_pin[label])
        return "is the only one of its axis" if pin < 0 else pin_clause(self, self.space.pins[pin])

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
