"""Where the targets of a config_list lie in a channel graph: the labels of their units."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from compress.config import Target, Targets
from compress.graph.channels import ChannelGraph
from compress.graph.labels import Axes, Axis
from compress.pruners.oneshot import filter_axis
from compress.pruners.parts import Part


def units_of(graph: ChannelGraph, target: Target, part: Part, units: int) -> np.ndarray:
    """The labels of a layer's output units, or of a norm's channels; of a head, one of its values'.

    Of a layer that was not called, but whose weight the model's own code uses: those along the axis
    that its units would have. Zeros where none ran, or with another number of ``units``.
    """
    found = graph.layers.get(target.parameters[0])
    if part.units is not None:
        rows = rows_of(graph, target, part)
        labels = None if rows is None else rows[:, 0].copy()
    elif found is not None:
        labels = found.labels
    else:
        labels = channels_of(graph, target.parameters[0])
        leaf = graph.trace.leaves.get(target.parameters[0])
        if leaf is not None and len(graph.axes[leaf]) > 1:
            axis, _ = filter_axis(graph.model.get_submodule(target.modules[0]))
            labels = graph.axes[leaf][axis]
    return np.zeros(units, np.int64) if labels is None or len(labels) != units else labels


def rows_of(graph: ChannelGraph, target: Target, part: Part) -> np.ndarray | None:
    """The labels of the rows of each unit, (units, rows), in the last copy of a layer of rows.

    All that a unit has goes with these: the gates with one another, a head's queries and keys with
    its values. None where the run did not use them.
    """
    leaf = graph.trace.leaves.get(target.parameters[-1])
    labels: Axis = None if leaf is None else graph.axes[leaf][0]
    if part.units is None or labels is None:
        return None
    rows: np.ndarray = labels.reshape(part.copies[part.weights[-1]], part.units, -1)[-1]
    return rows


def channels_of(graph: ChannelGraph, path: str) -> np.ndarray | None:
    """The labels of a weight with one axis, such as that of a norm, by its path."""
    leaf = graph.trace.leaves.get(path)
    axes: Axes = () if leaf is None else graph.axes[leaf]
    return axes[0] if len(axes) == 1 else None


def paths_of(targets: Targets) -> set[str]:
    """Paths of the weights of all targets, also where they are tied."""
    modules = ((module, t) for t in targets for module in t.modules)
    return {f"{module}.{name}" if module else name for module, t in modules for name in t.weights}


def weights_of(graph: ChannelGraph, target: Target) -> list[torch.Tensor]:
    module = graph.model.get_submodule(target.modules[0])
    return [getattr(module, name) for name in target.weights]


def whole_units(graph: ChannelGraph, rows: Iterable[np.ndarray | None]) -> list[bool]:
    """For each grid, whether its rows are units of a target: they go whole, not by columns."""
    found = [labels for labels in rows if labels is not None and labels.shape[1] > 1]
    if not found:
        return [False] * len(graph.space.grids)
    several = np.concatenate([labels.ravel() for labels in found])
    several = several[several != 0]
    return [bool(np.isin(grid.cells, several).any()) for grid in graph.space.grids]


def with_rows(graph: ChannelGraph, labels: np.ndarray) -> np.ndarray:
    """Labels, and those of the rows of the grids that they are cells of: the heads."""
    rows = [g.rows[np.isin(g.cells, labels[labels != 0]).any(1)] for g in graph.space.grids]
    return np.concatenate([labels, *rows])


def shared_with(graph: ChannelGraph, target: Target) -> str:
    """The layer under whose name the graph has this one's weight, if that is another."""
    path, weight = target.parameters[0], weights_of(graph, target)[0]
    leaves = graph.trace.leaves
    owners = (other for other in leaves if leaves[other].meta["tensor"] is weight)
    owner = path if path in leaves else next(owners, path)
    return "" if owner == path else owner.removesuffix(".weight")


def coupled_besides(graph: ChannelGraph, target: Target, targets: set[str]) -> list[str]:
    """What a layer (or a norm) is coupled with of its kind that is no target."""
    own = target.parameters[0] in graph.layers
    found = []
    for other in graph.coupled(target.name):
        path = other if other in graph.layers else f"{other}.weight"
        units = graph.layers.get(path)
        of_its_kind = own == (units is not None) and not (units is not None and units.follows)
        if of_its_kind and path not in targets:
            found.append(other)
    return found
