"""Cut and measure until a model costs what it shall, and report what was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from compress.cost.latency import LatencyCost
from compress.cost.model import CostModel, SizeCost, cost_model
from compress.cost.order import Family, Order, half_gone, measured_losses, rounded_losses
from compress.cost.search import Round, Search
from compress.cost.shrunk import Shrunk
from compress.cost.table import LatencyTable
from compress.cost.target import Target, in_words
from compress.errors import ConfigError
from compress.measure.table import Table
from compress.pruners.base import ScoredAtoms
from compress.pruners.dependency import Coupling

_NEAR = 0.3  # of the goal: where states beside the path are looked at


@dataclass(frozen=True)
class Wish:
    """What is asked for, and how: see `GlobalPruner`."""

    target: Target
    strategy: str
    round_to: int | None
    tolerance: float
    rounds: int
    table: LatencyTable


@dataclass(frozen=True)
class TargetReport:
    """Prints as a table, a line for each layer.

    Attributes:
        target: what was asked for.
        dense: what the whole model costs; for latency, measured.
        predicted: what the chosen cut was to cost.
        measured: what it costs, really shrunk.
        rounds: the cuts that were made on the way, the chosen one among them.
        kept: for each layer, its units and how many of them are left.
    """

    target: Target
    dense: float
    predicted: float
    measured: float
    rounds: tuple[Round, ...]
    kept: Mapping[str, tuple[int, int]]

    @property
    def reached(self) -> float:
        """What was measured, as a fraction of the dense model's cost."""
        return self.measured / self.dense

    @property
    def prediction_error(self) -> float:
        """Of the chosen cut, as a fraction of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        cost = self.target.cost
        rows = [
            (name, str(units), str(kept), f"{kept / units:.0%}")
            for name, (units, kept) in self.kept.items()
        ]
        caption = (  # as a line of its own: a narrow table would fold it
            f"target: {self.target}; reached: {in_words(cost, self.measured)} of "
            f"{in_words(cost, self.dense)} ({self.reached:.1%}), predicted "
            f"{in_words(cost, self.predicted)} ({self.prediction_error:+.1%}), "
            f"{len(self.rounds)} cut{'s' if len(self.rounds) != 1 else ''} measured"
        )
        return f"{Table(('layer', 'units', 'kept', ''), tuple(rows))}\n{caption}"


def meet(
    model: nn.Module, dummy_input: Any, atoms: ScoredAtoms, wish: Wish
) -> tuple[np.ndarray, TargetReport]:
    """What has to go, bool (labels,), so that the model, really shrunk, costs what it shall.

    Args:
        model: is not touched.
        dummy_input: what its cost is of.
        atoms: what can go, and what it is worth.
        wish: the target.

    Raises:
        ConfigError: the target cannot be met; says what can be reached.
    """
    coupling, target = atoms.coupling, wish.target
    shrunk = Shrunk(model, dummy_input, target.cost, target.relative)
    goal = target.of(shrunk.dense)
    if goal >= shrunk.dense:
        raise ConfigError(
            f"target: got {target}, and the model costs {in_words(target.cost, shrunk.dense)} as "
            "it is; expected less"
        )
    cost, order = _order(coupling, wish)
    if isinstance(cost, LatencyCost):
        cost.calibrate(order.gone(0), coupling.roots, shrunk.dense)
        prices = order.prices()
        near = np.abs(prices * shrunk.dense / prices[0] / goal - 1) < _NEAR
        order.add_neighbours(np.flatnonzero(near).tolist())

    def measure(position: int) -> float:
        gone = order.gone(position)
        measured = shrunk.measure(gone, atoms.masks)
        if isinstance(cost, LatencyCost):
            cost.calibrate(gone, coupling.roots, measured)
        return measured

    search = Search(
        order.prices(), order.path, goal,
        lambda position: cost(order.gone(position), coupling.roots), measure,
        tolerance=wish.tolerance if target.cost == "latency" else 0.0, rounds=wish.rounds,
    )  # fmt: skip
    met = search.run(shrunk.dense)
    if met is None:
        raise ConfigError(_what_can_be_reached(search, shrunk.dense, wish))
    gone = order.gone(met.position)
    kept = {x.name: (len(x.roots), int((~gone[x.roots]).sum())) for x in coupling.layers}
    rounds = tuple(search.rounds)
    return gone, TargetReport(target, shrunk.dense, met.predicted, met.measured, rounds, kept)


def _order(coupling: Coupling, wish: Wish) -> tuple[CostModel, Order]:
    """The cost model, and the order in which atoms go."""
    if wish.target.cost != "latency":
        cost = cost_model(wish.target.cost, coupling.graph)
        return cost, Order(coupling, cost, partial(_rounded, wish.round_to), wish.strategy)
    times = LatencyCost(coupling.graph, wish.table)
    smooth = times.smooth(half_gone(coupling), coupling.roots)
    price = SizeCost(times.extents, smooth, times.unit)
    if wish.round_to is None:
        return times, Order(coupling, price, partial(_dropping, times), wish.strategy)
    return times, Order(coupling, price, partial(_rounded, wish.round_to), wish.strategy)


def _rounded(round_to: int | None, coupling: Coupling, family: Family) -> list[int]:
    return rounded_losses(coupling, family, round_to or 1)


def _dropping(cost: LatencyCost, coupling: Coupling, family: Family) -> list[int]:
    return measured_losses(coupling, family, cost)


def _what_can_be_reached(search: Search, dense: float, wish: Wish) -> str:
    target, cost = wish.target, wish.target.cost
    if not search.rounds:
        return f"target: got {target}, and nothing of the selected layers can go"
    least = min(made.measured for made in search.rounds)
    last = any(made.position == search.path - 1 for made in search.rounds)
    if last and least > search.goal:
        return (
            f"target: got {target}, and the least that can be reached is "
            f"{in_words(cost, least)} ({least / dense:.1%}): every selected layer is at its limit "
            "then; select more layers, or ask for less"
        )
    tried = ", ".join(in_words(cost, made.measured) for made in search.rounds)
    return (
        f"target: got {target}, {in_words(cost, search.goal)}, and no cut of {len(search.rounds)} "
        f"was within {wish.tolerance:.0%} of it: measured {tried}. Is the machine busy with other "
        "work? Try more rounds, a larger tolerance, or a larger batch"
    )
