"""Masks for layers that can only shrink together.

Layers whose outputs meet in an addition, a grouped convolution or a channel shuffle lose the same
channels or none. Here they are scored together and masked together, and so is every parameter that
would turn a masked channel into a constant (the norm that follows): everything masked can go.
Scoring coupled layers together: DepGraph (Fang et al. 2023), section 3.3; their group score is the
mean over the group of scores that are divided by their layer's mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress import allocate
from compress.config import WEIGHT, Target, Targets
from compress.graph.channels import ChannelGraph
from compress.graph.labels import Labels, joined
from compress.graph.trace import location
from compress.masks import Masks
from compress.pruners.parts import Part
from compress.pruners.placed import (
    channels_of,
    coupled_besides,
    paths_of,
    rows_of,
    shared_with,
    units_of,
    weights_of,
    whole_units,
    with_rows,
)
from compress.pruners.structure import (
    head_grids,
    join_blocks_of,
    join_grids,
    structure_classes,
    whole_rows,
)
from compress.speedup.cut import Cutter, Options
from compress.speedup.decide import Limits
from compress.speedup.surgery import by_leaf


@dataclass
class _Layer:
    """One target: its units' label roots and scores, and what limits how many may go.

    The criterion's scores are ``scores`` times ``scale``.
    """

    name: str
    roots: np.ndarray
    scores: np.ndarray
    scale: float
    sparsity: float | None
    max_sparsity: float
    group: int | None
    weights_per_unit: int
    step: int

    def budget(self, sparsity: float | None, min_channels: int) -> int:
        """How many units it may lose; None is as many as its limit allows."""
        units = len(self.scores)
        sparsity = min(self.max_sparsity if sparsity is None else sparsity, 1 - 1 / units)
        return units - allocate.keep_count(units, sparsity, self.step, min_channels)


@dataclass(frozen=True)
class Trial:
    """What became of masked units in a cut.

    ``stayed``: by layer, the labels of those that did not go, and why the first one did not.
    ``learned``: whether it taught the graph anything.
    """

    masked: int
    stayed: dict[str, tuple[Labels, str]]
    learned: bool

    @property
    def removed(self) -> int:
        """How many went."""
        return self.masked - sum(len(labels) for labels, _ in self.stayed.values())


class Coupling:
    """What of a config_list's layers can only go together, and what each of it is worth.

    An atom is a set of units, of one layer or of several, that go together or not at all. Which go
    is said by a bool array over the labels of the graph, ``gone``, which is True at atoms' roots.

    Attributes:
        graph: of the plain model.
        layers: the targets.
        roots: int (labels,): the atom of each label.
        fixed: bool (labels,): the atoms that cannot go.

    Args:
        parts: what each target is of its module, by name.
        blocks: how many neighbouring units of a layer go together.
        whole_heads: of attention, heads go and not their dims.
        isomorphic: a total sparsity is that of each kind of structure by itself (see
            `structure_classes`), and scores are as they are, not divided by a layer's mean.
        graph: of the plain model, if there is one already.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        scores: Mapping[str, torch.Tensor],
        dummy_input: Any,
        *,
        round_to: int,
        min_channels: int,
        parts: Mapping[str, Part],
        blocks: Mapping[str, int],
        whole_heads: bool,
        isomorphic: bool,
        graph: ChannelGraph | None = None,
    ) -> None:
        graph = ChannelGraph(model, dummy_input) if graph is None else graph
        self.graph = graph
        self.targets, self.min_channels = targets, min_channels
        steps = {t.name: math.lcm(round_to, blocks.get(t.name, 1)) for t in targets}
        units = {t.name: units_of(graph, t, parts[t.name], len(scores[t.name])) for t in targets}
        self.layers = [
            _layer(graph, t, scores[t.name], units[t.name], steps[t.name], isomorphic)
            for t in targets
        ]
        heads = whole_units(graph, (rows_of(graph, t, parts[t.name]) for t in targets))
        if whole_heads:
            heads = [a or b for a, b in zip(heads, head_grids(graph), strict=True)]
        roots = join_grids(graph, heads)
        roots = join_blocks_of(roots, units, blocks)
        self._by_row = whole_rows(graph, heads)
        self._held: dict[str, str] = {}  # why layers' units stayed in a trial
        self.roots = _join_equal_parts(graph, roots, self.layers)
        for layer in self.layers:
            layer.roots = self.roots[units[layer.name]]
        self.fixed = _unremovable(graph, self.roots, targets, units)
        for _, _, stays in self._lines():
            self.fixed[self.roots[stays]] = True
        self._classes = np.zeros(len(self.roots), np.int64)
        if isomorphic:
            self._classes = structure_classes(graph, self.roots)
        self._units, self._names = units, paths_of(targets)
        self._devices = {name: values.device for name, values in scores.items()}

    def choose(self, sparsities: Mapping[str, float] | None = None) -> np.ndarray:
        """What goes: the lowest scores first, while all their layers may lose them.

        No layer loses more than its sparsity allows, so that coupled layers with different
        sparsities lose what the smallest allows. A layer of which nothing can go (the model's
        output) is left alone: see `warn_of_untouched`.

        Args:
            sparsities: by layer, in the place of those of the config_list; a layer that is not
                named keeps all its units.
        """
        if sparsities is not None:
            layers = self._sharing_atoms(sparsities)
            budgets = [x.budget(sparsities.get(x.name, 0.0), self.min_channels) for x in layers]
            return _choose(layers, budgets, self.fixed, {}, self._classes)
        shares = _shares(self.layers, self.targets, self._classes)
        return _choose(self.layers, self._budgets(), self.fixed, shares, self._classes)

    def _budgets(self) -> list[int]:
        return [x.budget(x.sparsity, self.min_channels) for x in self.layers]

    def ranked(self, names: Collection[str]) -> tuple[np.ndarray, dict[str, int]] | None:
        """The atoms of some layers that may go, in the order in which `choose` takes them.

        And how many units of each layer an atom has; None where that is not the same for all atoms,
        or where other layers have units of them.
        """
        layers = self._sharing_atoms(names)
        counts: dict[str, int] = {}
        for layer in layers:
            atoms, numbers = np.unique(layer.roots, return_counts=True)
            free = ~self.fixed[atoms]
            if layer.name not in names or len(set(numbers[free].tolist())) != 1:
                return None
            counts[layer.name] = int(numbers[free][0])
        units = [layer.roots[~self.fixed[layer.roots]] for layer in layers]
        atoms = np.unique(np.concatenate(units))
        if any(len(u) != len(atoms) * counts[x.name] for u, x in zip(units, layers, strict=True)):
            return None
        score = _score_by_root(self.roots, layers)
        return atoms[np.argsort(score[atoms], kind="stable")], counts

    def _sharing_atoms(self, names: Container[str]) -> list[_Layer]:
        """The layers that have an atom of one of these."""
        atoms = np.zeros(len(self.roots), bool)
        for layer in self.layers:
            if layer.name in names:
                atoms[layer.roots] = True
        return [x for x in self.layers if atoms[x.roots].any()]

    def keep(self, gone: np.ndarray) -> dict[str, torch.Tensor]:
        """Keep vectors (units,) of every target."""
        return {
            layer.name: torch.from_numpy(~gone[layer.roots]).to(self._devices[layer.name])
            for layer in self.layers
        }

    def following(self, gone: np.ndarray) -> Masks:
        """The masks of all other parameters along what goes."""
        return _following_masks(self.graph, self.roots, gone, self._names)

    def tried(self, model: nn.Module, dummy_input: Any, masks: Masks, gone: np.ndarray) -> Trial:
        """What becomes of ``gone`` and its masks in a cut, which is undone.

        The graph learns what the model's own code cannot follow: a size that it has as a number,
        two that it counts with one. What goes together is to be asked anew then. A model that looks
        at what its parameters make takes another way when it is masked: it is not tried.
        """
        if not self.graph.trace.on_meta:
            return Trial(0, {}, learned=False)
        options, before = Options("exact", Limits(1, 1), True), self.graph.experience()
        cut = Cutter(model, dummy_input, by_leaf(model, masks), options, self.graph).cut(
            always_replay=False
        )
        cut.undo()
        masked, stayed = 0, {}
        for layer in self.layers:
            units = self._units[layer.name][gone[layer.roots]]
            left = units[cut.decision.kept(units)]
            masked += len(units)
            if len(left):
                stayed[layer.name] = left, cut.decision.reason(int(left[0])) or ""
        return Trial(masked, stayed, self.graph.experience() != before)

    def hold(self, trial: Trial) -> None:
        """Choose nothing more of what stayed in a trial: others may go."""
        for name, (labels, reason) in trial.stayed.items():
            self.fixed[self.roots[labels]] = True
            self._held[name] = reason

    def warn_of_untouched(self, gone: np.ndarray) -> None:
        """Warn of each layer of which nothing goes, with the reason."""
        # Under a total sparsity a layer may be left alone because others are worth less.
        for layer, target, budget in zip(self.layers, self.targets, self._budgets(), strict=True):
            able = layer.group is None or self.fixed[layer.roots].all()
            if able and budget > 0 and not gone[layer.roots].any():
                reason = self._why_untouched(layer, target)
                warnings.warn(
                    f"the pruner masks nothing of {layer.name!r}: it {reason}", stacklevel=3
                )

    def _lines(self) -> Iterator[tuple[fx.Node, str, Labels]]:
        """Of each grid: where it is, and what stays of it (rows or columns) as the others go."""
        for grid, rows in zip(self.graph.space.grids, self._by_row, strict=True):
            yield grid.node, *(("columns", grid.columns) if rows else ("rows", grid.rows))

    def _why_untouched(self, layer: _Layer, target: Target) -> str:
        graph, labels = self.graph, self._units[layer.name]
        if shared := shared_with(graph, target):
            return f"shares its weight with {shared!r}, which decides about both"
        if not labels.any():
            return "runs in no way that the graph knows"
        if layer.name in self._held:
            return self._held[layer.name]
        labels = labels if target.weights == WEIGHT else with_rows(graph, labels)
        held = graph.root == graph.root[0]
        if held[labels].any():
            return graph.pin_reason(int(labels[held[labels]][0]))
        if others := coupled_besides(graph, target, self._names):
            return (
                f"is coupled with {', '.join(map(repr, others))}, not to be pruned: select those, "
                "too, if they may shrink with it"
            )
        held &= (graph.nearest_pin >= 0) & np.isin(self.roots, layer.roots)
        if held.any():
            return f"is coupled with a unit that {graph.pin_reason(int(np.flatnonzero(held)[0]))}"
        for node, what, stays in self._lines():
            if np.isin(layer.roots, self.roots[stays]).any():
                lines = "columns" if what == "rows" else "rows"
                return f"goes along with {what} at {location(node)}, where {lines} go instead"
        return "is coupled with a layer that is not to be pruned, or in too large steps"


