"""What the channel graph says beyond ties: which units are heads, and which groups are alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import fx

from compress.graph.channels import ChannelGraph
from compress.graph.explain import parameter_axes
from compress.graph.labels import Axis, each_output, joined


def head_grids(graph: ChannelGraph) -> list[bool]:
    """For each grid, whether its rows are attention heads and its columns dims that they sum over.

    So it is where a product of tensors that depend on the input sums over the columns and has the
    rows in its result: queries with keys, in whatever words. What else has such heads (the values,
    shared keys) is tied to their rows.
    """
    products = [
        (_keys(graph, node), _key(graph, graph.axes[node][axis]), _keys(graph, step.call.node))
        for step in graph.steps
        for sides in step.rule.summed(step.call)
        for node, axis in sides
    ]
    heads = []
    for grid in graph.space.grids:
        rows, columns = _key(graph, grid.rows), _key(graph, grid.columns)
        free = bool(graph.root[grid.rows].any())
        heads.append(
            free
            and any(
                columns == summed and rows in operand and rows in result
                for operand, summed, result in products
            )
        )
    return heads


def _keys(graph: ChannelGraph, node: fx.Node) -> set[bytes]:
    return {_key(graph, axis) for axis in graph.axes[node]}


def _key(graph: ChannelGraph, axis: Axis) -> bytes:
    return b"" if axis is None else graph.root[axis].tobytes()


def join_blocks_of(
    root: np.ndarray, units: Mapping[str, np.ndarray], blocks: Mapping[str, int]
) -> np.ndarray:
    """Roots in which so many neighbouring units of a layer go together.

    Args:
        units: the labels of each layer's units.
        blocks: units per block, for the layers that have blocks.
    """
    for name, size in blocks.items():
        labels = units[name].reshape(-1, size)
        first = np.broadcast_to(labels[:, :1], labels.shape)
        root = joined(root, [root[first].ravel()], [root[labels].ravel()])
    return root


def structure_classes(graph: ChannelGraph, root: np.ndarray) -> np.ndarray:
    """A number for each label, the same for labels whose coupled groups are isomorphic.

    Two groups are, when their members correspond, in the same number: parameters of the same kinds
    of modules along the same axes, and the calls that the units go through. Widths and kernel sizes
    do not count. Isomorphic Pruning for Vision Models (Fang et al. 2024), section 3.2.
    """
    kinds: dict[tuple[object, ...], int] = {}
    parts: dict[int, list[int]] = {}
    for each in parameter_axes(graph):
        path, _, name = each.parameter.rpartition(".")
        kind = type(graph.model.get_submodule(path)).__name__, name, each.axis, each.reads
        for label in np.unique(root[each.labels]).tolist():
            parts.setdefault(label, []).append(kinds.setdefault(kind, len(kinds)))
    for step in graph.steps:
        number = kinds.setdefault((step.call.name,), len(kinds))
        for axes in each_output(graph.axes[step.call.node]):
            for axis in axes:
                labels = () if axis is None else np.unique(root[axis]).tolist()
                for label in labels:
                    parts.setdefault(label, []).append(number)
    numbers: dict[tuple[int, ...], int] = {}
    classes = np.zeros(len(root), np.int64)
    for label, members in parts.items():
        if label != root[0]:
            classes[label] = numbers.setdefault(tuple(sorted(members)), len(numbers) + 1)
    of_roots: np.ndarray = classes[root]
    return of_roots


def join_grids(graph: ChannelGraph, heads_of: list[bool] | None = None) -> np.ndarray:
    """Roots in which a grid loses whole columns (a dim of every head), or else whole rows (heads).

    See `whole_rows`.
    """
    root = graph.root
    for grid, rows in zip(graph.space.grids, whole_rows(graph, heads_of), strict=True):
        lines = grid.rows[:, None] if rows else grid.columns[None, :]
        lines = np.broadcast_to(lines, grid.cells.shape)
        root = joined(root, [lines.ravel()], [grid.cells.ravel()])
    return root


def whole_rows(graph: ChannelGraph, heads_of: list[bool] | None = None) -> list[bool]:
    """For each grid, whether rows go and not columns.

    Rows where columns cannot go (a scale counts on the dims) or are sliced (a rotation, which takes
    dims from all layers at once), where ``heads_of`` says so of the grid, and where the rows are
    those of such a grid: the heads of q, k and v.
    """
    root, grids = graph.root, graph.space.grids
    tied = np.zeros(len(root), bool)
    for labels in (np.zeros(1, np.int64), *graph.space.sliced):
        tied[root[labels]] = True
    by_row = [bool(tied[root[g.columns]].any() and (root[g.rows] != 0).any()) for g in grids]
    if heads_of is not None:
        by_row = [row or head for row, head in zip(by_row, heads_of, strict=True)]
    heads: set[int] = set()
    while True:
        found = {r for g, rows in zip(grids, by_row, strict=True) if rows for r in root[g.rows]}
        if found <= heads | {0}:
            return by_row
        heads |= found - {0}
        by_row = [
            rows or not heads.isdisjoint(root[g.rows])
            for g, rows in zip(grids, by_row, strict=True)
        ]
