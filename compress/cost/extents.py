"""How large every axis of every tensor is once some channels are gone.

All costs that follow from sizes are sums of products of them: `Terms`. Both are evaluated for all
tensors at once, since a search asks thousands of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import fx

from compress.graph.channels import ChannelGraph

Place = tuple[fx.Node, int]  # an axis (from 0, or negative) of what a node stands for
Size = tuple[float, int]  # a factor, and the number of a vector of labels; 0 is the number 1


class Extents:
    """Counts what is left of the axes that have labels.

    Ask for all axes (`size`) first; `counts` then has a number for each.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self._vectors: list[np.ndarray] = [np.zeros(1, np.int64)]  # label 0 stays: the number 1
        self._numbers: dict[bytes, int] = {}
        self._labels = np.zeros(0, np.int64)
        self._starts = np.zeros(0, np.int64)
        self._roots: np.ndarray | None = None
        self._positions = np.zeros(0, np.int64)

    def size(self, place: Place) -> Size:
        """The size of an axis: a factor times the count of a vector of labels."""
        node, axis = place
        shape = node.meta["shape"]
        axis %= len(shape)
        field = self.graph.space.fields.get(str(node.target)) if node.op == "get_attr" else None
        if field is not None and axis == field.axis:
            # A grouped convolution: all groups keep equally many, so one row of each tells.
            rows = np.unique(field.labels.reshape(field.labels.shape[:2]), axis=0)
            return 1 / len(rows), self._number(rows.reshape(-1))
        labels = self.graph.axes[node][axis]
        return (float(shape[axis]), 0) if labels is None else (1.0, self._number(labels))

    def _number(self, labels: np.ndarray) -> int:
        number = self._numbers.setdefault(labels.tobytes(), len(self._vectors))
        if number == len(self._vectors):
            self._vectors.append(labels)
        return number

    def counts(self, gone: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """How many positions of each vector are left, float (vectors,); all where none would be.

        Args:
            gone: bool (labels,), True at the roots of what goes.
            roots: int (labels,), the root of each label.
        """
        if self._starts.size != len(self._vectors):
            self._labels = np.concatenate(self._vectors)
            self._starts = np.cumsum([0, *(len(v) for v in self._vectors[:-1])])
            self._roots = None
        if self._roots is not roots:
            self._roots, self._positions = roots, roots[self._labels]
        left = np.add.reduceat(~gone[self._positions], self._starts, dtype=np.float64)
        return np.asarray(left)

    def shape(self, node: fx.Node, counts: np.ndarray) -> tuple[int, ...]:
        """The shape of what a node stands for, as so many positions are left."""
        sizes = (self.size((node, axis)) for axis in range(len(node.meta["shape"])))
        return tuple(round(factor * counts[number]) for factor, number in sizes)


class Terms:
    """A sum of products of sizes: Σ coefficient · Π count."""

    def __init__(self, coefficients: Sequence[float], factors: Sequence[Sequence[int]]) -> None:
        self.coefficients = np.asarray(coefficients, np.float64)
        width = max((len(f) for f in factors), default=1) or 1
        padded = [[*f, *[0] * (width - len(f))] for f in factors]
        self.factors = np.asarray(padded, np.int64).reshape(len(padded), width)

    def values(self, counts: np.ndarray) -> np.ndarray:
        """Each term, float (terms,)."""
        found: np.ndarray = self.coefficients * counts[self.factors].prod(axis=1)
        return found

    def __call__(self, counts: np.ndarray) -> float:
        return float(self.values(counts).sum())


def collected(extents: Extents, products: Iterable[tuple[float, Iterable[Place]]]) -> Terms:
    """The sum of coefficients times the sizes of these axes; like terms become one."""
    sums: dict[tuple[int, ...], float] = {}
    for coefficient, places in products:
        factors = []
        for factor, number in map(extents.size, places):
            coefficient *= factor
            factors += [number] if number else []
        key = tuple(sorted(factors))
        sums[key] = sums.get(key, 0.0) + coefficient
    return Terms(list(sums.values()), list(sums))