def _layer(
    graph: ChannelGraph,
    target: Target,
    scores: torch.Tensor,
    labels: np.ndarray,
    step: int,
    isomorphic: bool,
) -> _Layer:
    values = scores.detach().double().cpu().numpy()
    mean = float(values.mean())
    scale = mean if mean > 0 and not isomorphic else 1.0
    return _Layer(
        name=target.name,
        roots=graph.root[labels],
        scores=values / scale,
        scale=scale,
        sparsity=target.sparsity,
        max_sparsity=1.0 if target.max_sparsity is None else target.max_sparsity,
        group=target.group,
        weights_per_unit=sum(w.numel() for w in weights_of(graph, target)) // len(scores),
        step=step,
    )


def _join_equal_parts(graph: ChannelGraph, root: np.ndarray, layers: list[_Layer]) -> np.ndarray:
    """Roots in which what must go in equal numbers goes together.

    Of the groups of a grouped convolution (the pieces of a chunk) the lowest of each go together,
    then the second lowest, and so on.
    """
    for equal in graph.space.equal_parts:
        score = _score_by_root(root, layers)
        order = np.argsort(score[root[equal.parts]], axis=1, kind="stable")
        ranked = np.take_along_axis(equal.parts, order, axis=1)
        first = np.broadcast_to(ranked[:1], ranked.shape)
        root = joined(root, [first.ravel()], [ranked.ravel()])
    return root


