"""Find the position of an `Order` at which the model, really shrunk, costs what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compress.cost.calibration import calibrated

_GUESSES = 3  # how often the position is changed before a cut is made
_TRIES = 2  # how often one position is measured
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Round:
    """One cut that was really made.

    Attributes:
        position: in the order of steps.
        predicted: what it was to cost, with what was known then.
        measured: what it costs.
    """

    position: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The prediction's, as a fraction of what was measured."""
        return self.predicted / self.measured - 1


class Search:
    """Cuts, measures, and learns from it, until the goal is met.

    What is known of some positions corrects the prices of all (`calibrated`).

    Args:
        prices: float (positions,): of the whole model first, then falling.
        path: how many positions come first; those behind them are there for where no such one is
            predicted to be near the goal.
        goal: the cost that is asked for.
        predict: what a position costs, better than its price.
        measure: what it really costs; asked again it measures again, and knows more.
        tolerance: how far off the goal is met, as a fraction; 0: the first position that does not
            cost more.
        rounds: how many cuts are made at most.
    """

    def __init__(
        self,
        prices: np.ndarray,
        path: int,
        goal: float,
        predict: Callable[[int], float],
        measure: Callable[[int], float],
        *,
        tolerance: float,
        rounds: int,
    ) -> None:
        self.prices, self.path, self.goal = prices, path, goal
        self.predict, self.measure = predict, measure
        self.tolerance, self.most = tolerance, rounds
        self.rounds: list[Round] = []
        self._known: dict[int, float] = {}  # what was measured
        self._guesses: dict[int, float] = {}  # what is predicted, with what is known now

    def run(self, dense: float) -> Round | None:
        """The round that meets the goal; None where no position does, and ``rounds`` tell why.

        Args:
            dense: what position 0 was measured to cost.
        """
        self._known[0] = dense
        while self.path > 1 and len(self.rounds) < self.most:
            position = self._next()
            if self._tries(position) >= _TRIES:
                break  # there is nothing else
            made = Round(position, float(self._curve()[position]), self.measure(position))
            if self._close(made.measured, self.tolerance / 2):
                # Not by luck: what was measured again, together with the first time, is the result.
                made = Round(position, made.predicted, self.measure(position))
            self.rounds.append(made)
            self._known[position] = made.measured
            if self._met(made):
                return made
        last = {made.position: made for made in self.rounds}
        found = [made for made in last.values() if self._close(made.measured, self.tolerance)]
        return min(found, key=lambda made: abs(made.measured - self.goal), default=None)

    def _next(self) -> int:
        """The position that is predicted to be nearest to the goal."""
        self._guesses = {}
        position = self._nearest()
        for _ in range(_GUESSES):  # a better look at it may show that another one is nearer
            if position in self._known or position in self._guesses:
                break
            self._guesses[position] = self.predict(position)
            position = self._nearest()
        return position

    def _nearest(self) -> int:
        curve = self._curve()
        if not self.tolerance:
            enough = np.flatnonzero(curve[: self.path] <= self.goal * _ROUNDING)
            return int(enough[0]) if len(enough) else self.path - 1
        off = np.abs(curve - self.goal)[1:]  # the whole model is no cut
        for position in {made.position for made in self.rounds}:
            if self._tries(position) >= _TRIES:  # it is known what it costs: not the goal
                off[position - 1] = np.inf
        best = 1 + int(np.argmin(off[: self.path - 1]))
        if off[best - 1] <= self.tolerance / 2 * self.goal:
            return best
        return 1 + int(np.argmin(off))

    def _tries(self, position: int) -> int:
        return sum(made.position == position for made in self.rounds)

    def _curve(self) -> np.ndarray:
        """What each position costs, as far as is known."""
        known = self._guesses | self._known
        return calibrated(self.prices, {self.prices[each]: cost for each, cost in known.items()})

    def _close(self, cost: float, tolerance: float) -> bool:
        return tolerance > 0 and abs(cost / self.goal - 1) <= tolerance

    def _met(self, made: Round) -> bool:
        if self.tolerance:
            return self._close(made.measured, self.tolerance / 2)
        more = self._curve()[made.position - 1] > self.goal
        return made.measured <= self.goal * _ROUNDING and bool(more)
