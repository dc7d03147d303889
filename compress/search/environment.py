"""Pruning as a walk over the groups of a model: at each an action, under a budget for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from compress.errors import ConfigError
from compress.graph.channels import ChannelGraph
from compress.masks import raw_parameter
from compress.rules.registry import shape_of
from compress.search.space import Point, SearchGroup
from compress.search.subject import Subject

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Episode:
    """One walk.

    Attributes:
        states: (groups, size), what was seen at each.
        actions: (groups,), what was done, in [0, 1].
        point: where it led.
    """

    states: np.ndarray
    actions: np.ndarray
    point: Point


class Environment:
    """Walks over the groups of a subject, each of which ends within the budget.

    He et al. 2018 (AMC, section 3.2). The state at group t is, all of it scaled to [0, 1],

        (t, kind, n, c, h, w, stride, k, FLOPs[t], reduced, rest, a_{t−1}, a_max)

    The weights of its first layer are n × c × k × k, that layer's input is c × h × w; FLOPs[t] is
    what it can save alone, ``reduced`` what the groups before it save, ``rest`` what it and the
    groups after it can save besides, a_{t−1} the last action, and a_max (which the paper
    does not have) the highest that the budget leaves. "FLOPs" are any cost.

    An action a keeps the fraction ``least + a·(most − least)`` of a group's units. It is lowered to
    a_max, above which too little could be saved even if all later groups lost all that they may
    (algorithm 1). The savings are those of the channel graph, coupled groups, shared
    inputs and all, so that each walk ends within the budget.

    Args:
        cost: what is saved: see `Subject.saved`.
        target: the fraction of it.
        least, most: the fraction of a group's units that is kept at action 0 and 1.
        window: states that an observation holds, the last ones.

    Attributes:
        size: of an observation.

    Raises:
        ConfigError: so much cannot be saved; says what can.
    """

    def __init__(
        self, subject: Subject, cost: str, target: float, least: float, most: float, window: int = 1
    ) -> None:
        self._subject, self._cost, self._target = subject, cost, target
        self._least, self._most, self._window = least, most, window
        self.groups = subject.space.groups
        self._limits = [self._range(group) for group in self.groups]
        self._top = {g.name: high / g.units for g, (_, high) in self._with_limits()}
        reachable = self._saved({}, self._top)
        if reachable < target:
            raise ConfigError(
                f"{cost}: {1 - target:g} of it may stay, and {1 - reachable:.4f} stays where each "
                f"group of layers keeps lbound={least:g} of its channels and what its "
                "max_sparsity_per_layer says; allow more, lower lbound, or select more layers"
            )
        self._features = self._fixed_features()
        self.size = window * (self._features.shape[1] + 4)

    def play(self, choose: Callable[[np.ndarray], float]) -> Episode:
        """One walk, in which ``choose`` maps an observation (size,) to an action in [0, 1]."""
        decided: dict[str, float] = {}
        actions: list[float] = []
        states: list[np.ndarray] = []
        history = np.zeros(self.size)
        for number, (group, (low, high)) in enumerate(self._with_limits()):
            fewest = self._within(decided, group, low, high)
            last = actions[-1] if actions else 1.0
            state = self._state(number, decided, last, self.action(fewest / group.units))
            history = np.concatenate([history[len(state) :], state])
            states.append(history)
            kept = self._least + choose(history) * (self._most - self._least)
            wanted = math.floor((1 - kept) * group.units + _ROUNDING)
            wanted = min(max(wanted, fewest), high)
            decided[group.name] = self._within(decided, group, wanted, high) / group.units
            actions.append(self.action(decided[group.name]))
        point = self._subject.space.point(decided)
        return Episode(np.array(states), np.array(actions), point)

    def action(self, sparsity: float) -> float:
        """The action that leads to a sparsity, or the nearest to it."""
        action = (1 - sparsity - self._least) / (self._most - self._least)
        return min(max(action, 0.0), 1.0)

    def _with_limits(self) -> zip[tuple[SearchGroup, tuple[int, int]]]:
        return zip(self.groups, self._limits, strict=True)

    def _range(self, group: SearchGroup) -> tuple[int, int]:
        """How many units of a group go, at least and at most."""
        high = group.units - math.ceil(self._least * group.units - _ROUNDING)
        high = min(high, math.floor(group.max_sparsity * group.units + _ROUNDING), group.units - 1)
        low = group.units - math.floor(self._most * group.units + _ROUNDING)
        return min(low, high), high

    def _within(self, decided: dict[str, float], group: SearchGroup, low: int, high: int) -> int:
        """The fewest units, ``low`` or more, with which the budget can still be met."""
        if self._enough(decided | {group.name: low / group.units}):
            return low
        while high - low > 1:  # high is enough, as it was when the group before was decided
            middle = (low + high) // 2
            if self._enough(decided | {group.name: middle / group.units}):
                high = middle
            else:
                low = middle
        return high

    def _enough(self, decided: dict[str, float]) -> bool:
        return self._saved(decided, self._top) >= self._target

    def _saved(self, decided: dict[str, float], later: dict[str, float]) -> float:
        return self._subject.saved(self._subject.space.point(later | decided), self._cost)

    def _state(
        self, number: int, decided: dict[str, float], last: float, highest: float
    ) -> np.ndarray:
        reduced = self._saved(decided, {})
        rest = self._saved(decided, self._top) - reduced
        return np.append(self._features[number], (reduced, rest, last, highest))

    def _fixed_features(self) -> np.ndarray:
        """Of each group what no decision changes, (groups, 9): from t to FLOPs[t]."""
        coupling = self._subject.space.coupling
        assert coupling is not None, "a pruner of single weights saves no FLOPs"
        sources = _sources(coupling.graph)
        targets = {target.name: target for target in self._subject.space.targets}
        names: dict[str, int] = {}
        rows = []
        for number, group in enumerate(self.groups):
            target = targets[group.name]
            module = coupling.graph.modules[target.modules[0]]
            kind, layer = _layer(module, target.weights[0], sources.get(group.name))
            kind_number = names.setdefault(kind, len(names))
            alone = self._saved({}, {group.name: self._top[group.name]})
            rows.append((number, kind_number, group.units, *layer, alone))
        table = np.array(rows, float)
        table[:, :-1] /= np.maximum(table[:, :-1].max(axis=0), _ROUNDING)
        return table


_Source = tuple[str, tuple[int, ...]]  # the function that a layer calls, what it is called with


def _sources(graph: ChannelGraph) -> dict[str, _Source]:
    """Of each layer, by its path, the first call that makes its units; input without channels."""
    found: dict[str, _Source] = {}
    for step in graph.steps:
        for made in step.rule.makes(step.call):
            if made.weight.op == "get_attr":
                shape = list(shape_of(made.source))
                del shape[-1 if made.axis is None else made.axis]
                path = str(made.weight.target).removesuffix("weight").removesuffix(".")
                found.setdefault(path, (step.call.name, tuple(shape[1:])))
    return found


def _layer(module: nn.Module, name: str, source: _Source | None) -> tuple[str, tuple[float, ...]]:
    """The kind of a layer, and its c, h, w, stride and k."""
    kind, places = source or ("", ())
    weight = raw_parameter(module, name)
    assert weight is not None, "the config_list was checked"
    inputs, kernel = weight.numel() // len(weight) // math.prod(weight.shape[2:]), weight.shape[2:]
    strides = getattr(module, "stride", 1)
    stride = strides[-1] if isinstance(strides, tuple) else strides
    height, width = math.prod(places[:-1]), places[-1] if places else 1
    return kind, (inputs, height, width, stride, kernel[-1] if kernel else 1)
