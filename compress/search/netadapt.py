"""Search by taking a little from one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.pruners.data import is_number
from compress.schedule.state import read_state, write_state
from compress.search.base import Found, SearchPruner
from compress.search.space import Point, SearchGroup
from compress.search.subject import Subject
from compress.search.trials import Trial
from compress.unchanged import values_of

_STATE = "netadapt_state.safetensors"
_HALVINGS = 30


class NetAdaptPruner(SearchPruner):
    """Meets a budget in small steps, each taken from the layer that bears it best.

    Yang et al. 2018, NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications,
    algorithm 1. In each iteration every group of coupled layers by itself is cut until the whole
    model costs ``sparsity_per_iteration`` less; each of these candidates is trained for a short
    time and evaluated; the best is where the next iteration begins, with its weights. At the end
    the model has the masks and the weights of the last winner.

    Args:
        model, config_list, evaluator, **arguments: as `SearchPruner`. With ``cost`` the budget and
            the steps are parameters, FLOPs, or latency from measured tables.
        short_term_fine_tuner: ``short_term_fine_tuner(model)`` trains a candidate in place; another
            name of ``fine_tuner``. Without one nothing is trained.
        sparsity_per_iteration: what is saved in one iteration, as a fraction of the whole.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        short_term_fine_tuner: Callable[[nn.Module], Any] | None = None,
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        *,
        sparsity_per_iteration: float = 0.05,
        **arguments: Any,
    ) -> None:
        self.sparsity_per_iteration = sparsity_per_iteration
        if short_term_fine_tuner is not None:
            if arguments.get("fine_tuner") is not None:
                raise ConfigError(
                    "NetAdaptPruner: got both short_term_fine_tuner and fine_tuner, which are two "
                    "names of one argument; pass one"
                )
            arguments["fine_tuner"] = short_term_fine_tuner
        super().__init__(model, config_list, evaluator, **arguments)

    def _search(self, subject: Subject) -> Found:
        subject.most(self.target, self.cost)
        number, sparsities, trial = 0, {}, None
        saved = self._read_state()
        if saved is not None:
            number, sparsities = saved["iteration"], saved["sparsities"]
            self._trials.recall(saved["trials"])
            trial = self._trials.done[saved["winner"]]
            subject = self._renewed(subject, Masks(saved["masks"]), saved["values"])
        point = subject.space.point(sparsities)
        while trial is None or subject.saved(point, self.cost) < self.target - 1e-9:
            number += 1
            goal = min(subject.saved(point, self.cost) + self.sparsity_per_iteration, self.target)
            points = self._candidates(subject, point, goal)
            trials, state = self._trials.evaluate(
                subject, points, number, self._gain if self.fine_tuner else None
            )
            trial = self._best(trials)
            point = points[trials.index(trial)]
            if state is not None:
                subject.take_over(point, state)
            masks = subject.masks(point)
            subject = self._renewed(subject, masks, values_of(subject.model))
            self._write_state(subject, masks, number, trial)
            point = subject.space.point(trial.sparsities)
        values = values_of(subject.model) if self.fine_tuner else None
        return Found(trial, subject.masks(point), values)

    def _candidates(self, subject: Subject, now: Point, goal: float) -> list[Point]:
        """One for each group that can save so much; if none can, what each can save at most."""
        found = [self._cut(subject, group, now, goal) for group in subject.space.groups]
        points = [point for point in found if point is not None]
        enough = [point for point in points if subject.saved(point, self.cost) >= goal]
        return enough or points

    def _cut(self, subject: Subject, group: SearchGroup, now: Point, goal: float) -> Point | None:
        """The least that a group can lose to reach a goal, or all that it may; None for nothing."""
        space = subject.space

        def at(sparsity: float) -> Point:
            return space.point({**now.sparsities, group.name: sparsity})

        low, high = now.sparsities.get(group.name, 0.0), group.max_sparsity
        best = at(high)
        if subject.saved(best, self.cost) <= subject.saved(now, self.cost):
            return None
        if subject.saved(best, self.cost) < goal:
            return best
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            point = at(middle)
            if subject.saved(point, self.cost) >= goal:
                high, best = middle, point
            else:
                low = middle
            if (high - low) * group.units < 0.5:
                break
        return best

    # -- stop and go on --------------------------------------------------------------------

    def _read_state(self) -> Any:
        if self.experiment_data_dir is None:
            return None
        return read_state(Path(self.experiment_data_dir) / _STATE, self.key)

    def _write_state(self, subject: Subject, masks: Masks, number: int, winner: Trial) -> None:
        if self.experiment_data_dir is None:
            return
        state = {
            "iteration": number,
            "winner": winner.number,
            "trials": len(self._trials.done),
            "sparsities": winner.sparsities,
            "masks": {path: dict(entries) for path, entries in masks.items()},
            "values": values_of(subject.model),
        }
        write_state(Path(self.experiment_data_dir) / _STATE, self.key, state)

    # -- what is wrong ---------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"sparsity_per_iteration": self.sparsity_per_iteration}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        step = self.sparsity_per_iteration
        if not (is_number(step) and 0 < step < 1):
            problems.append(
                f"sparsity_per_iteration: got {step!r}; expected a number in (0, 1), such as 0.05"
            )
        return problems
