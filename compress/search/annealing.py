"""Search by simulated annealing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.pruners.data import is_count
from compress.search.base import SearchPruner
from compress.search.space import Point
from compress.search.subject import Subject
from compress.search.trials import Trial


class SimulatedAnnealingPruner(SearchPruner):
    """Distributes a sparsity over the layers by simulated annealing.

    Liu et al. 2020, AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High
    Compression Rates, section 4.2; Kirkpatrick et al. 1983. The search begins with the same
    sparsity everywhere. At each temperature T the sparsities are shaken, by up to
    ``perturbation_magnitude``·T/T₀, and scaled to the target again. A worse candidate is accepted
    with probability 2^(−(Δ/δ)·(T₀/T)), where Δ is what it is worse and δ the mean of what
    neighbours have differed by so far: NNI's exp(−Δ/T) accepts nearly everything of a metric
    in [0, 1].

    Args:
        model, config_list, evaluator, **arguments: as `SearchPruner`.
        start_temperature, stop_temperature: T is multiplied by ``cool_down_rate`` until it is below
            ``stop_temperature``.
        cool_down_rate: in (0, 1).
        perturbation_magnitude: of a sparsity, at ``start_temperature``.
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
        perturbation_magnitude: float = 0.35,
        candidates: int = 1,
        **arguments: Any,
    ) -> None:
        self.start_temperature, self.stop_temperature = start_temperature, stop_temperature
        self.cool_down_rate = cool_down_rate
        self.perturbation_magnitude = perturbation_magnitude
        self.candidates = candidates
        super().__init__(model, config_list, evaluator, **arguments)

    def _search(self, subject: Subject) -> tuple[Trial, Masks]:
        draw = random.Random(self.seed)
        point = self._uniform(subject)
        (trial,) = self._evaluate(subject, [point])
        current = best = trial
        points = {trial.number: point}
        differences: list[float] = []
        for stage, temperature in enumerate(self._temperatures(), 1):
            heat = temperature / self.start_temperature
            near = [self._neighbour(subject, current, heat, draw) for _ in range(self.candidates)]
            for point, trial in zip(near, self._evaluate(subject, near, stage), strict=True):
                points[trial.number] = point
                worse = self._gain(current) - self._gain(trial)
                differences.append(abs(worse))
                scale = sum(differences) / len(differences)
                if worse <= 0 or draw.random() < 2 ** (-worse / (scale * heat)):
                    current = trial
                best = self._best([best, trial])
        return best, subject.masks(points[best.number])

    def _temperatures(self) -> list[float]:
        found = [float(self.start_temperature)]
        while found[-1] * self.cool_down_rate >= self.stop_temperature:
            found.append(found[-1] * self.cool_down_rate)
        return found

    def _planned(self) -> int:
        return 1 + len(self._temperatures()) * self.candidates

    def _neighbour(
        self, subject: Subject, current: Trial, heat: float, draw: random.Random
    ) -> Point:
        magnitude = self.perturbation_magnitude * heat
        shaken = {
            name: min(max(sparsity + draw.uniform(-magnitude, magnitude), 0.0), 1.0)
            for name, sparsity in current.sparsities.items()
        }
        return subject.scaled(shaken, self.target, self.cost)

    def _arguments(self) -> dict[str, Any]:
        own = ("start_temperature", "stop_temperature", "cool_down_rate", "perturbation_magnitude",
               "candidates")  # fmt: skip
        return super()._arguments() | {name: getattr(self, name) for name in own}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        start, stop = self.start_temperature, self.stop_temperature
        if not (_is_number(start) and _is_number(stop) and 0 < stop <= start):
            problems.append(
                f"stop_temperature: got {stop!r} and start_temperature={start!r}; expected "
                "numbers, 0 < stop_temperature ≤ start_temperature"
            )
        if not (_is_number(self.cool_down_rate) and 0 < self.cool_down_rate < 1):
            problems.append(f"cool_down_rate: got {self.cool_down_rate!r}; expected one in (0, 1)")
        if not (_is_number(self.perturbation_magnitude) and self.perturbation_magnitude > 0):
            problems.append(
                f"perturbation_magnitude: got {self.perturbation_magnitude!r}; expected a number "
                "above 0, such as 0.35"
            )
        if not is_count(self.candidates, 1):
            problems.append(f"candidates: got {self.candidates!r}; expected a whole number ≥ 1")
        return problems


def _is_number(value: object) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]
