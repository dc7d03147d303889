"""Why one unit of a layer went, or stayed, under the masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from compress.graph.explain import Explanation, explain, label_of, layer_of, members_with
from compress.graph.trace import location
from compress.speedup.decide import Decision
from compress.speedup.knowledge import any_by_row


def explain_decision(
    decision: Decision, masks: Mapping[str, torch.Tensor], layer: str, channel: int
) -> Explanation:
    """See `ModelSpeedup.why`; ``masks`` are by parameter path."""
    graph = decision.graph
    label = label_of(graph, layer, channel)
    if graph.root[label] == graph.root[0]:
        return explain(graph, layer, channel)
    members = members_with(graph, label, layer, channel)
    gone = not decision.keep[graph.root[label]]
    reasons = [*_masked_in(decision, masks, label)]
    readers = list(_readers(decision, label))
    if readers:
        read = f"is read by {', '.join(readers)}"
        reasons.append(f"{read}, which exact=False ignores" if gone else read)
    else:
        reasons.append(decision.reason(label) or "is read by nothing that would notice")
    state = "goes" if gone else "stays"
    return Explanation(layer, channel, gone, state, "; it ".join(reasons), (), members)


def _readers(decision: Decision, label: int) -> Iterator[str]:
    """Where a label is read, in the order of the run."""
    root = decision.root
    for node in decision.graph.trace.nodes:
        for read in decision.reads.get(node, ()):
            if (read.needed & (root[read.labels] == root[label])).any():
                yield location(node)
                break


def _masked_in(decision: Decision, masks: Mapping[str, torch.Tensor], label: int) -> Iterator[str]:
    """In which of the layers that make a unit it is masked, and in which not."""
    graph, masked, unmasked = decision.graph, list[str](), list[str]()
    for path, units in graph.layers.items():
        places = np.flatnonzero(graph.root[units.labels] == graph.root[label])
        if units.follows or not len(places):
            continue
        gone = masked_units(masks.get(path), units.axis, len(units.labels))
        (masked if gone[places].all() else unmasked).append(layer_of(graph, path))
    if masked:
        yield f"is masked in {', '.join(masked)}"
    if unmasked:
        yield f"is not masked in {', '.join(unmasked)}"


def masked_units(mask: torch.Tensor | None, axis: int, units: int) -> np.ndarray:
    """Bool (units,): whether all weights of a unit are masked."""
    if mask is None:
        return np.zeros(units, bool)
    rows = any_by_row(mask.movedim(axis, 0).reshape(mask.shape[axis], -1)).cpu().numpy()
    return ~rows if len(rows) == units else np.zeros(units, bool)
