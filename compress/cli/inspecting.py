"""What a model is made of, as data: layers, what could go of each, and what holds the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import nn

from compress.cost.calls import dense_work
from compress.graph.channels import ChannelGraph
from compress.graph.explain import couplings, layer_of
from compress.pruners.parts import COMPOUND


@dataclass(frozen=True)
class LayerFacts:
    """A layer that makes units: how many, how many of them could go, and why the others not.

    ``flops`` are of one run on the dummy input, as ``torch.utils.flop_counter`` counts. ``held``
    maps a reason to how many units it holds. ``coupled``: layers that lose the same units.
    """

    layer: str
    type: str
    units: int
    free: int
    parameters: int
    flops: int
    held: dict[str, int]
    coupled: tuple[str, ...]


def layer_facts(graph: ChannelGraph) -> list[LayerFacts]:
    """All layers that make units, in the order of the run."""
    flops, coupled = _flops(graph), couplings(graph)
    found = []
    for path, units in graph.layers.items():
        name = layer_of(graph, path)
        module = graph.modules.get(name)
        held = graph.root[units.labels] == graph.root[0]
        reasons = Counter(graph.pin_reason(int(label)) for label in units.labels[held])
        found.append(
            LayerFacts(
                layer=name,
                type=_type(graph, path, module),
                units=len(units.labels),
                free=int(np.count_nonzero(~held)),
                parameters=_own_parameters(graph, path, module),
                flops=flops.get(path, 0),
                held=dict(reasons),
                coupled=coupled[path],
            )
        )
    return found


def _type(graph: ChannelGraph, path: str, module: nn.Module | None) -> str:
    """What ``op_types`` names the layer by; a parameter of a user's own module has no such name."""
    owner = graph.modules[path.rpartition(".")[0]] if module is None else module
    several = isinstance(owner, COMPOUND)
    return type(owner).__name__ if module is not None or several else "parameter"


def coupled_groups(facts: list[LayerFacts]) -> list[tuple[str, ...]]:
    """The layers that go together, each group once."""
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for each in facts:
        if each.coupled:
            names = (each.layer, *each.coupled)
            found.setdefault(frozenset(names), names)
    return list(found.values())


def _own_parameters(graph: ChannelGraph, path: str, module: nn.Module | None) -> int:
    if module is None or path not in {n for n, _ in graph.model.named_parameters()}:
        shape: tuple[int, ...] = graph.trace.leaves[path].meta["shape"]
        return int(np.prod(shape))
    return sum(p.numel() for p in module.parameters(recurse=False))


def _flops(graph: ChannelGraph) -> Counter[str]:
    """FLOPs by the weight that the call makes units with."""
    found: Counter[str] = Counter()
    for work in dense_work(graph):
        for made in work.rule.makes(work.call):
            if made.weight.op == "get_attr":
                found[str(made.weight.target)] += work.flops
                break
    return found
