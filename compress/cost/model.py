"""What a model costs without some of its channels, from the channel graph alone.

- "params": entries of the model's parameters, each shared one once.
- "flops": of one run on the graph's dummy input, as ``torch.utils.flop_counter`` counts:
  convolutions, matrix products, attention; 1 multiply-add = 2 FLOPs.
- "memory": bytes of parameters and buffers, and of every tensor that one run makes anew (no views,
  nothing written in place): the most that a forward for training keeps.
- "latency": predicted milliseconds of one run: see `compress.cost.latency`.

The first three are exact where what is asked to go can go; a channel that the speedup keeps as the
carrier of a constant, or a bias that it adds, is not foreseen. Of a function without a rule whose
FLOPs torch counts, all stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from compress.cost.calls import Work, dense_work
from compress.cost.extents import Extents, Place, Terms, collected
from compress.errors import ConfigError, closest
from compress.graph.channels import ChannelGraph
from compress.graph.walk import leaves_of
from compress.masks import suspend_masks
from compress.rules.registry import each_axis

Products = Iterator[tuple[float, list[Place]]]


class CostModel(ABC):
    """``model_cost(gone, roots)``: what the model costs where these labels are gone.

    Attributes:
        dense: what the whole model costs.
        unit: of both.
    """

    dense: float
    unit: str

    @abstractmethod
    def __call__(self, gone: np.ndarray, roots: np.ndarray) -> float:
        """The cost without what goes.

        Args:
            gone: bool (labels,), True at the roots of what goes: `Coupling.choose`.
            roots: int (labels,), the root of each label: `Coupling.roots`.
        """


class SizeCost(CostModel):
    """A cost that is a sum of products of sizes."""

    def __init__(self, extents: Extents, terms: Terms, unit: str) -> None:
        self.extents, self.terms, self.unit = extents, terms, unit
        labels = extents.graph.space.size
        self.dense = self(np.zeros(labels, bool), np.arange(labels))

    def __call__(self, gone: np.ndarray, roots: np.ndarray) -> float:
        return self.terms(self.extents.counts(gone, roots))


def cost_model(kind: str, graph: ChannelGraph, **options: Any) -> CostModel:
    """The cost model of a name, for the model and the input that the graph is of.

    Args:
        kind: "params", "flops", "memory" or "latency".
        graph: of the plain model.
        options: of `compress.cost.latency.LatencyCost`.

    Raises:
        ConfigError: there is no such cost.
    """
    if kind == "latency":
        from compress.cost.latency import LatencyCost

        return LatencyCost(graph, **options)
    check_cost(kind)
    extents = Extents(graph)
    products, unit = SIZES[kind]
    with suspend_masks(graph.model):  # else its parameters have other names than in the graph
        return SizeCost(extents, collected(extents, products(graph)), unit)


def check_cost(kind: object) -> None:
    """Raise ConfigError where there is no cost of this name."""
    if kind not in COSTS:
        hint = closest(kind, COSTS) if isinstance(kind, str) else ""
        raise ConfigError(f"cost: got {kind!r}; expected one of {', '.join(COSTS)}{hint}")


def _parameters(graph: ChannelGraph) -> Products:
    for path, tensor, kind in leaves_of(graph.model):
        if kind == "parameter":
            leaf = graph.trace.leaves.get(path)
            yield (tensor.numel(), []) if leaf is None else (1.0, each_axis(leaf))


def _flops(graph: ChannelGraph) -> Products:
    for work in dense_work(graph):
        yield from flop_products(work)


def flop_products(work: Work) -> Products:
    """The FLOPs of one call: torch's number, shared out among the products of sizes it is of."""
    if not work.flops:
        return
    products = work.rule.products(work.call)
    sizes = [np.prod([node.meta["shape"][axis] for node, axis in p]) for p in products]
    if not sum(sizes):
        yield work.flops, []
    for product in products if sum(sizes) else ():
        yield work.flops / sum(sizes), product


def _memory(graph: ChannelGraph) -> Products:
    for path, tensor, _ in leaves_of(graph.model):
        leaf = graph.trace.leaves.get(path)
        size = tensor.element_size()
        yield (tensor.numel() * size, []) if leaf is None else (size, each_axis(leaf))
    for work in dense_work(graph):
        for node in work.outputs if work.makes else ():
            dtype = node.meta["dtype"]
            yield 1.0 if dtype is None else dtype.itemsize, each_axis(node)


SIZES = {
    "params": (_parameters, "parameters"),
    "flops": (_flops, "FLOPs"),
    "memory": (_memory, "bytes"),
}
COSTS = (*SIZES, "latency")
