"""Labels: one integer for every unit (channel, feature, head) that could be removed.

Each axis of each tensor carries a vector of labels, one per position; position *i* goes when its
label goes. Label 0 stands for "stays". Two axes that must lose the same positions are *tied*, which
makes their labels one. ``None`` in place of a vector is short for all zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

Labels = np.ndarray  # int64, one per position of an axis
Axis = Labels | None
Axes = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Pin:
    """Labels that may not be removed, the node that says so, and why (a clause, for the user).

    ``meets``: they may not because another tensor of the call has a fixed size.
    """

    labels: Labels
    node: fx.Node
    reason: str
    meets: bool = False


@dataclass(frozen=True, slots=True)
class Tie:
    """Two label vectors that became one, position by position, at ``node``."""

    left: Labels
    right: Labels
    node: fx.Node


@dataclass(frozen=True, slots=True)
class Grid:
    """An axis seen as rows times columns: a cell goes exactly when its row or its column goes.

    ``cells`` is (rows, columns). The kept cells must form a rectangle, as a reshape of D into
    (heads, head_dim) or of C into (groups, C / groups) needs it.
    """

    cells: np.ndarray
    rows: Labels
    columns: Labels
    node: fx.Node


@dataclass(frozen=True, slots=True)
class EqualParts:
    """The same number of positions must be kept in every part (``chunk``, a grouped convolution).

    ``parts`` is (number of parts, positions). With ``partners`` (the parts of another axis, which
    go along), a part of which everything goes on both sides may disappear as a whole. ``counted``:
    it is no part of what the calls do, but the model's code counts both with one number.
    """

    parts: np.ndarray
    node: fx.Node
    partners: np.ndarray | None = None
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Field:
    """Elements of a parameter that go with labels which do not lie along one of its axes.

    ``labels`` has the parameter's number of dimensions and broadcasts to its shape: the input
    channels of a grouped convolution's weight, (out, in / groups, 1, 1). ``axis`` is the axis that
    shrinks.
    """

    labels: np.ndarray
    axis: int


@dataclass
class LabelSpace:
    """Hands out labels and collects what ties them, pins them and couples their counts.

    ``exact``: statistics over labels pin them; otherwise they only read them. ``sliced``: the axes
    of which parts are taken by number.
    """

    size: int = 1
    exact: bool = True
    ties: list[Tie] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    equal_parts: list[EqualParts] = field(default_factory=list)
    fields: dict[str, Field] = field(default_factory=dict)
    field_uses: dict[str, int] = field(default_factory=dict)
    sliced: list[Labels] = field(default_factory=list)
    _created: list[tuple[Labels, fx.Node]] = field(default_factory=list)
    _splits: dict[tuple[bytes, int], tuple[Labels, Labels]] = field(default_factory=dict)
    _cells: dict[tuple[bytes, bytes], np.ndarray] = field(default_factory=dict)

    def fresh(self, count: int) -> Labels:
        self.size += count
        return np.arange(self.size - count, self.size)

    def created(self, count: int, node: fx.Node) -> Labels:
        """Labels for an axis whose size the code gives: they may go along with others only."""
        labels = self.fresh(count)
        self._created.append((labels, node))
        return labels

    def pin_unattached(self) -> None:
        """Pin created labels that no label of another kind is tied to: no layer counts them."""
        if not self._created:
            return
        root = self.roots()
        attached = np.ones(self.size, bool)
        for labels, _ in self._created:
            attached[labels] = False
        attached[root[np.flatnonzero(attached)]] = True
        for equal in self.equal_parts:  # the states of several layers have one size
            if attached[root[equal.parts]].any():
                attached[root[equal.parts]] = True
        for labels, node in self._created:
            if not attached[root[labels]].any():
                self.pin(labels, node, "is made with a size that no layer has")

    def pin(self, axis: Axis, node: fx.Node, reason: str, meets: bool = False) -> None:
        """Nothing along this axis may be removed."""
        if axis is not None:
            self.pins.append(Pin(axis, node, reason, meets))

    def pin_all(self, axes: Iterable[Axis], node: fx.Node, reason: str) -> None:
        for axis in axes:
            self.pin(axis, node, reason)

    def tie(self, left: Axis, right: Axis, node: fx.Node, reason: str) -> Axis:
        """Make two axes of the same length one, and return it; ``reason`` is for a fixed side."""
        if left is None or right is None:
            self.pin(left, node, reason, meets=True)
            self.pin(right, node, reason, meets=True)
            return None
        if left is not right and not np.array_equal(left, right):
            self.ties.append(Tie(left, right, node))
        return left

    def split(self, labels: Labels, sizes: Sequence[int], node: fx.Node) -> list[Axis]:
        """The axes that a reshape makes of one axis, outermost first."""
        if len(sizes) == 1:
            return [labels]
        rows, columns = self._split_two(labels, sizes[0], node)
        rest: list[Axis] = [None] * (len(sizes) - 1)
        if columns is not None:
            rest = self.split(columns, sizes[1:], node)
        return [rows, *rest]

    def _split_two(self, labels: Labels, outer: int, node: fx.Node) -> tuple[Axis, Axis]:
        cells = labels.reshape(outer, -1)
        if outer == 1:
            return None, labels
        if cells.shape[1] == 1:
            return labels, None
        if (cells == cells[:, :1]).all():
            return np.ascontiguousarray(cells[:, 0]), None
        if (cells == cells[:1]).all():
            return None, np.ascontiguousarray(cells[0])
        key = (labels.tobytes(), outer)
        if key not in self._splits:
            rows, columns = self.fresh(cells.shape[0]), self.fresh(cells.shape[1])
            self._splits[key] = rows, columns
            self._add_grid(cells, rows, columns, node)
        return self._splits[key]

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int], node: fx.Node) -> Axis:
        """The axis that a reshape makes of several, outermost first."""
        labels, length = axes[0], sizes[0]
        for axis, size in zip(axes[1:], sizes[1:], strict=True):
            labels = self._merge_two(labels, axis, (length, size), node)
            length *= size
        return labels

    def _merge_two(self, rows: Axis, columns: Axis, shape: tuple[int, int], node: fx.Node) -> Axis:
        if rows is None:
            return None if columns is None else np.tile(columns, shape[0])
        if columns is None:
            return np.repeat(rows, shape[1])
        cells = self._cells.get((rows.tobytes(), columns.tobytes()))
        if cells is None:
            cells = self.fresh(shape[0] * shape[1]).reshape(shape)
            self._add_grid(cells, rows, columns, node)
        return np.ascontiguousarray(cells).reshape(-1)

    def _add_grid(self, cells: np.ndarray, rows: Labels, columns: Labels, node: fx.Node) -> None:
        self.grids.append(Grid(cells, rows, columns, node))
        self._cells[rows.tobytes(), columns.tobytes()] = cells
        self._cells[columns.tobytes(), rows.tobytes()] = cells.T

    def roots(self) -> np.ndarray:
        """The smallest label of each label's class, (size,); 0 where the class is pinned."""
        left = [t.left for t in self.ties] + [p.labels for p in self.pins]
        right = [t.right for t in self.ties] + [np.zeros_like(p.labels) for p in self.pins]
        return joined(np.arange(self.size), left, right)


def joined(root: np.ndarray, left: list[Labels], right: list[Labels]) -> np.ndarray:
    """The roots after tying labels pairwise on top of ``root`` (idempotent: root[root] == root)."""
    if not left:
        return root
    root, a, b = root.copy(), np.concatenate(left), np.concatenate(right)
    while True:
        root_a, root_b = root[a], root[b]
        differ = root_a != root_b
        if not differ.any():
            return root
        a, b, root_a, root_b = a[differ], b[differ], root_a[differ], root_b[differ]
        np.minimum.at(root, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while not np.array_equal(shorter := root[root], root):
            root = shorter


def each_output(axes: Any) -> Iterator[Axes]:
    """The axes of each tensor that a call returns: of the only one, or of several."""
    if axes is not None and any(isinstance(each, tuple) for each in axes):
        yield from (each for each in axes if each is not None)
    elif axes is not None:
        yield axes
