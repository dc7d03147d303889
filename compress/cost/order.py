"""In which order channels go: the least important for what they cost first.

Atoms (see `Coupling`) that take equally many units of the same layers cost the same: a *family*.
In each the least important go first, in steps to counts that are worth having. Which family is next
is up to the strategy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from compress.cost.latency import LatencyCost
from compress.cost.model import CostModel
from compress.pruners.dependency import Coupling

_COUNTS = 24  # at most so many counts of a family are timed
_DROP = 0.99  # a drop of the time is one that is larger than what measuring it again may show
_LEAST = 1e-12

Losses = Callable[[Coupling, "Family"], Sequence[int]]


@dataclass(frozen=True)
class Family:
    """Atoms that take equally many units of the same layers, the least important first.

    Attributes:
        atoms: int (atoms,), their roots.
        scores: float (atoms, layers), the sum of the scores of an atom's units of each layer.
        needs: for each layer (an index into `Coupling.layers`) how many units one atom has of it.
    """

    atoms: np.ndarray
    scores: np.ndarray
    needs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.atoms)

    @property
    def layers(self) -> list[int]:
        """The layers that it has units of."""
        return [layer for layer, _ in self.needs]


def families(coupling: Coupling, scores: Sequence[np.ndarray]) -> list[Family]:
    """The families of all atoms that can go.

    Args:
        coupling: the atoms.
        scores: for each layer, how important its units are, (units,). The importance of an atom is
            the sum of its units'.
    """
    layers = len(coupling.layers)
    owner = np.concatenate([np.full(len(x.roots), i) for i, x in enumerate(coupling.layers)])
    roots = np.concatenate([x.roots for x in coupling.layers])
    pairs, index, numbers = np.unique(
        roots * layers + owner, return_inverse=True, return_counts=True
    )
    sums = np.bincount(index, np.concatenate(scores))
    atoms: dict[int, list[tuple[int, int, float]]] = {}  # layer, units, score
    for pair, number, total in zip(pairs.tolist(), numbers.tolist(), sums.tolist(), strict=True):
        if not coupling.fixed[pair // layers]:
            atoms.setdefault(pair // layers, []).append((pair % layers, number, total))
    members: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for atom, parts in atoms.items():
        members.setdefault(tuple((layer, units) for layer, units, _ in parts), []).append(atom)
    found = []
    for needs, roots_of in members.items():
        table = np.asarray([[total for _, _, total in atoms[atom]] for atom in roots_of])
        order = np.argsort(table.sum(axis=1), kind="stable")
        found.append(Family(np.asarray(roots_of)[order], table[order], needs))
    return found


def shares(coupling: Coupling) -> list[np.ndarray]:
    """Each unit's share of the scores of its layer: those of two layers have no unit in common."""
    return [layer.scores / len(layer.scores) for layer in coupling.layers]


def rounded_losses(coupling: Coupling, family: Family, round_to: int) -> list[int]:
    """How many atoms may be gone so that each layer keeps a multiple of ``round_to``; 0 may."""
    sizes = [(len(coupling.layers[i].roots), units) for i, units in family.needs]
    return [
        lost
        for lost in range(_most(coupling, family) + 1)
        if lost == 0 or all((size - lost * units) % round_to == 0 for size, units in sizes)
    ]


