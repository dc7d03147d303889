"""Sparsity as a function of the step: frozen values, without tensors, optimizers or epochs.

A schedule changes at the steps t₀ + kΔt, k = 0 … n, with t₀ = ``begin``, Δt = ``frequency`` and
n = ``changes``, and keeps its value between them. A subclass says what it is at k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from compress.errors import ConfigError, closest


@dataclass(frozen=True)
class Schedule(ABC):
    """The sparsity at a step: ``schedule(step)``.

    Attributes:
        final: from the step ``end`` on, in [0, 1).
        initial: at ``begin``; before it, there is none.
        begin: the first step at which anything is masked.
        changes: how often the sparsity changes after that; 0: ``final`` at once.
        frequency: steps between two changes.
    """

    final: float
    initial: float = 0.0
    begin: int = 0
    changes: int = 1
    frequency: int = 1
    monotone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = [
            f"{name}: got {value!r}; expected a number in [0, 1)"
            for name, value in (("initial", self.initial), ("final", self.final))
            if not 0 <= value < 1
        ]
        problems += [
            f"{name}: got {value!r}; expected a whole number ≥ {least}"
            for name, value, least in (
                ("begin", self.begin, 0),
                ("changes", self.changes, 0),
                ("frequency", self.frequency, 1),
            )
            if type(value) is not int or value < least
        ]
        if not problems and self.initial > self.final:
            problems = [f"initial: got {self.initial}, above final={self.final}; expected at most"]
        if problems:
            raise ConfigError(f"this {type(self).__name__} schedule cannot be made:", problems)

    @property
    def end(self) -> int:
        """The first step with the final sparsity."""
        return self.begin + self.changes * self.frequency

    @property
    def start(self) -> int:
        """The first step with a sparsity above 0, or ``end``."""
        return self.begin if self(self.begin) > 0 else min(self.begin + self.frequency, self.end)

    def __call__(self, step: int) -> float:
        """The sparsity in force at ``step``, in [0, 1); 0 before ``begin``."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return self.at((step - self.begin) // self.frequency)

    @abstractmethod
    def at(self, change: int) -> float:
        """The sparsity after so many of the ``changes``, which are more than that."""


class OneShot(Schedule):
    """All at ``begin``: s = s_f."""

    def at(self, change: int) -> float:
        return self.final


class Linear(Schedule):
    """As much more each time: s = s_i + (s_f − s_i)·k/n."""

    def at(self, change: int) -> float:
        return self.initial + (self.final - self.initial) * (change / self.changes)


class Cubic(Schedule):
    """Much at first, then less and less: s = s_f + (s_i − s_f)·(1 − k/n)³.

    Automated gradual pruning: Zhu & Gupta 2017, To prune, or not to prune, eq. 1, with
    k = (t − t₀)/Δt.
    """

    def at(self, change: int) -> float:
        return self.final + (self.initial - self.final) * (1 - change / self.changes) ** 3


class Exponential(Schedule):
    """The same fraction of what is left each time: 1 − s = (1 − s_i)·((1 − s_f)/(1 − s_i))^(k/n).

    What iterative magnitude pruning does, as in Frankle & Carbin 2019, section 1.
    """

    def at(self, change: int) -> float:
        left: float = ((1 - self.final) / (1 - self.initial)) ** (change / self.changes)
        return 1 - (1 - self.initial) * left


@dataclass(frozen=True)
class Cyclic(Schedule):
    """`Cubic` several times over: what was masked may come back where a new cycle begins.

    After Srinivas et al. 2022, Cyclical Pruning for Sparse Neural Networks. A cycle is of
    m = ⌈n/cycles⌉ changes (the last may be shorter), after the j-th of which
    s = s_f + (s_i − s_f)·(1 − j/m)³.

    Attributes:
        cycles: how many.
    """

    cycles: int = 2
    monotone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cycles) is not int or self.cycles < 1:
            raise ConfigError(f"cycles: got {self.cycles!r}; expected a whole number ≥ 1")

    def at(self, change: int) -> float:
        if change == 0:
            return self.initial
        length = math.ceil(self.changes / self.cycles)
        cycle, place = divmod(change - 1, length)
        length = min(length, self.changes - cycle * length)
        return self.final + (self.initial - self.final) * (1 - (place + 1) / length) ** 3


SCHEDULES: dict[str, type[Schedule]] = {
    "one_shot": OneShot,
    "linear": Linear,
    "cubic": Cubic,
    "exponential": Exponential,
    "cyclic": Cyclic,
}


def schedule_type(given: str | type[Schedule]) -> type[Schedule]:
    """A kind of schedule by its name, or as it is.

    Raises:
        ConfigError: there is none of this name, or it is no schedule.
    """
    if isinstance(given, type) and issubclass(given, Schedule):
        return given
    if isinstance(given, str) and given in SCHEDULES:
        return SCHEDULES[given]
    hint = closest(given, SCHEDULES) if isinstance(given, str) else ""
    raise ConfigError(
        f"schedule: got {given!r}; expected one of {', '.join(SCHEDULES)}, or a subclass of "
        f"Schedule{hint}"
    )
