"""A search that takes from each layer what it bears alone, and that analysis by itself."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from compress.charts.figure import can_draw
from compress.errors import ConfigError, SearchError, StateError
from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.search.base import Found, SearchPruner
from compress.search.measuring import chosen_metric
from compress.search.sensitivity import Sensitivity, bearable
from compress.search.space import Sparsities
from compress.search.subject import Subject
from compress.unchanged import values_of

Curves = Mapping[str, Mapping[float, float]]  # performance by group and sparsity
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity_analysis(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    evaluator: Evaluator | Callable[[nn.Module], Any],
    sparsities: Sequence[float] = SPARSITIES,
    *,
    max_drop: float | None = None,
    **arguments: Any,
) -> Sensitivity:
    """Measure how good a model is without a part of each layer alone.

    Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.2. Layers that can only shrink
    together are one. Each sparsity of each group is a candidate, evaluated as a really small model.

    Args:
        model: plain or masked; it is never changed.
        config_list: which layers; sparsities in it are not looked at, and need not be there.
        evaluator, **arguments: as `SearchPruner`. In ``experiment_data_dir`` are sensitivity.csv,
            sensitivity.json and sensitivity.png at the end.
        sparsities: to be tried, each in (0, 1).
        max_drop: a group that has become worse by more is not made sparser; None: tried to the end.

    Raises:
        ConfigError, SearchError, StateError, CompressError: as `SearchPruner`.
    """
    given = [
        dict(entry) if "sparsity" in entry or entry.get("exclude") else {"sparsity": 0.5, **entry}
        for entry in config_list
    ]
    return _Analysis(
        model, given, evaluator, sparsities=sparsities, acc_drop_threshold=max_drop, **arguments
    ).analyse()


class SensitivityPruner(SearchPruner):
    """Distributes a sparsity over the layers by what each of them bears.

    As NNI v1's of this name. In each iteration each group is made sparser alone, until the
    performance has dropped by more than ``acc_drop_threshold``. The sparsities of all are then
    proportional to where that was, and scaled to a target that grows by ``sparsity_per_iter``.
    With a ``finetuner`` the next iteration goes on from the weights that it trained, what is
    masked stays masked, and `compress` returns the model with the weights of the last iteration.
    A search that was stopped trains what iterations have led to again, and evaluates nothing twice.

    Args:
        model, config_list, evaluator, **arguments: as `SearchPruner`.
        finetuner: ``finetuner(model)`` trains the candidate of each iteration before it is scored;
            candidates of one sparse group are not trained.
        sparsity_proportion_calc: ``f(performance, acc_drop_threshold, {layer: {sparsity:
            performance}})`` -> ``{layer: proportion}``, instead of that.
        sparsity_per_iter: of the target; None: one iteration.
        acc_drop_threshold: in the evaluator's units.
        sparsities: that are tried of each group.

    Attributes:
        sensitivity: `Sensitivity` of the dense model, after `compress`.
    """

    sensitivity: Sensitivity | None = None
    _needs_threshold: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[..., Any] | None = None,
        finetuner: Callable[..., Any] | None = None,
        *,
        sparsity_proportion_calc: Callable[..., Mapping[str, float]] | None = None,
        sparsity_per_iter: float | None = 0.1,
        acc_drop_threshold: float | None = 0.05,
        sparsities: Sequence[float] = SPARSITIES,
        **arguments: Any,
    ) -> None:
        self.sparsity_proportion_calc = sparsity_proportion_calc
        self.sparsity_per_iter, self.acc_drop_threshold = sparsity_per_iter, acc_drop_threshold
        self.sparsities = sparsities
        self._resumed: Sensitivity | None = None
        super().__init__(model, config_list, evaluator, fine_tuner=finetuner, **arguments)

    def compress(
        self,
        eval_args: Sequence[Any] | None = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Sequence[Any] | None = None,
        finetune_kwargs: Mapping[str, Any] | None = None,
        resume_sensitivity: str | os.PathLike[str] | None = None,
    ) -> tuple[nn.Module, Masks]:
        """As `SearchPruner.compress`, with NNI v1's arguments.

        Args:
            eval_args, eval_kwargs, finetune_args, finetune_kwargs: of evaluator and finetuner. In
                place of the model that the pruner was given they get the candidate; where it is
                not among them, the candidate is the first argument.
            resume_sensitivity: a file of `Sensitivity.export`, instead of the first analysis.
        """
        if self.result is None:
            assert self.evaluator is not None, "_check_arguments asked for it"
            if eval_args or eval_kwargs:
                function = self.evaluator.eval_fn
                self.evaluator = copy(self.evaluator)
                self.evaluator.eval_fn = _Call(function, eval_args, eval_kwargs, self.model)
            if self.fine_tuner is not None and (finetune_args or finetune_kwargs):
                self.fine_tuner = _Call(self.fine_tuner, finetune_args, finetune_kwargs, self.model)
            if resume_sensitivity is not None:
                self._resumed = Sensitivity.read(resume_sensitivity)
        return super().compress()

    def analyse(self) -> Sensitivity:
        """The sensitivity of the model as it is."""
        with self._searching() as subject:
            curves = self._curves(subject, {}, self._performance(), 0)
            found = self._sensitivity(subject, curves)
        self._write(found)
        return found

    def _search(self, subject: Subject) -> Found:
        self._uniform(subject)  # an impossible target is told before anything is evaluated
        performance, now = self._performance(), dict[str, float]()
        for stage, goal in enumerate(self._goals(), 1):
            if stage == 1 and self._resumed is not None:
                curves = _named_alike(self._resumed.performances, subject)
            else:
                curves = self._curves(subject, now, performance, stage)
            if stage == 1:
                self.sensitivity = self._sensitivity(subject, curves)
                self._write(self.sensitivity)
            profile = self._proportions(subject, performance, curves, now)
            point = subject.scaled(profile, goal, self.cost, now if self.fine_tuner else None)
            (trial,), state = self._trials.evaluate(
                subject, [point], stage, self._gain if self.fine_tuner else None
            )
            now, performance = dict(point.sparsities), trial.performance
            masks = subject.masks(point)
            if state is not None:
                subject.take_over(point, state)
                subject = self._renewed(subject, masks, values_of(subject.model))
        return Found(trial, masks, values_of(subject.model) if self.fine_tuner else None)

    def _goals(self) -> list[float]:
        """The target of each iteration."""
        step = self.sparsity_per_iter or self.target
        count = math.ceil(self.target / step - 1e-9)
        return [*(number * step for number in range(1, count)), self.target]

    def _curves(
        self, subject: Subject, now: Sparsities, performance: float, stage: int
    ) -> dict[str, dict[float, float]]:
        """Performance without more and more of each group, the others as they are now."""
        space = subject.space
        found: dict[str, dict[float, float]] = {group.name: {} for group in space.groups}
        known = {space.point(now).key: performance}
        going = list(space.groups)
        for sparsity in sorted(self.sparsities):
            going = [group for group in going if sparsity <= group.max_sparsity]
            points = {
                group.name: space.point({**now, group.name: sparsity})
                for group in going
                if sparsity > now.get(group.name, 0.0)
            }
            keys = {name: point.key for name, point in points.items()}
            new = {keys[name]: point for name, point in points.items() if keys[name] not in known}
            with self._untrained():
                trials = self._evaluate(subject, list(new.values()), stage)
            known |= {key: trial.performance for key, trial in zip(new, trials, strict=True)}
            for name, key in keys.items():
                found[name][sparsity] = known[key]
            going = [g for g in going if not self._dropped(performance, found[g.name])]
        return found

    def _dropped(self, performance: float, curve: Mapping[float, float]) -> bool:
        if self.acc_drop_threshold is None or not curve:
            return False
        return self._worse(performance, curve[max(curve)]) > self.acc_drop_threshold

    def _worse(self, performance: float, other: float) -> float:
        return performance - other if self.optimize_mode == "maximize" else other - performance

    def _proportions(
        self, subject: Subject, performance: float, curves: Curves, now: Sparsities
    ) -> dict[str, float]:
        """What each group may lose, all of its own included that it has lost."""
        threshold, maximize = self.acc_drop_threshold, self.optimize_mode == "maximize"
        if self.sparsity_proportion_calc is None:
            assert threshold is not None, "_problems asked for it"
            return {
                name: bearable(performance, threshold, curve, maximize, now.get(name, 0.0))
                for name, curve in curves.items()
            }
        given = self.sparsity_proportion_calc(performance, threshold, curves)
        names = {group.name for group in subject.space.groups}
        right = isinstance(given, Mapping) and set(given) <= names
        if not right or not any(given.values()) or not all(map(_is_share, given.values())):
            raise SearchError(
                f"sparsity_proportion_calc returned {given!r:.200}; expected a dict with a number "
                f"≥ 0 for each of {', '.join(sorted(names))}, and one above 0 at least"
            )
        return dict(given)

    def _performance(self) -> float:
        return chosen_metric(self._dense, self.metric)

    def _sensitivity(self, subject: Subject, curves: dict[str, dict[float, float]]) -> Sensitivity:
        layers = {group.name: group.layers for group in subject.space.groups}
        maximize = self.optimize_mode == "maximize"
        return Sensitivity(curves, self._performance(), layers, maximize)

    @contextmanager
    def _untrained(self) -> Iterator[None]:
        whole = self._trials.job
        self._trials.job = replace(whole, fine_tuner=None)
        try:
            yield
        finally:
            self._trials.job = whole

    def _write(self, found: Sensitivity) -> None:
        if self.experiment_data_dir is None:
            return
        folder = Path(self.experiment_data_dir)
        try:
            found.export(folder / "sensitivity.csv")
            found.export(folder / "sensitivity.json")
            if can_draw():
                found.plot(folder / "sensitivity.png")
        except OSError as error:
            raise StateError(f"experiment_data_dir: cannot be written: {error}") from error

    # -- what is wrong ---------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        own = ("sparsity_proportion_calc", "sparsity_per_iter", "acc_drop_threshold", "sparsities")
        resumed = None if self._resumed is None else self._resumed.performances
        given = {name: getattr(self, name) for name in own}
        return super()._arguments() | given | {"resume_sensitivity": resumed}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        step, threshold = self.sparsity_per_iter, self.acc_drop_threshold
        if step is not None and not (_is_share(step) and 0 < step < 1):
            problems.append(f"sparsity_per_iter: got {step!r}; expected one in (0, 1), or None")
        if threshold is not None and not (_is_share(threshold) and threshold > 0):
            problems.append(
                f"acc_drop_threshold: got {threshold!r}; expected a number above 0, such as 0.05"
            )
        missing = threshold is None and self.sparsity_proportion_calc is None
        if missing and self._needs_threshold:
            problems.append("acc_drop_threshold: got None; expected a number, such as 0.05")
        tried = self.sparsities
        if not isinstance(tried, (list, tuple)) or not tried:
            problems.append(f"sparsities: got {tried!r:.60}; expected a list of numbers in (0, 1)")
        elif not all(_is_share(each) and 0 < each < 1 for each in tried):
            problems.append(f"sparsities: got {tried!r:.60}; expected each in (0, 1)")
        if not (self.sparsity_proportion_calc is None or callable(self.sparsity_proportion_calc)):
            kind = type(self.sparsity_proportion_calc).__name__
            problems.append(f"sparsity_proportion_calc: got {kind}; expected a function")
        return problems


class _Analysis(SensitivityPruner):
    """The same without a target; a journal of its own."""

    _needs_threshold: ClassVar[bool] = False

    @property
    def _title(self) -> str:
        return "sensitivity analysis"


class _Call:
    """A user's function with further arguments, of a model; pickled by the function's name."""

    def __init__(
        self,
        function: Callable[..., Any] | None,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        model: nn.Module,
    ) -> None:
        assert function is not None, "_check_arguments asked for it"
        self._function = function
        self._args, self._kwargs = list(args or ()), dict(kwargs or {})
        self._places: list[int] = [i for i, each in enumerate(self._args) if each is model]
        self._names = [name for name, each in self._kwargs.items() if each is model]
        for place in self._places:
            self._args[place] = None
        self._kwargs |= dict.fromkeys(self._names)
        functools.update_wrapper(self, function)

    def __call__(self, model: nn.Module) -> Any:
        args = [model if i in self._places else each for i, each in enumerate(self._args)]
        kwargs = {**self._kwargs, **dict.fromkeys(self._names, model)}
        if not (self._places or self._names):
            args.insert(0, model)
        return self._function(*args, **kwargs)


def _named_alike(curves: Mapping[str, Mapping[float, float]], subject: Subject) -> Any:
    names = [group.name for group in subject.space.groups]
    if set(curves) != set(names):
        raise ConfigError(
            f"resume_sensitivity: got the layers {', '.join(sorted(curves))}; expected "
            f"{', '.join(names)}, which are the first of each coupled group"
        )
    return {name: dict(curves[name]) for name in names}


def _is_share(value: object) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]