def _score_by_root(root: np.ndarray, layers: Iterable[_Layer]) -> np.ndarray:
    """The mean score of the units of each root, (labels,); 0 where no target has any."""
    total, count = np.zeros(len(root)), np.zeros(len(root))
    for layer in layers:
        np.add.at(total, root[layer.roots], layer.scores)
        np.add.at(count, root[layer.roots], 1)
    return total / np.maximum(count, 1)


def _unremovable(
    graph: ChannelGraph, root: np.ndarray, targets: Targets, units: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Bool (labels,): roots that are fixed, or of another layer that is not to be pruned.

    Where the targets are norms, the layers that make their channels are pruned along, and the other
    norms of their kind are the layers that are not to be pruned.
    """
    names = paths_of(targets)
    fixed = np.zeros(len(root), bool)
    fixed[0] = True
    of_norms = np.zeros(len(root), bool)
    norms = [t.name for t in targets if t.weights == WEIGHT and t.parameters[0] not in graph.layers]
    for name in norms:
        of_norms[root[units[name]]] = True
    for path, layer in graph.layers.items():
        if path not in names and not layer.follows:
            fixed[root[layer.labels][~of_norms[root[layer.labels]]]] = True
    kinds = tuple({type(graph.model.get_submodule(name)) for name in norms})
    for name, module in graph.model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, kinds) else None
        path = f"{name}.weight" if name else "weight"
        labels = None if weight is None or path in names else channels_of(graph, path)
        if labels is not None:
            fixed[root[labels]] = True
    return fixed


_Share = tuple[int, int]  # a group of layers under one total sparsity, a class of structure


def _shares(layers: list[_Layer], targets: Targets, classes: np.ndarray) -> dict[_Share, int]:
    """How many weights may go in all, for each group of layers and class of structure."""
    weights: dict[_Share, int] = {}
    for layer in (x for x in layers if x.group is not None):
        found, counts = np.unique(classes[layer.roots], return_counts=True)
        for kind, count in zip(found.tolist(), counts.tolist(), strict=True):
            share = layer.group or 0, kind
            weights[share] = weights.get(share, 0) + count * layer.weights_per_unit
    return {s: int(targets.groups[s[0]].sparsity * w + 1e-9) for s, w in weights.items()}


def _choose(
    layers: list[_Layer],
    budgets: list[int],
    fixed: np.ndarray,
    shares: dict[_Share, int],
    classes: np.ndarray,
) -> np.ndarray:
    """Bool (labels,), the roots to mask: lowest scores first, while all their layers may lose them.

    ``shares`` holds, for each group of layers under one total sparsity and each class, how many
    weights it may lose in all.
    """
    if not layers:
        return np.zeros(len(fixed), bool)
    owner = np.concatenate([np.full(len(x.roots), i) for i, x in enumerate(layers)])
    roots = np.concatenate([x.roots for x in layers])
    score = np.concatenate([x.scores for x in layers])
    atoms, index, counts = np.unique(roots, return_inverse=True, return_counts=True)
    mean = np.bincount(index, score) / counts
    blocked = fixed[atoms]
    needs: list[list[tuple[int, int]]] = [[] for _ in atoms]  # (layer, how many of its units)
    pairs, numbers = np.unique(index * len(layers) + owner, return_counts=True)
    for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
        needs[pair // len(layers)].append((pair % len(layers), number))
    budget = list(budgets)
    left = dict(shares)
    gone = np.zeros(len(fixed), bool)
    for atom in np.argsort(mean, kind="stable").tolist():
        if blocked[atom] or any(number > budget[i] for i, number in needs[atom]):
            continue
        weights = {}
        if shares:
            weights = _weights_by_share(layers, needs[atom], int(classes[atoms[atom]]))
        if any(weight > left[share] for share, weight in weights.items()):
            continue
        for i, number in needs[atom]:
            budget[i] -= number
        for share, weight in weights.items():
            left[share] -= weight
        gone[atoms[atom]] = True
    return gone


def _weights_by_share(
    layers: list[_Layer], needs: list[tuple[int, int]], kind: int
) -> dict[_Share, int]:
    weights: dict[_Share, int] = {}
    for i, number in needs:
        group = layers[i].group
        if group is not None:
            share = group, kind
            weights[share] = weights.get(share, 0) + number * layers[i].weights_per_unit
    return weights


def _following_masks(
    graph: ChannelGraph, root: np.ndarray, gone: np.ndarray, targets: set[str]
) -> Masks:
    """Masks for all other parameters along the chosen channels.

    Norms, biases, scales, depthwise convolutions; and the filters, where the targets are norms.
    """
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for path, node in graph.trace.leaves.items():
        layer = graph.layers.get(path)
        if node.meta["name"] != "parameter" or path in targets:
            continue
        axes = {layer.axis: layer.labels} if layer else dict(enumerate(graph.axes[node]))
        for axis, labels in axes.items():
            lost = None if labels is None else gone[root[labels]]
            if lost is None or not lost.any():
                continue
            weight = node.meta["tensor"]
            module, _, name = path.rpartition(".")
            keep = _expanded(torch.from_numpy(~lost), weight, axis)
            entries.setdefault(module, {})[name] = keep.to(weight.device)
    return Masks(entries)


def _expanded(keep: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """The mask of a weight whose positions along ``axis`` are ``keep``, or its groups' channels."""
    if len(keep) != weight.shape[axis]:  # a transposed convolution in groups
        return allocate.expand_filters(keep, weight, axis, len(keep) // weight.shape[axis])
    return keep.reshape(-1, *[1] * (weight.dim() - axis - 1)).expand(weight.shape)
