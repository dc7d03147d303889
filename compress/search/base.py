"""What all searches do: measure the dense model, try candidates, mask the model as the best one."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import Targets
from compress.errors import ConfigError, SearchError
from compress.evaluator import Evaluator, as_evaluator
from compress.graph.run import eager, evaluating
from compress.masks import Masks, applied_masks, suspend_masks
from compress.progress import progress_bar
from compress.pruners.base import Pruner
from compress.pruners.data import DataPruner, is_count
from compress.pruners.export import MaskedModel
from compress.schedule.bases import base_arguments, base_type
from compress.schedule.state import described, structure
from compress.search.journal import Journal
from compress.search.measuring import Job, changed_tensor, chosen_metric, read_metrics
from compress.search.results import SearchResult, write_results
from compress.search.space import Point
from compress.search.subject import COSTS, Subject
from compress.search.trials import Trial, Trials
from compress.search.workers import Workers
from compress.speedup.history import remember
from compress.speedup.plan import Plan
from compress.speedup.surgery import apply_plan
from compress.unchanged import put_values, random_kept, values_of


@dataclass(frozen=True)
class Found:
    """What a search takes: a trial and its masks.

    Where it trained, also the weights by path; where it shrank the model, the plans of that.
    """

    trial: Trial
    masks: Masks
    values: Mapping[str, Tensor] | None = None
    plans: Sequence[Plan] = ()


def take(
    model: nn.Module,
    masks: Masks,
    values: Mapping[str, Tensor] | None = None,
    plans: Sequence[Plan] = (),
) -> None:
    """Shrink a model by plans, then give it values, then masks; after an error it is as before."""
    suspended = suspend_masks(model)
    undo: list[Callable[[], None]] = []
    before = {} if values is None else values_of(model)
    try:
        undo += (apply_plan(model, plan, {}) for plan in plans)
        put_values(model, values or {})
        masks.apply(model)
    except BaseException:
        for step in reversed(undo):
            step()
        put_values(model, before)
        suspended.restore()
        raise
    for plan in plans:
        remember(model, plan)


class SearchPruner(MaskedModel):
    """Finds out by trying how much of each layer can go.

    A candidate is a sparsity for each group of layers that can only shrink together. The one-shot
    pruner says which of their filters go; the candidate is evaluated as the small model that
    `ModelSpeedup` makes of it. The user's model is masked only at the end, as the best one.

    Args:
        model: the model to prune; plain or masked.
        config_list: which layers, and the sparsity of all of them together: see `compress.config`.
            Entries must agree in it.
        evaluator: ``evaluator(model)`` -> a number, or several (a tuple, a dict); or an `Evaluator`
            with an ``eval_fn``. It gets copies.
        optimize_mode: "maximize" or "minimize" that number.
        metric: which of several numbers: the key, or the position.
        base_algo: the one-shot pruner: "l1", "l2", "fpgm", "level", ..., or a class.
        pruning_params: further arguments of it.
        dummy_input: an input of the model; by default that of the evaluator's first call.
        cost: what the sparsity is a fraction of: "sparsity" (the selected layers' weights),
            "params", "flops", "memory" or "latency" of the whole model.
        fine_tuner: ``fine_tuner(model)`` trains each candidate before it is evaluated. It may be a
            generator that yields how good the model is after each epoch.
        experiment_data_dir: a folder for the journal, from which a search that was stopped goes on,
            and for search_history.csv, search_result.json and a plot. None: nothing is written.
        executor: a `concurrent.futures.Executor` that evaluates candidates, or a function that
            makes one; None is this process. It changes no result.
        seed: of the search and, with its number, of each candidate.
        progress: whether a terminal sees how far it is.

    Attributes:
        result: `SearchResult`, after `compress`.

    Raises:
        ConfigError: lists what is wrong with the config_list or the other arguments.
    """

    result: SearchResult | None = None
    _leading: Trial | None = None
    _uniform_sparsities: Mapping[str, float] | None = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        *,
        optimize_mode: str = "maximize",
        metric: str | int | None = None,
        base_algo: str | type[Pruner] = "l1",
        pruning_params: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        cost: str = "sparsity",
        fine_tuner: Callable[[nn.Module], Any] | None = None,
        experiment_data_dir: str | os.PathLike[str] | None = None,
        executor: Executor | Callable[[], Executor] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
        self.model = model
        self.kind = base_type(base_algo, "base_algo")
        self.evaluator = as_evaluator(evaluator, None, None, None)
        self.optimize_mode, self.metric, self.cost = optimize_mode, metric, cost
        self.dummy_input, self.fine_tuner = dummy_input, fine_tuner
        self.experiment_data_dir, self.seed, self.progress = experiment_data_dir, seed, progress
        self.pruning_params = dict(pruning_params or {})
        self._workers = Workers(executor)
        self._check_arguments()
        self.config_list = [dict(entry) for entry in config_list]
        self.target = _overall(self.kind.resolve(model, config_list))
        self._masks = applied_masks(model)
        self._trials: Trials

    @property
    def masks(self) -> Masks:
        """A copy of the masks that the model has now."""
        return Masks(self._masks)

    def compress(self) -> tuple[nn.Module, Masks]:
        """Search, and mask the model as the best candidate; a second call changes nothing.

        After an error the model is as it was.

        Returns:
            The model that was given, and a copy of its masks.

        Raises:
            ConfigError: the target cannot be reached.
            SearchError: the evaluator raises, returns no number, or changes the model.
            StateError: experiment_data_dir has another search, or cannot be written.
            CompressError: what the one-shot pruner and the speedup raise.
        """
        if self.result is None:
            with self._searching() as subject:
                found = self._search(subject)
            result = self._result(found.trial)
            write_results(result, self.experiment_data_dir)
            take(self.model, found.masks, found.values, found.plans)
            self._masks, self.result = found.masks, result
        return self.model, self.masks

    # -- what a search is made of ----------------------------------------------------------

    @abstractmethod
    def _search(self, subject: Subject) -> Found:
        """Try candidates; the one to take."""

    def _arguments(self) -> dict[str, Any]:
        """What decides about the course of the search, for the journal's key."""
        return {
            "optimize_mode": self.optimize_mode,
            "metric": self.metric,
            "base_algo": self.kind,
            "pruning_params": self.pruning_params,
            "cost": self.cost,
            "fine_tuner": self.fine_tuner,
            "evaluator": self.evaluator and self.evaluator.eval_fn,
        }

    def _gain(self, trial: Trial) -> float:
        """A trial's performance, where more is better."""
        return trial.performance if self.optimize_mode == "maximize" else -trial.performance

    def _best(self, trials: Sequence[Trial]) -> Trial:
        """Of equal ones the first; none that was stopped, if there is another."""
        return max(trials, key=lambda t: (not t.stopped, self._gain(t), -t.number))

    def _evaluate(self, subject: Subject, points: Sequence[Point], stage: int = 0) -> list[Trial]:
        return self._trials.evaluate(subject, points, stage)[0]

    def _uniform(self, subject: Subject, target: float | None = None) -> Point:
        """The same sparsity for all groups."""
        profile = {group.name: 1.0 for group in subject.space.groups}
        point = subject.scaled(profile, self.target if target is None else target, self.cost)
        if target in (None, self.target):
            self._uniform_sparsities = point.sparsities
        return point

    def _planned(self) -> int | None:
        """How many candidates there will be, if that is known before."""
        return None

    def _subject(self, model: nn.Module) -> Subject:
        """Of a copy of the model, for which it is taken over."""
        given = self._base_arguments()
        return Subject(model, self.kind, self.config_list, given, self.dummy_input)

    def _renewed(self, subject: Subject, masks: Masks, values: Mapping[str, Tensor]) -> Subject:
        """The subject with a winner's masks and weights, from which its scores follow."""
        put_values(subject.model, values)
        masks.apply(subject.model)
        return self._subject(subject.model)

    def _base_arguments(self) -> dict[str, Any]:
        """Of the one-shot pruner."""
        given = base_arguments(self.kind, self.pruning_params, self.evaluator, self.dummy_input)
        if "dependency_aware" in self.kind.modes:
            given.setdefault("mode", "dependency_aware")
            given.setdefault("dummy_input", self.dummy_input)
        return given

    @property
    def _title(self) -> str:
        """What a user calls it."""
        return type(self).__name__

    # -- the session -----------------------------------------------------------------------

    @contextmanager
    def _searching(self) -> Iterator[Subject]:
        """The journal, the workers, the dense model's performance, and what to search in."""
        assert self.evaluator is not None, "_check_arguments asked for it"
        self.key = self._key()
        journal = Journal(self.experiment_data_dir, self.key)
        job = Job(self.evaluator, self.fine_tuner, 0, torch.get_num_threads())
        name, replayed = self._title, sum(entry.isdigit() for entry in journal)
        try:
            with eager(), progress_bar(name, self._planned(), self.progress) as advance:

                def seen(trial: Trial) -> None:
                    advance(self._standing(trial), known=trial.number < replayed)

                self._measure_dense(journal)
                self._trials = Trials(job, self.metric, journal, self._workers, self.seed, seen)
                subject = self._subject(deepcopy(self.model))
                self._space = subject.space
                self._dense_flops = subject.cost(subject.space.point({}), "flops")
                yield subject
        finally:
            self._workers.close()
            journal.close()

    def _key(self) -> dict[str, Any]:
        state = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                state.update(name.encode())
                content = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
                state.update(content.numpy().tobytes())
        return {
            "pruner": type(self).__qualname__,
            "model": structure(self.model),
            "weights": state.hexdigest(),
            "config_list": described(self.config_list),
            "arguments": described(self._arguments()),
            "seed": self.seed,
        }

    def _measure_dense(self, journal: Journal) -> None:
        """Evaluate the model as it is; see its input, and that the evaluator leaves it alone."""
        assert self.evaluator is not None and self.evaluator.eval_fn is not None
        known = journal.get("dense")
        if known is not None and self.dummy_input is not None:
            self._dense = known["metrics"]
            return
        copy, seen = deepcopy(self.model), []
        before = {n: t.detach().clone() for n, t in copy.state_dict().items() if _is_tensor(t)}
        hook = copy.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)) if not seen else None,
            with_kwargs=True,
        )
        try:
            with random_kept(self.evaluator.train_loader), evaluating(copy), torch.no_grad():
                torch.manual_seed(self.seed)
                value = self.evaluator.eval_fn(copy)
        except Exception as error:
            raise SearchError(
                f"the evaluator raised on the model as it is: {type(error).__name__}: {error}; it "
                "must run on a copy of the model before anything can be searched"
            ) from error
        finally:
            hook.remove()
        self._dense = read_metrics(value)
        chosen_metric(self._dense, self.metric)
        changed = changed_tensor(before, copy)
        if changed:
            raise SearchError(
                f"the evaluator changed {changed!r} of the model that it got; expected it to "
                "measure only: put model.eval() and torch.no_grad() into it, and what trains or "
                "recalibrates into fine_tuner="
            )
        self._take_input(seen)
        if known is None:
            journal.add("dense", {"metrics": self._dense})

    def _take_input(self, seen: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        if self.dummy_input is not None:
            return
        if not seen or (seen[0][0] and seen[0][1]):
            why = "with positional and keyword arguments" if seen else "never"
            raise SearchError(
                f"dummy_input: got None, and the evaluator called the model {why}; pass an input "
                "of the model, such as torch.rand(1, 3, 224, 224)"
            )
        args, kwargs = seen[0]
        self.dummy_input = kwargs or args

    def _standing(self, trial: Trial) -> str:
        """For the progress display: how good the best is, with one more trial."""
        self._leading = self._best([trial, *([self._leading] if self._leading else [])])
        dense = chosen_metric(self._dense, self.metric)
        return f"best {self._leading.performance:.4g} (dense {dense:.4g})"

    def _result(self, best: Trial) -> SearchResult:
        dense, trials = chosen_metric(self._dense, self.metric), tuple(self._trials.done)
        return SearchResult(
            pruner=type(self).__name__,
            dense=dense,
            best=best,
            trials=trials,
            config_list=self._space.config_list(best.sparsities),
            maximize=self.optimize_mode == "maximize",
            dense_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            dense_flops=self._dense_flops,
            uniform=next(
                (t.number for t in trials if t.sparsities == self._uniform_sparsities), None
            ),
        )

    # -- what is wrong ---------------------------------------------------------------------

    def _check_arguments(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(f"{self._title} cannot be made:", problems)

    def _problems(self) -> list[str]:
        problems = []
        if self.evaluator is None or self.evaluator.eval_fn is None:
            problems.append(
                "evaluator: got none that scores; expected a function of a model that returns a "
                "number, or an Evaluator with an eval_fn"
            )
        for name, given, expected in (
            ("optimize_mode", self.optimize_mode, ("maximize", "minimize")),
            ("cost", self.cost, COSTS),
        ):
            if given not in expected:
                problems.append(f"{name}: got {given!r}; expected one of {', '.join(expected)}")
        if self.fine_tuner is not None and not callable(self.fine_tuner):
            problems.append(
                f"fine_tuner: got {type(self.fine_tuner).__name__}; expected a function of a model"
            )
        if not is_count(self.seed, 0):
            problems.append(f"seed: got {self.seed!r}; expected a whole number ≥ 0")
        single = "dependency_aware" not in self.kind.modes
        if single and self.cost in COSTS[1:]:
            problems.append(
                f"cost={self.cost!r}: {self.kind.__name__} masks single weights, which saves none; "
                'pass cost="sparsity", or a pruner of whole filters'
            )
        if issubclass(self.kind, DataPruner) and not self._measures():
            problems.append(
                f"evaluator: {self.kind.__name__} looks at data: pass an Evaluator with a "
                "train_loader, a criterion and an eval_fn"
            )
        return problems

    def _measures(self) -> bool:
        return self.evaluator is not None and self.evaluator.train_loader is not None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _overall(targets: Targets) -> float:
    """The one sparsity of a config_list.

    Raises:
        ConfigError: its entries have several.
    """
    found = {target.sparsity for target in targets if target.sparsity is not None}
    found |= {group.sparsity for group in targets.groups}
    if len(found) != 1:
        raise ConfigError(
            f"config_list: got the sparsities {', '.join(f'{s:g}' for s in sorted(found))}; "
            "expected one, that of all selected layers together, which the search distributes; "
            "search in one model after the other for several"
        )
    return found.pop()