def half_gone(coupling: Coupling) -> np.ndarray:
    """Bool (labels,): half of each family that can go."""
    gone = np.zeros(len(coupling.roots), bool)
    for family in families(coupling, shares(coupling)):
        gone[family.atoms[: min(len(family) // 2, _most(coupling, family))]] = True
    return gone


def measured_losses(coupling: Coupling, family: Family, cost: LatencyCost) -> list[int]:
    """How many atoms may be gone so that the measured time drops: what the hardware likes; and 0.

    The convolutions and matrix products of the family are timed at about twenty counts, the rest of
    the model whole. A count is worth having where no larger one is as fast.
    """
    most, roots = _most(coupling, family), coupling.roots
    grid = 1 << max(math.ceil(math.log2(max(len(family) / _COUNTS, 1))), 0)
    calls = cost.products & cost.touched(family.atoms, roots)
    found = [0]
    least = math.inf
    for lost in range(most + 1):
        if lost and (len(family) - lost) % grid:
            continue
        gone = np.zeros(len(roots), bool)
        gone[family.atoms[:lost]] = True
        time = float(cost.times(gone, roots, calls).sum())
        if lost and time < _DROP * least:
            found.append(lost)
        least = min(least, time)
    return found


def _most(coupling: Coupling, family: Family) -> int:
    """How many atoms the limits of its layers let go."""
    return min(len(family), *(limit(coupling, i) // units for i, units in family.needs))


def limit(coupling: Coupling, layer: int) -> int:
    """How many units a layer may lose."""
    return coupling.layers[layer].budget(None, coupling.min_channels)


class Order:
    """The steps in which atoms go, from the whole model to the least; position 0 is the whole.

    Args:
        coupling: the atoms.
        price: what the model costs; the cost of a step is the difference that it makes.
        losses: for a family, the numbers of its atoms that may be gone, ascending from 0.
        strategy: "global": next is the step that loses the least for what it saves. "local": the
            one after which its family has given the least share of its cost.
    """

    def __init__(self, coupling: Coupling, price: CostModel, losses: Losses, strategy: str) -> None:
        self.coupling, self.price = coupling, price
        self.families = families(coupling, shares(coupling))
        self._losses = [list(losses(coupling, family)) for family in self.families]
        self.steps: list[tuple[int, int]] = []  # a family, and how many of its atoms are gone then
        steps = self._by_worth() if strategy == "global" else self._by_share()
        self.steps = list(self._within_limits(steps))

    def __len__(self) -> int:
        return len(self.steps) + 1

    def gone(self, position: int) -> np.ndarray:
        """Bool (labels,): the roots that are gone after so many steps."""
        gone = np.zeros(len(self.coupling.roots), bool)
        for number, lost in self.steps[:position]:
            gone[self.families[number].atoms[:lost]] = True
        return gone

    def prices(self) -> np.ndarray:
        """What the model costs at each position, float (positions,)."""
        gone, roots = self.gone(0), self.coupling.roots
        found = [self.price(gone, roots)]
        for number, lost in self.steps:
            gone[self.families[number].atoms[:lost]] = True
            found.append(self.price(gone, roots))
        return np.asarray(found)

    def _by_worth(self) -> Iterator[tuple[int, int]]:
        """The least loss for what is saved first.

        The loss is log(what a layer had before / what it has after), of its importance, summed over
        the layers: it is the same whatever unit a layer's scores have, and grows as a layer thins
        out, so that none is emptied because its channels are alike.

        What a step saves falls as others are taken, so that an old number is never too high (0 for
        a step that is new): only what is first in the queue needs a new one.
        """
        gone, roots = self.gone(0), self.coupling.roots
        taken = [0] * len(self.families)
        left = np.ones(len(self.coupling.layers))  # of each layer's importance
        now = self.price(gone, roots)
        queue = [(0.0, number) for number, found in enumerate(self._losses) if len(found) > 1]
        while queue:
            _, number = heapq.heappop(queue)
            family, losses = self.families[number], self._losses[number]
            before, after = losses[taken[number]], losses[taken[number] + 1]
            step = family.atoms[before:after]
            gone[step] = True
            cost = self.price(gone, roots)
            rest = left[family.layers] - np.maximum(family.scores[before:after], 0).sum(axis=0)
            loss = float(np.log(left[family.layers] / np.maximum(rest, _LEAST)).sum())
            worth = loss / max(now - cost, _LEAST)
            if queue and worth > queue[0][0]:
                gone[step] = False
                heapq.heappush(queue, (worth, number))
                continue
            now, taken[number] = cost, taken[number] + 1
            left[family.layers] = np.maximum(rest, _LEAST)
            yield number, after
            if taken[number] + 1 < len(losses):
                heapq.heappush(queue, (0.0, number))

    def _by_share(self) -> Iterator[tuple[int, int]]:
        """So that all families have given the same share of what they cost by themselves."""
        roots, found = self.coupling.roots, []
        for number, (family, losses) in enumerate(zip(self.families, self._losses, strict=True)):
            costs = []
            for lost in (*losses, len(family)):
                gone = self.gone(0)
                gone[family.atoms[:lost]] = True
                costs.append(self.price(gone, roots))
            own = max(costs[0] - costs[-1], _LEAST)
            found += [
                ((costs[0] - cost) / own, number, lost)
                for lost, cost in zip(losses[1:], costs[1:], strict=False)
            ]
        return ((number, lost) for _, number, lost in sorted(found))

    def _within_limits(self, steps: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The steps that the limits of layers allow, where several families share a layer."""
        left = {i: limit(self.coupling, i) for i in range(len(self.coupling.layers))}
        taken = [0] * len(self.families)
        for number, lost in steps:
            more = lost - taken[number]
            needs = [(i, units * more) for i, units in self.families[number].needs]
            if all(units <= left[i] for i, units in needs):
                for i, units in needs:
                    left[i] -= units
                taken[number] = lost
                yield number, lost
