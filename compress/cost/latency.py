"""Predicted time of a model without some channels: its calls, each measured by itself.

A call is timed at the sizes that are left, once, when it is first asked for (`LatencyTable`). Their
sum is not yet the time of the model (what a call finds in the cache, what Python takes between
calls), so it is corrected by whole models that were measured (`calibrated`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from compress.cost.calibration import calibrated
from compress.cost.calls import Work, dense_work
from compress.cost.extents import Extents, Place, Terms, collected
from compress.cost.model import CostModel, flop_products
from compress.cost.standalone import description, standalone
from compress.cost.table import LatencyTable
from compress.graph.channels import ChannelGraph
from compress.graph.run import rng_kept
from compress.graph.walk import leaves_of
from compress.rules.registry import each_axis

_Key = tuple[int, bytes]


class LatencyCost(CostModel):
    """Milliseconds of one run on the graph's dummy input, on the model's device.

    Calls that compute nothing (views) are left out. A call that does not run by itself at other
    sizes takes its dense time, times the share of its output that is left; one that does not run by
    itself at all takes none, and its time is in the calibration.

    Args:
        graph: of the plain model.
        table: what was measured before; a new one by default.
    """

    unit = "ms"

    def __init__(self, graph: ChannelGraph, table: LatencyTable | None = None) -> None:
        self.graph = graph
        self.table = LatencyTable() if table is None else table
        tensors = (tensor for _, tensor, _ in leaves_of(graph.model))
        self.device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self.extents = Extents(graph)
        self.work = [work for work in dense_work(graph) if work.runs and not work.free]
        self._sizes = [self._numbers(work) for work in self.work]
        self.products = np.asarray([work.flops > 0 for work in self.work])
        self._known: dict[_Key, float] = {}
        self._measured: dict[float, float] = {}  # predicted without calibration: measured
        labels = graph.space.size
        self._all = np.zeros(labels, bool), np.arange(labels)

    @property
    def dense(self) -> float:  # type: ignore[override]
        """Of the whole model, what was measured, or else is predicted."""
        return self(*self._all)

    def __call__(self, gone: np.ndarray, roots: np.ndarray) -> float:
        return float(calibrated(np.asarray(self.uncalibrated(gone, roots)), self._measured))

    def uncalibrated(self, gone: np.ndarray, roots: np.ndarray) -> float:
        """The sum of the calls' times."""
        return float(self.times(gone, roots).sum())

    def calibrate(self, gone: np.ndarray, roots: np.ndarray, measured: float) -> None:
        """Take in that the model without these labels was measured to take so many milliseconds."""
        self._measured[self.uncalibrated(gone, roots)] = measured

    def times(
        self, gone: np.ndarray, roots: np.ndarray, only: np.ndarray | None = None
    ) -> np.ndarray:
        """Milliseconds of each call of ``work``, (calls,); 0 where ``only``, bool, is False."""
        counts = self.extents.counts(gone, roots)
        wanted = [i for i in range(len(self.work)) if only is None or only[i]]
        keys = {index: (index, counts[self._sizes[index]].tobytes()) for index in wanted}
        news = [index for index, key in keys.items() if key not in self._known]
        if news:
            with torch.no_grad(), rng_kept():
                for index, ms in self._measure(news, counts).items():
                    self._known[keys[index]] = ms
        found = np.zeros(len(self.work))
        for index, key in keys.items():
            found[index] = self._known[key]
        return found

    def shapes(
        self, gone: np.ndarray, roots: np.ndarray
    ) -> list[tuple[Work, dict[fx.Node, tuple[int, ...]]]]:
        """Each call, with what is left of the shapes of what it takes and makes."""
        counts = self.extents.counts(gone, roots)
        return [(work, self._shapes(work, counts)) for work in self.work]

    def touched(self, atoms: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """Bool (calls,): those of which some tensor is smaller without these roots."""
        gone = np.zeros(len(roots), bool)
        whole = self.extents.counts(gone, roots)
        gone[atoms] = True
        smaller = self.extents.counts(gone, roots) != whole
        return np.asarray([bool(smaller[numbers].any()) for numbers in self._sizes])

    def smooth(self, gone: np.ndarray, roots: np.ndarray) -> Terms:
        """A sum of products of sizes that is near the measured times.

        Each call takes a fixed time and one in proportion to its FLOPs (its output, where it has
        none), so that it is right for the whole model and without ``gone``. What a few channels
        would save, it says better than the difference of two measured times.
        """
        whole, part = self.times(*self._all), self.times(gone, roots)
        full, left = self.extents.counts(*self._all), self.extents.counts(gone, roots)
        products: list[tuple[float, list[Place]]] = []
        for work, most, less in zip(self.work, whole.tolist(), part.tolist(), strict=True):
            own = _products(work)
            terms = collected(self.extents, own)
            most_work, less_work = terms(full), terms(left)
            fixed = most
            if most_work > less_work:
                slope = min(max((most - less) / (most_work - less_work), 0.0), most / most_work)
                fixed = most - slope * most_work
                products += [(slope * factor, places) for factor, places in own]
            products.append((fixed, []))
        return collected(self.extents, products)

    def _numbers(self, work: Work) -> np.ndarray:
        """The vectors of labels that the sizes of a call depend on."""
        places = [place for node in (*work.tensors, *work.outputs) for place in each_axis(node)]
        found = {number for _, number in map(self.extents.size, places) if number}
        return np.asarray(sorted(found), np.int64)

    def _measure(self, indices: list[int], counts: np.ndarray) -> dict[int, float]:
        """Milliseconds of these calls, at the sizes that are left."""
        names, makers, scaled = {}, {}, {}
        for index in indices:
            work, shapes = self.work[index], self._shapes(self.work[index], counts)
            make = standalone(work, shapes, self.device)
            if make is None:
                scaled[index] = self._scaled(index, counts)
            else:
                names[index] = description(work, shapes)
                makers[names[index]] = make
        self.table.measure(makers, self.device)
        return scaled | {index: self.table[name, self.device] for index, name in names.items()}

    def _scaled(self, index: int, counts: np.ndarray) -> float:
        """The dense time of a call, times the share of its output that is left."""
        work, whole = self.work[index], self.extents.counts(*self._all)
        if np.array_equal(counts, whole):
            return 0.0
        only = np.arange(len(self.work)) == index
        share = self._entries(work, counts) / max(self._entries(work, whole), 1)
        return share * float(self.times(*self._all, only)[index])

    def _shapes(self, work: Work, counts: np.ndarray) -> dict[fx.Node, tuple[int, ...]]:
        nodes = (*work.tensors, *work.outputs)
        return {node: self.extents.shape(node, counts) for node in nodes}

    def _entries(self, work: Work, counts: np.ndarray) -> int:
        return sum(int(np.prod(self.extents.shape(node, counts))) for node in work.outputs)


def _products(work: Work) -> list[tuple[float, Any]]:
    """What the time of a call is in proportion to: its FLOPs, or the entries that it makes."""
    return list(flop_products(work)) or [(1.0, each_axis(node)) for node in work.outputs]
