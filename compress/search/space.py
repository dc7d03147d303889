"""What a search may choose: one sparsity for each group of layers that can only go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from compress.allocate import prune_count
from compress.config import Target, Targets
from compress.errors import ConfigError
from compress.masks import Masks
from compress.pruners.base import Pruner, ScoredAtoms
from compress.pruners.dependency import Coupling

Sparsities = Mapping[str, float]  # by name of the group


@dataclass(frozen=True)
class SearchGroup:
    """Layers that have one sparsity in a search.

    Attributes:
        name: that of its first layer.
        layers: the targets of the config_list, coupled or alone.
        units: of the first layer.
        weights: of all its layers together.
        max_sparsity: the most that may go.
    """

    name: str
    layers: tuple[str, ...]
    units: int
    weights: int
    max_sparsity: float


@dataclass(frozen=True)
class Point:
    """A choice of the space, carried out.

    Attributes:
        sparsities: as wanted, by group.
        share: the fraction of the weights of all selected layers that is masked.
        gone: which atoms go (`Coupling`); None where single weights are masked.
    """

    sparsities: Sparsities
    share: float
    gone: np.ndarray | None

    @property
    def key(self) -> bytes:
        """The same for points that make the same small model."""
        found = repr(sorted(self.sparsities.items())).encode()
        return found if self.gone is None else self.gone.tobytes()


class SearchSpace:
    """The groups of a model's layers under a one-shot pruner, whose scores are taken once.

    A pruner of whole filters is used in its mode ``dependency_aware``: layers that can only shrink
    together are a group. Of a pruner of single weights every layer is a group of its own.

    Args:
        kind: the one-shot pruner.
        model: plain or masked; never changed.
        config_list: which layers; its sparsities are not looked at.
        arguments: of the pruner's constructor, ``dummy_input`` among them.
    """

    def __init__(
        self,
        kind: type[Pruner],
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
    ) -> None:
        self._kind, self._model, self._arguments = kind, model, dict(arguments)
        pruner = kind(model, config_list, **arguments)
        self.targets: Targets = pruner.targets
        self._atoms: ScoredAtoms | None = None
        self._ranked: dict[str, tuple[np.ndarray, dict[str, int]] | None] = {}
        self._layers_of: dict[str, list[Any]] = {}  # of the coupling, with their scores
        self._memo: dict[tuple[Any, ...], np.ndarray] = {}
        self._sizes = sizes = _weights(pruner)
        self.weights = sum(sizes.values())
        if pruner.runs_the_model:
            self._couple(pruner.scored_atoms())
        else:
            self.groups = tuple(_of_weights(t, sizes[t.name]) for t in pruner.targets)

    def renew(self) -> None:
        """Take in what the coupling's graph has learned: points of before are none of this space.

        Raises:
            ConfigError: nothing can go any more.
        """
        if self._atoms is not None:
            self._ranked.clear()
            self._memo.clear()
            self._couple(self._atoms.again())

    def _couple(self, atoms: ScoredAtoms) -> None:
        self._atoms = atoms
        self.groups = _coupled_groups(atoms.coupling, self._sizes)
        if not self.groups:
            raise ConfigError(
                f"{self._kind.__name__}: nothing of the layers that the config_list selects can "
                "go: they make the output, or are coupled with layers that are not selected; "
                "ChannelGraph(model, dummy_input).why(layer, 0) says why"
            )

    @property
    def coupling(self) -> Coupling | None:
        """What goes together; None where single weights are masked."""
        return None if self._atoms is None else self._atoms.coupling

    @property
    def reachable(self) -> float:
        """The largest share of the selected layers' weights that can be masked."""
        return self.point({group.name: group.max_sparsity for group in self.groups}).share

    def point(self, sparsities: Sparsities) -> Point:
        """What such sparsities mask; a group that is not named keeps all its units."""
        if self._atoms is None:
            counts = [prune_count(g.units, sparsities.get(g.name, 0.0)) for g in self.groups]
            return Point(dict(sparsities), sum(counts) / self.weights, None)
        coupling = self._atoms.coupling
        gone = np.zeros(len(coupling.roots), bool)
        for group in self.groups:
            gone[self._chosen(coupling, group, sparsities.get(group.name, 0.0))] = True
        masked = sum(int(gone[x.roots].sum()) * x.weights_per_unit for x in coupling.layers)
        return Point(dict(sparsities), masked / self.weights, gone)

    def masks(self, point: Point) -> Masks:
        """The masks of a point."""
        if self._atoms is not None:
            assert point.gone is not None, "this space made the point"
            return self._atoms.masks(point.gone)
        config_list = self.config_list(point.sparsities)
        if not config_list:
            return Masks()
        return self._kind(self._model, config_list, **self._arguments).calc_masks()

    def config_list(self, sparsities: Sparsities) -> list[dict[str, Any]]:
        """The same for a one-shot pruner: an entry for each group of which anything goes."""
        modules = dict(self._model.named_modules())
        kinds = {t.name: type(modules[t.modules[0]]).__name__ for t in self.targets}
        return [
            {
                "sparsity": sparsities[group.name],
                "op_types": sorted({kinds[name] for name in group.layers}),
                "op_names": list(group.layers),
            }
            for group in self.groups
            if sparsities.get(group.name, 0.0) > 0
        ]

    def _chosen(self, coupling: Coupling, group: SearchGroup, sparsity: float) -> np.ndarray:
        """The atoms of a group that go."""
        sparsity = min(sparsity, group.max_sparsity)
        if group.name not in self._ranked:
            self._ranked[group.name] = coupling.ranked(group.layers)
            self._layers_of[group.name] = [x for x in coupling.layers if x.name in group.layers]
        layers = self._layers_of[group.name]
        budgets = {x.name: x.budget(sparsity, coupling.min_channels) for x in layers}
        ranked = self._ranked[group.name]
        if ranked is not None:
            atoms, units = ranked
            return atoms[: min(budget // units[name] for name, budget in budgets.items())]
        key = group.name, *budgets.values()
        if key not in self._memo:
            gone = coupling.choose(dict.fromkeys(group.layers, sparsity))
            self._memo[key] = np.flatnonzero(gone)
        return self._memo[key]


def _weights(pruner: Pruner) -> dict[str, int]:
    """Of each target."""
    return {one.name: pruner.layer(pruner.model, one).weight.numel() for one in pruner.targets}


def _of_weights(target: Target, weights: int) -> SearchGroup:
    """The group of a layer that loses single weights: one stays at least."""
    most = min(target.max_sparsity, 1 - 1 / weights)
    return SearchGroup(target.name, (target.name,), weights, weights, most)


def _coupled_groups(coupling: Coupling, sizes: Mapping[str, int]) -> tuple[SearchGroup, ...]:
    """Layers that share an atom are a group; what cannot go at all is in none."""
    owner: dict[int, int] = {}  # the group of an atom
    members: dict[int, list[int]] = {}  # the layers of a group
    for index, layer in enumerate(coupling.layers):
        atoms = np.unique(layer.roots[~coupling.fixed[layer.roots]]).tolist()
        if not atoms:
            continue
        merged = {owner[atom] for atom in atoms if atom in owner}
        joined = [index]
        for group in merged:
            joined += members.pop(group)
        number = min(joined)
        members[number] = sorted(joined)
        owner.update(dict.fromkeys(atoms, number))
        owner.update({atom: number for atom, group in owner.items() if group in merged})
    groups = []
    for layers in (members[number] for number in sorted(members)):
        found = [coupling.layers[index] for index in layers]
        groups.append(
            SearchGroup(
                name=found[0].name,
                layers=tuple(layer.name for layer in found),
                units=len(found[0].roots),
                weights=sum(sizes[layer.name] for layer in found),
                max_sparsity=min(layer.max_sparsity for layer in found),
            )
        )
    return tuple(groups)
