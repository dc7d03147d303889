"""The plan: what the surgery will do, as plain data, computed whole before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from compress.graph.channels import ChannelGraph
from compress.graph.labels import Field, Labels
from compress.modules import STAND_INS
from compress.rules.registry import Call
from compress.speedup.decide import Decision
from compress.speedup.knowledge import Knowledge
from compress.speedup.sizes import attention_sizes, sizes_after


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of one parameter or buffer.

    ``keep`` holds the kept positions of each axis, in order (None: all). ``gather``, where each row
    keeps other positions (grouped convolutions): the axis, and the positions (rows kept, n).
    """

    keep: tuple[np.ndarray | None, ...]
    gather: tuple[int, np.ndarray] | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The kept part of a tensor of the parameter's shape (a mask, a gradient, a momentum)."""
        for axis, keep in enumerate(self.keep):
            if keep is not None:
                tensor = tensor.index_select(axis, torch.from_numpy(keep).to(tensor.device))
        if self.gather is not None:
            axis, positions = self.gather
            index = torch.from_numpy(positions).to(tensor.device)
            index = index.reshape(*index.shape, *[1] * (tensor.dim() - 2))
            shape = list(tensor.shape)
            shape[axis] = index.shape[axis]
            tensor = tensor.gather(axis, index.expand(shape))
        return tensor

    def shape(self, before: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is left."""
        after = [b if k is None else len(k) for b, k in zip(before, self.keep, strict=True)]
        if self.gather is not None:
            after[self.gather[0]] = self.gather[1].shape[self.gather[0]]
        return tuple(after)


@dataclass(frozen=True)
class Carry:
    """Add to a weight's position ``target`` of ``axis`` its positions ``sources`` times ``ratios``.

    Positions count in the weight as it was. Exact where the channels are known constants in these
    ratios.
    """

    axis: int
    target: int
    sources: np.ndarray
    ratios: np.ndarray


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module (``groups``, ``split_sizes``) that takes a new value."""

    module: str
    name: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Scale:
    """Multiply a parameter p by a factor where it enters as p + shift: (p + s) f - s."""

    factor: float
    shift: float = 0.0


@dataclass(frozen=True)
class Replacement:
    """A module that takes the class ``kind`` of ``compress.modules``, with some attributes."""

    module: str
    kind: str
    state: dict[str, Any]


@dataclass
class Plan:
    """Everything the surgery does, by parameter path.

    ``slices``: what is kept. ``biases``: what is added to a bias (positions as they were);
    ``new_biases``: the biases that are made for it, each with the weight it belongs to.
    ``carries``: constants moved within a weight. ``scales``: parameters multiplied by a number.
    ``attributes``: sizes and numbers set on modules. ``replacements``: modules of another class.
    ``shapes``: what the parameters that change had before. ``notes``: what limits the plan.
    ``on_meta``: it was made without values, so that the constants in it are none.
    """

    slices: dict[str, Slice] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    new_biases: dict[str, str] = field(default_factory=dict)
    carries: dict[str, list[Carry]] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    attributes: list[Attribute] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    on_meta: bool = False

    def __str__(self) -> str:
        table = Table(title="plan", title_justify="left")
        for name in ("parameter", "shape", "new shape", "values"):
            table.add_column(name, overflow="fold")
        for path in dict.fromkeys((*self.slices, *self.biases, *self.carries, *self.scales)):
            before, cut = self.shapes.get(path), self.slices.get(path)
            after = before if before is None or cut is None else cut.shape(before)
            if before is None:  # a bias that is new
                after = cut.shape(self.biases[path].shape) if cut else self.biases[path].shape
            table.add_row(path, str(before or "new"), str(after), self._moved(path))
        for attribute in self.attributes:
            name = f"{attribute.module}.{attribute.name}".lstrip(".")
            table.add_row(name, str(attribute.old), str(attribute.new), "")
        for replacement in self.replacements:
            table.add_row(replacement.module, "", replacement.kind, str(replacement.state))
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get() + "\n".join(self.notes)

    def _moved(self, path: str) -> str:
        """The constants that a parameter takes over, in words."""
        parts = []
        if path in self.biases:
            parts.append("takes constants")
        if path in self.scales:
            parts.append(f"times {self.scales[path].factor:.4g}")
        parts += [
            f"{carry.target} carries {len(carry.sources)} of axis {carry.axis}"
            for carry in self.carries.get(path, ())
        ]
        return ", ".join(parts)


def same_plan(one: Any, other: Any) -> bool:
    """Whether two plans (or parts of them) say the same, array by array."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same_plan(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_plan(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_plan, one, other))
    return bool(one == other)


class PlanBuilder:
    """Collects the plan; rules add to it what their calls need."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.knowledge: Knowledge = decision.knowledge
        self.graph: ChannelGraph = decision.graph
        self.plan = Plan()
        self.unset: list[fx.Node] = []
        self.numbers: dict[fx.Node, dict[float, float]] = {}  # by call: old and new
        self.counts = False  # whether the code must be seen to count a number anew
        self._attributes: dict[tuple[str, str], Attribute] = {}
        self._settled: set[tuple[str, str]] = set()
        self._shared: dict[bytes, np.ndarray] = {}
        self._of_labels: dict[int, np.ndarray | None] = {}
        for path, node in self.graph.trace.leaves.items():
            self._slice(path, node)
        if self.plan.slices:
            for step in self.graph.steps:
                step.rule.rewrite(step.call, self)
            self._set_module_sizes()
            self._replace_modules()
            self.plan.attributes = list(self._attributes.values())
        changed = {**self.plan.slices, **self.plan.biases, **self.plan.carries}
        leaves = self.graph.trace.leaves
        self.plan.shapes = {p: leaves[p].meta["shape"] for p in changed if p in leaves}

    def kept(self, labels: Labels) -> np.ndarray:
        return self.decision.kept(labels)

    # -- slices ----------------------------------------------------------------------------

    def _slice(self, path: str, node: fx.Node) -> None:
        keep = [
            None if labels is None else self._of_axis(labels) for labels in self.graph.axes[node]
        ]
        crossing = self.graph.space.fields.get(path)
        gather = None if crossing is None else self._gather(crossing, keep)
        if gather is not None or any(k is not None for k in keep):
            self.plan.slices[path] = Slice(tuple(keep), gather)

    def _of_axis(self, labels: Labels) -> np.ndarray | None:
        """The kept positions; the parameters along a layer's channels share their labels."""
        if id(labels) not in self._of_labels:
            self._of_labels[id(labels)] = self._positions(self.kept(labels))
        return self._of_labels[id(labels)]

    def _positions(self, kept: np.ndarray) -> np.ndarray | None:
        """The kept positions (None: all); coupled axes share one array."""
        if kept.all():
            return None
        return self._shared.setdefault(kept.tobytes(), np.flatnonzero(kept))

    def _gather(self, each: Field, keep: list[np.ndarray | None]) -> tuple[int, np.ndarray] | None:
        """The positions along the field's axis that each kept row (or column) keeps."""
        kept = self.kept(each.labels.reshape(each.labels.shape[:2]))
        other = 1 - each.axis
        if other == 1:
            kept = kept.T
        rows = keep[other]
        kept = kept if rows is None else kept[rows]
        if kept.all():
            return None
        positions = np.stack([np.flatnonzero(row) for row in kept])
        return each.axis, positions if other == 0 else np.ascontiguousarray(positions.T)

    # -- what rules ask for ----------------------------------------------------------------

    def add_to_bias(
        self, call: Call, weight: fx.Node, bias: fx.Node | None, weight_out: int, shift: np.ndarray
    ) -> None:
        """Add ``shift`` (out,) to the bias of a call; without one, its module gets one."""
        if bias is not None:
            path = str(bias.target)
        else:
            path = f"{call.module}.bias" if call.module else "bias"
            self.plan.new_biases[path] = str(weight.target)
            labels = self.graph.axes[call.node][1 if weight.meta["shape"][2:] else -1]
            labels = self.graph.axes[weight][weight_out] if labels is None else labels
            positions = None if labels is None else self._positions(self.kept(labels))
            if positions is not None:
                self.plan.slices[path] = Slice((positions,))
        self.plan.biases[path] = self.plan.biases.get(path, 0.0) + shift

    def carry(
        self, call: Call, weight: fx.Node, axis: int, labels: Labels, constants: np.ndarray,
        gone: np.ndarray,
    ) -> None:  # fmt: skip
        """Let one kept constant channel stand for those that are gone."""
        target = self.decision.carrier(labels, constants, gone)
        assert target is not None, f"no carrier for {call.node}"
        sources = np.flatnonzero(gone)
        ratios = constants[sources] / constants[target]
        carries = self.plan.carries.setdefault(str(weight.target), [])
        carries.append(Carry(axis, target, sources, ratios))

    def scale(self, path: str, factor: float, shift: float = 0.0) -> None:
        """Multiply a parameter that enters as itself plus ``shift``."""
        self.plan.scales[path] = Scale(factor, shift)

    def replace(self, call: Call, kind: str, state: dict[str, Any]) -> None:
        """Make the module that a call ran in one of ``compress.modules``."""
        self.plan.replacements.append(Replacement(call.module, kind, state))

    def set_number(self, call: Call, name: str, old: Any, new: Any, counted: bool = False) -> None:
        """Set the attribute ``name`` (a size, an epsilon) of the module that a call ran in.

        ``counted``: where no attribute holds it, the code may count it anew; a replay tells.
        """
        if old == new:
            return
        if counted and getattr(call.owner, name, None) != old:
            self.counts = True
            return
        if isinstance(old, float):
            self.numbers.setdefault(call.node, {})[old] = new
        attribute = Attribute(call.module, name, old, new)
        other = self._attributes.setdefault((call.module, name), attribute)
        if getattr(call.owner, name, None) != old or other != attribute:
            self.unset.append(call.node)  # a number in the user's code, or two wishes for one

    def add_attributes(self, attributes: Iterable[Attribute]) -> None:
        """Set further attributes, where no rule has set them, and no module knows them better."""
        for attribute in attributes:
            if (attribute.module, attribute.name) not in self._settled:
                self._attributes.setdefault((attribute.module, attribute.name), attribute)
        self.plan.attributes = list(self._attributes.values())

    # -- the sizes that torch's own modules show -------------------------------------------

    def _set_module_sizes(self) -> None:
        touched = {path.rpartition(".")[0] for path in self.plan.slices}
        for path in sorted(p.split(".parametrizations")[0] for p in touched):
            module = self.graph.modules[path]
            groups = self._attributes.get((path, "groups"))
            given = groups.new if groups else None
            for name, new in sizes_after(path, module, self.plan.slices, given):
                old = getattr(module, name)
                if old != new:
                    self._attributes[path, name] = Attribute(path, name, old, new)

    def _replace_modules(self) -> None:
        for path, module in self.graph.modules.items():
            kind = STAND_INS.get(type(module))
            if kind is None and type(module) not in STAND_INS.values():
                continue
            assert isinstance(module, nn.MultiheadAttention)
            prefix = f"{path}." if path else ""
            cuts = {
                name: self.plan.slices[prefix + name]
                for name, _ in module.named_parameters()
                if prefix + name in self.plan.slices
            }
            if cuts and kind is not None:
                replacement = Replacement(path, kind.__name__, kind.state_of(module))
                self.plan.replacements.append(replacement)
            for name, new in attention_sizes(module, cuts) if cuts else ():
                old = getattr(module, name)
                self._settled.add((path, name))  # the width of its output may equal that of heads
                if old != new:
                    self._attributes[path, name] = Attribute(path, name, old, new)
