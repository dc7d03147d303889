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
    totals = [float(layer.scores.sum()) for layer in coupling.layers]
    return [
        layer.scores / (total if total > 0 else len(layer.scores))
        for layer, total in zip(coupling.layers, totals, strict=True)
    ]


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
    """The states that a model goes through, from the whole one to the least.

    A state is how many atoms of each family are gone; position 0 is the whole model. Behind the
    path there may be states beside it (`add_neighbours`).

    Args:
        coupling: the atoms.
        price: what the model costs; the cost of a step is the difference that it makes.
        losses: for a family, the numbers of its atoms that may be gone, ascending from 0.
        strategy: "global": next is the step that loses the least for what it saves. "local": the
            one after which its family has given the least share of its cost.

    Attributes:
        states: those of the path, and the others behind them.
        path: how many are of the path.
    """

    def __init__(self, coupling: Coupling, price: CostModel, losses: Losses, strategy: str) -> None:
        self.coupling, self.price = coupling, price
        self.families = families(coupling, shares(coupling))
        self._losses = [list(losses(coupling, family)) for family in self.families]
        steps = self._by_worth() if strategy == "global" else self._by_share()
        self.states = [(0,) * len(self.families)]
        for number, lost in steps:
            state = (*self.states[-1][:number], lost, *self.states[-1][number + 1 :])
            if self._allowed(state):
                self.states.append(state)
        self.path = len(self.states)

    def gone(self, position: int) -> np.ndarray:
        """Bool (labels,): the roots that are gone in a state."""
        gone = np.zeros(len(self.coupling.roots), bool)
        for family, lost in zip(self.families, self.states[position], strict=True):
            gone[family.atoms[:lost]] = True
        return gone

    def prices(self) -> np.ndarray:
        """What the model costs in each state, float (states,)."""
        roots = self.coupling.roots
        return np.asarray([self.price(self.gone(i), roots) for i in range(len(self.states))])

    def add_neighbours(self, positions: Iterable[int]) -> None:
        """Add the states that are one step of one family away from these of the path.

        Where steps are large, one of them may be nearer to a target than the path is.
        """
        known = dict.fromkeys(self.states)
        for position in positions:
            state = self.states[position]
            for number, losses in enumerate(self._losses):
                at = losses.index(state[number])
                for other in (*losses[max(at - 1, 0) : at], *losses[at + 1 : at + 2]):
                    found = (*state[:number], other, *state[number + 1 :])
                    if self._allowed(found):
                        known.setdefault(found)
        self.states = list(known)

    def _allowed(self, state: tuple[int, ...]) -> bool:
        """Whether the limits of the layers, which several families may share, let so many go."""
        lost = np.zeros(len(self.coupling.layers), np.int64)
        for family, number in zip(self.families, state, strict=True):
            for layer, units in family.needs:
                lost[layer] += units * number
        return all(n <= limit(self.coupling, i) for i, n in enumerate(lost.tolist()) if n)

    def _none(self) -> np.ndarray:
        return np.zeros(len(self.coupling.roots), bool)

    def _by_worth(self) -> Iterator[tuple[int, int]]:
        """The least loss for what is saved first.

        The loss is log(what a layer had before / what it has after), of its importance, summed over
        the layers: it is the same whatever unit a layer's scores have, and grows as a layer thins
        out, so that none is emptied because its channels are alike.

        What a step saves falls as others are taken, so that an old number is never too high (0 for
        a step that is new): only what is first in the queue needs a new one.
        """
        gone, roots = self._none(), self.coupling.roots
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
                gone = self._none()
                gone[family.atoms[:lost]] = True
                costs.append(self.price(gone, roots))
            own = max(costs[0] - costs[-1], _LEAST)
            found += [
                ((costs[0] - cost) / own, number, lost)
                for lost, cost in zip(losses[1:], costs[1:], strict=False)
            ]
        return ((number, lost) for _, number, lost in sorted(found))
