"""Search by simulated annealing."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from compress.evaluator import Evaluator
from compress.pruners.data import is_count, is_number
from compress.search.base import Found, SearchPruner
from compress.search.space import Point
from compress.search.subject import Subject
from compress.search.trials import Trial


class SimulatedAnnealingPruner(SearchPruner):
    """Distributes a sparsity over the layers by simulated annealing.

    Liu et al. 2020, AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High
    Compression Rates, section 4.2; Kirkpatrick et al. 1983. The search begins with the best of the
    same sparsity everywhere and of some that are drawn. At each temperature T the sparsities of
    half of the groups are shaken, by up to ``perturbation_magnitude``·T/T₀, and all are scaled to
    the target again. A worse candidate is accepted with probability 100^(−(Δ/δ)·(T₀/T)), where Δ is
    what it is worse and δ the mean of what candidates have differed by so far: NNI's exp(−Δ/T)
    accepts nearly everything of a metric in [0, 1]. NNI shook by 0.35, all groups: with as few
    candidates as there are by default that was no better than drawing them.

    Args:
        model, config_list, evaluator, **arguments: as `SearchPruner`.
        start_temperature, stop_temperature: T is multiplied by ``cool_down_rate`` until it is below
            ``stop_temperature``.
        cool_down_rate: in (0, 1).
        perturbation_magnitude: of a sparsity, at ``start_temperature``.
        initial_candidates: how many are drawn at first.
        candidates: at each temperature, one after the other from where the last led; they are
            evaluated together, so that so many workers are of use.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        *,
        start_temperature: float = 100,
        stop_temperature: float = 20,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.7,
        initial_candidates: int = 4,
        candidates: int = 1,
        **arguments: Any,
    ) -> None:
        self.start_temperature, self.stop_temperature = start_temperature, stop_temperature
        self.cool_down_rate = cool_down_rate
        self.perturbation_magnitude = perturbation_magnitude
        self.initial_candidates, self.candidates = initial_candidates, candidates
        super().__init__(model, config_list, evaluator, **arguments)

    def _search(self, subject: Subject) -> Found:
        best, point = self._anneal(subject, self.target)
        return Found(best, subject.masks(point))

    def _anneal(self, subject: Subject, target: float, stage: int = 0) -> tuple[Trial, Point]:
        """The best candidate for a target. Trials have ``stage``, or else the temperature's number.

        The first is the same sparsity everywhere.
        """
        draw = random.Random(f"{self.seed} {stage}")
        names = [group.name for group in subject.space.groups]
        profiles = [{name: draw.random() for name in names} for _ in range(self.initial_candidates)]
        points = [subject.scaled(each, target, self.cost) for each in profiles]
        points.insert(0, self._uniform(subject, target))
        trials = self._evaluate(subject, points, stage)
        current = self._best(trials)
        best = current, points[trials.index(current)]
        differences = [self._gain(current) - self._gain(trial) for trial in trials]
        for number, temperature in enumerate(self._temperatures(), 1):
            heat = temperature / self.start_temperature
            near = [
                self._neighbour(subject, current, target, heat, draw)
                for _ in range(self.candidates)
            ]
            trials = self._evaluate(subject, near, stage or number)
            for point, trial in zip(near, trials, strict=True):
                worse = self._gain(current) - self._gain(trial)
                differences.append(abs(worse))
                scale = sum(differences) / len(differences)
                if worse <= 0 or draw.random() < 100 ** (-worse / (scale * heat)):
                    current = trial
                if self._gain(trial) > self._gain(best[0]):
                    best = trial, point
        return best

    def _temperatures(self) -> list[float]:
        found = [float(self.start_temperature)]
        while found[-1] * self.cool_down_rate >= self.stop_temperature:
            found.append(found[-1] * self.cool_down_rate)
        return found

    def _planned(self) -> int | None:
        return 1 + self.initial_candidates + len(self._temperatures()) * self.candidates

    def _neighbour(
        self,
        subject: Subject,
        current: Trial,
        target: float,
        heat: float,
        draw: random.Random,
    ) -> Point:
        magnitude = self.perturbation_magnitude * heat
        shaken = dict(current.sparsities)
        for name in draw.sample(sorted(shaken), -(-len(shaken) // 2)):
            moved = shaken[name] + draw.uniform(-magnitude, magnitude)
            shaken[name] = min(max(moved, 0.0), 1.0)
        return subject.scaled(shaken, target, self.cost)

    def _arguments(self) -> dict[str, Any]:
        own = ("start_temperature", "stop_temperature", "cool_down_rate", "perturbation_magnitude",
               "initial_candidates", "candidates")  # fmt: skip
        return super()._arguments() | {name: getattr(self, name) for name in own}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        start, stop = self.start_temperature, self.stop_temperature
        if not (is_number(start) and is_number(stop) and 0 < stop <= start):
            problems.append(
                f"stop_temperature: got {stop!r} and start_temperature={start!r}; expected "
                "numbers, 0 < stop_temperature ≤ start_temperature"
            )
        if not (is_number(self.cool_down_rate) and 0 < self.cool_down_rate < 1):
            problems.append(f"cool_down_rate: got {self.cool_down_rate!r}; expected one in (0, 1)")
        if not (is_number(self.perturbation_magnitude) and self.perturbation_magnitude > 0):
            problems.append(
                f"perturbation_magnitude: got {self.perturbation_magnitude!r}; expected a number "
                "above 0, such as 0.7"
            )
        problems += [
            f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ {least}"
            for name, least in (("initial_candidates", 0), ("candidates", 1))
            if not is_count(getattr(self, name), least)
        ]
        return problems
