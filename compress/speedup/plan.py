"""The plan: what the surgery will do, as plain data, computed whole before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.graph.channels import ChannelGraph
from compress.graph.labels import Field, Labels
from compress.modules import STAND_INS
from compress.rules.registry import Call
from compress.speedup.decide import Decision
from compress.speedup.knowledge import Knowledge


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
    ``carries``: constants moved within a weight. ``attributes``: sizes set on modules.
    ``replacements``: modules whose class cannot take the new sizes.
    """

    slices: dict[str, Slice] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    new_biases: dict[str, str] = field(default_factory=dict)
    carries: dict[str, list[Carry]] = field(default_factory=dict)
    attributes: list[Attribute] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)


class PlanBuilder:
    """Collects the plan; rules add to it what their calls need."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.knowledge: Knowledge = decision.knowledge
        self.graph: ChannelGraph = decision.graph
        self.plan = Plan()
        self.unset: list[fx.Node] = []
        self._attributes: dict[tuple[str, str], Attribute] = {}
        self._shared: dict[bytes, np.ndarray] = {}
        for path, node in self.graph.trace.leaves.items():
            self._slice(path, node)
        if self.plan.slices:
            for step in self.graph.steps:
                step.rule.rewrite(step.call, self)
            self._set_module_sizes()
            self._replace_modules()
            self.plan.attributes = list(self._attributes.values())

    def kept(self, labels: Labels) -> np.ndarray:
        return self.decision.kept(labels)

    # -- slices ----------------------------------------------------------------------------

    def _slice(self, path: str, node: fx.Node) -> None:
        keep = [
            None if labels is None else self._positions(self.kept(labels))
            for labels in self.graph.axes[node]
        ]
        crossing = self.graph.space.fields.get(path)
        gather = None if crossing is None else self._gather(crossing, keep)
        if gather is not None or any(k is not None for k in keep):
            self.plan.slices[path] = Slice(tuple(keep), gather)

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

    def set_size(self, call: Call, name: str, old: int, new: int) -> None:
        """Set the attribute ``name`` of the module that a call ran in."""
        if old == new:
            return
        module = self.graph.model.get_submodule(call.module)
        if getattr(module, name, None) != old:
            self.unset.append(call.node)  # a number in the user's code
            return
        self._attributes[call.module, name] = Attribute(call.module, name, old, new)

    def add_attributes(self, attributes: Iterable[Attribute]) -> None:
        """Set further attributes, where no rule has set them."""
        for attribute in attributes:
            self._attributes.setdefault((attribute.module, attribute.name), attribute)
        self.plan.attributes = list(self._attributes.values())

    # -- the sizes that torch's own modules show -------------------------------------------

    def _set_module_sizes(self) -> None:
        touched = {path.rpartition(".")[0] for path in self.plan.slices}
        for path in sorted(p.split(".parametrizations")[0] for p in touched):
            module = self.graph.model.get_submodule(path)
            for name, new in self._sizes(path, module):
                old = getattr(module, name)
                if old != new:
                    self._attributes[path, name] = Attribute(path, name, old, new)

    def _replace_modules(self) -> None:
        for path, module in self.graph.model.named_modules():
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
            for name, new in _attention_sizes(module, cuts) if cuts else ():
                old = getattr(module, name)
                if old != new:
                    self._attributes[path, name] = Attribute(path, name, old, new)

    def _sizes(self, path: str, module: nn.Module) -> list[tuple[str, int]]:
        prefix = f"{path}." if path else ""
        shapes = {
            name: self.plan.slices[prefix + name].shape(tensor.shape)
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and prefix + name in self.plan.slices
        }
        weight = shapes.get("weight")
        groups = self._attributes.get((path, "groups"))
        return module_sizes(module, weight, shapes, groups.new if groups else None)


def module_sizes(
    module: nn.Module,
    weight: tuple[int, ...] | None,
    shapes: dict[str, tuple[int, ...]],
    groups: int | None,
) -> list[tuple[str, int]]:
    """The size attributes of a torch module whose tensors take new shapes."""
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        near, far = weight[0], weight[1] * (groups or module.groups)
        names = ("in_channels", "out_channels")
        return list(zip(names, (near, far) if module.transposed else (far, near), strict=True))
    if isinstance(module, nn.Linear) and weight is not None:
        return [("in_features", weight[1]), ("out_features", weight[0])]
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and shapes:
        name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        return [(name, next(iter(shapes.values()))[0])]
    if isinstance(module, nn.Bilinear) and weight is not None:
        return list(zip(("out_features", "in1_features", "in2_features"), weight, strict=True))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and weight is not None:
        return [("num_embeddings", weight[0]), ("embedding_dim", weight[1])]
    if isinstance(module, nn.PReLU) and weight is not None:
        return [("num_parameters", weight[0])]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and shapes:
        return _recurrent_sizes(module, shapes)
    return []


def _recurrent_sizes(
    module: nn.RNNBase | nn.RNNCellBase, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[str, int]]:
    """The sizes of a recurrent module, from the weights of its first layer."""
    layer = "_l0" if isinstance(module, nn.RNNBase) else ""
    after = {
        name: shapes.get(f"weight_{name}{layer}", getattr(module, f"weight_{name}{layer}").shape)
        for name in ("ih", "hh", "hr")
        if hasattr(module, f"weight_{name}{layer}")
    }
    gates = getattr(module, f"weight_ih{layer}").shape[0] // module.hidden_size
    sizes = [("input_size", after["ih"][1]), ("hidden_size", after["hh"][0] // gates)]
    return sizes + ([("proj_size", after["hr"][0])] if "hr" in after else [])


def _attention_sizes(
    module: nn.MultiheadAttention, cuts: dict[str, Slice]
) -> list[tuple[str, int]]:
    """The sizes of an attention module: heads are left of which any value is."""
    packed = module.in_proj_weight is not None
    values, parts = ("in_proj_weight", 3) if packed else ("v_proj_weight", 1)
    weights = dict(module.named_parameters())
    shapes = {n: cuts[n].shape(t.shape) if n in cuts else t.shape for n, t in weights.items()}
    rows, heads = weights[values].shape[0], module.num_heads
    cut = cuts.get(values)
    if cut is not None and cut.keep[0] is not None:
        per_head = rows // (parts * heads)
        rows, heads = len(cut.keep[0]), len(np.unique(cut.keep[0] // per_head)) // parts
    keys = "in_proj_weight" if packed else "k_proj_weight"
    return [
        ("num_heads", heads),
        ("head_dim", rows // (parts * heads)),
        ("embed_dim", shapes["out_proj.weight"][0]),
        ("kdim", shapes[keys][1]),
        ("vdim", shapes[values][1]),
    ]
