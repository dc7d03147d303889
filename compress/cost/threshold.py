"""What is less important than a threshold."""

from __future__ import annotations

import numpy as np

from compress.cost.order import families, limit, rounded_losses
from compress.pruners.dependency import Coupling


def below(coupling: Coupling, threshold: float, strategy: str, round_to: int) -> np.ndarray:
    """Bool (labels,): the atoms that are less important than the threshold, at their roots.

    The importance of a unit is its score divided by the largest of the model ("global") or of its
    layer ("local"), and that of an atom the mean of its units'. What a layer keeps on account of
    its limits or of ``round_to`` is the most important.
    """
    found = families(coupling, normalised(coupling, strategy))
    left = {i: limit(coupling, i) for i in range(len(coupling.layers))}
    taken = [0] * len(found)
    means = [x.scores.sum(axis=1) / sum(units for _, units in x.needs) for x in found]
    queue = [(one, number) for number, values in enumerate(means) for one in values.tolist()]
    for one, number in sorted(queue):
        needs = found[number].needs
        if one < threshold and all(units <= left[i] for i, units in needs):
            taken[number] += 1
            for i, units in needs:
                left[i] -= units
    gone = np.zeros(len(coupling.roots), bool)
    for family, able in zip(found, taken, strict=True):
        lost = max(n for n in rounded_losses(coupling, family, round_to) if n <= able)
        gone[family.atoms[:lost]] = True
    return gone


def normalised(coupling: Coupling, strategy: str) -> list[np.ndarray]:
    """The criterion's scores of each layer's units, divided by the largest; 1 where all are 0."""
    scores = [layer.scores * layer.scale for layer in coupling.layers]
    highest = [float(values.max()) for values in scores]
    if strategy == "global":
        highest = [max(highest)] * len(highest)
    return [
        values / most if most > 0 else np.ones_like(values)
        for values, most in zip(scores, highest, strict=True)
    ]
