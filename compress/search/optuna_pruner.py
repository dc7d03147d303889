"""Search by any of Optuna's samplers: the baseline that others have to beat."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.errors import ConfigError, SearchError, StateError
from compress.evaluator import Evaluator
from compress.pruners.data import is_count
from compress.schedule.state import described, digest
from compress.search.base import Found, SearchPruner
from compress.search.space import Point
from compress.search.subject import Subject
from compress.search.trials import Trial

if TYPE_CHECKING:
    import optuna

_OWNER = "compress_search"  # of a trial in a storage that several searches share


class OptunaPruner(SearchPruner):
    """Distributes a sparsity over the layers as one of Optuna's samplers proposes.

    Akiba et al. 2019, Optuna: A Next-generation Hyperparameter Optimization Framework; by default
    its tree-structured Parzen estimator (Bergstra et al. 2011). A proposal is a number in [0, 1]
    for each group; the sparsities have its proportions, and are scaled to the target, so that
    none is wasted on a model too large or too small. The first candidate is the uniform one.
    ``sampler=optuna.samplers.RandomSampler(seed=0)`` is random search.

    Args:
        model, config_list, evaluator, **arguments: as `SearchPruner`.
        n_trials: candidates in all; started again in the same experiment_data_dir with more, a
            search goes on.
        batch_size: candidates that are proposed without knowing of each other's performance, and
            evaluated together, so that so many workers are of use.
        sampler: an ``optuna.samplers.BaseSampler``; TPE with this search's seed, by default.
        pruner: an ``optuna.pruners.BasePruner``, which gives up candidates by what the fine-tuner
            yields after each epoch. It compares with the candidates of earlier batches.
        storage: where Optuna keeps the study: the URL of a database, the path of a journal file, or
            a storage of Optuna's. Searches on several machines that share it (each with its own
            seed and folder) learn from each other's candidates. None: in memory, as the journal in
            experiment_data_dir is enough to go on.
        study_name: in the storage; by default one that follows from the model and the config_list.

    Attributes:
        study: ``optuna.study.Study``, after `compress`, with what all searches found.
    """

    study: optuna.study.Study | None = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        *,
        n_trials: int = 100,
        batch_size: int = 1,
        sampler: optuna.samplers.BaseSampler | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
        study_name: str | None = None,
        **arguments: Any,
    ) -> None:
        self.n_trials, self.batch_size = n_trials, batch_size
        self.sampler, self.pruner = sampler, pruner
        self.storage, self.study_name = storage, study_name
        super().__init__(model, config_list, evaluator, **arguments)

    def _search(self, subject: Subject) -> Found:
        self._uniform(subject)  # an impossible target is told before anything is stored
        with _quiet():
            self.study = self._opened()
            owner = self._owner()
            mine = [t for t in self.study.get_trials() if t.user_attrs.get(_OWNER) == owner]
            points: list[Point] = []
            found: list[Trial] = []
            for first in range(0, self.n_trials, self.batch_size):
                batch = range(first, min(first + self.batch_size, self.n_trials))
                asked = self._asked(subject, batch, mine, owner)
                points += (subject.scaled(t.params, self.target, self.cost) for t in asked)
                trials = self._tried(subject, points[first:], first // self.batch_size)
                for each, trial in zip(asked, trials, strict=True):
                    _tell(self.study, each, trial)
                found += trials
            best = self._best(found)
        return Found(best, subject.masks(points[best.number]))

    def _planned(self) -> int:
        return self.n_trials

    def _tried(self, subject: Subject, points: Sequence[Point], stage: int) -> list[Trial]:
        """The trials of a batch, some of which the pruner may give up."""
        if self.pruner is None:
            return self._evaluate(subject, points, stage)
        assert self.study is not None, "it is open"
        done = [t for t in self.study.get_trials() if t.state.is_finished()]
        stop = _Stop(self.pruner, done, self.study.direction)
        whole = self._trials.job
        self._trials.job = replace(whole, stop=stop)
        trials = self._evaluate(subject, points, stage)
        self._trials.job = whole
        if not any(trial.reports for trial in trials):
            raise SearchError(
                "pruner: fine_tuner yields nothing that it could judge by; make fine_tuner a "
                "generator: after each epoch, yield how good the model is"
            )
        return trials

    # -- the study -------------------------------------------------------------------------

    def _opened(self) -> optuna.study.Study:
        """The study, new or from the storage."""
        import optuna

        same = digest({**self.key, "seed": None, "arguments": described(super()._arguments())})
        where = "memory" if self.storage is None else self.storage
        try:
            study = optuna.create_study(
                storage=_storage(self.storage),
                sampler=self.sampler,
                pruner=self.pruner,
                study_name=self.study_name or f"compress-{same[:12]}",
                direction=optuna.study.StudyDirection[self.optimize_mode.upper()],
                load_if_exists=True,
            )
            of = study.user_attrs.get("compress")
            if of is None and not study.get_trials():
                study.set_user_attr("compress", same)
                of = same
        except Exception as error:
            raise StateError(
                f"storage: {where}: the study cannot be opened: {type(error).__name__}: {error}"
            ) from error
        if of != same:
            raise StateError(
                f"study_name: {where} has the study {study.study_name!r} of something else "
                "(another model, config_list, evaluator or argument); pass another study_name"
            )
        return study

    def _owner(self) -> str:
        """What this search's trials are known by in the study, also after it was killed."""
        journal = self._trials.journal
        known = journal.get("owner")
        if known is None:
            journal.add("owner", {"owner": secrets.token_hex(8)})
            known = journal.get("owner")
        assert known is not None, "it has just been added"
        return str(known["owner"])

    def _asked(
        self,
        subject: Subject,
        batch: range,
        mine: Sequence[optuna.trial.FrozenTrial],
        owner: str,
    ) -> list[optuna.trial.Trial]:
        """The proposals of a batch, of which those that an earlier run asked for are known."""
        import optuna

        assert self.study is not None, "it is open"
        names = [group.name for group in subject.space.groups]
        space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        if self.sampler is None:  # of the batch alone: there is no state to be saved
            number = random.Random(f"{self.seed} {batch.start}").getrandbits(32)
            self.study.sampler = optuna.samplers.TPESampler(seed=number)
        if not self.study.get_trials():
            self.study.enqueue_trial(dict.fromkeys(names, 0.5))
        asked = []
        for index in batch:
            if index < len(mine):
                asked.append(optuna.trial.Trial(self.study, mine[index]._trial_id))
            else:
                asked.append(self._ask(index, space, owner))
        return asked

    def _ask(self, index: int, space: dict[str, Any], owner: str) -> optuna.trial.Trial:
        """One proposal; what an earlier run asked for is repeated, whatever the sampler says."""
        import optuna

        assert self.study is not None, "it is open"
        journal, name = self._trials.journal, f"asked {index}"
        known = journal.get(name)
        trial = self.study.ask(space)
        if known is not None and known["params"] != trial.params:  # the sampler has no fixed seed
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(known["params"])
            trial = self.study.ask(space)
        trial.set_user_attr(_OWNER, owner)
        if known is None:
            journal.add(name, {"params": trial.params})
        return trial

    # -- what is wrong ---------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        own = ("batch_size", "sampler", "pruner")  # n_trials may become more
        return super()._arguments() | {name: getattr(self, name) for name in own}

    def _problems(self) -> list[str]:
        if find_spec("optuna") is None:
            raise ConfigError(
                "OptunaPruner needs optuna, which is not installed here: pip install "
                "'compress-torch[search]'"
            )
        import optuna

        problems = super()._problems()
        for name in ("n_trials", "batch_size"):
            if not is_count(getattr(self, name), 1):
                problems.append(f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ 1")
        kinds: tuple[tuple[str, Any, type, str], ...] = (
            ("sampler", self.sampler, optuna.samplers.BaseSampler, "one of optuna.samplers"),
            ("pruner", self.pruner, optuna.pruners.BasePruner, "one of optuna.pruners"),
            ("study_name", self.study_name, str, "a string"),
        )
        for name, given, kind, expected in kinds:
            if given is not None and not isinstance(given, kind):
                problems.append(f"{name}: got {given!r:.60}; expected {expected}")
        storages = (str, os.PathLike, optuna.storages.BaseStorage)
        if self.storage is not None and not isinstance(self.storage, storages):
            problems.append(
                f"storage: got {self.storage!r:.60}; expected the URL of a database, the path of a "
                "journal file, or one of optuna.storages"
            )
        if self.pruner is not None and self.fine_tuner is None:
            problems.append(
                "pruner: got one without a fine_tuner; pass a generator as fine_tuner that yields "
                "how good the model is after each epoch"
            )
        return problems


@dataclass(frozen=True)
class _Stop:
    """Optuna's decision about a candidate, wherever that is trained.

    It is made in a study in memory, with the trials that were done when the batch began, so that it
    depends neither on the workers nor on who is ready first.
    """

    pruner: optuna.pruners.BasePruner
    done: list[optuna.trial.FrozenTrial]
    direction: optuna.study.StudyDirection

    def __call__(self, reports: Sequence[float]) -> bool:
        import optuna

        with _quiet():
            study = optuna.create_study(pruner=self.pruner, direction=self.direction)
            study.add_trials(self.done)
            return _judged(study.ask(), reports)


def _judged(trial: optuna.trial.Trial, reports: Sequence[float]) -> bool:
    """Whether to give up after these; some pruners keep in the trial what they said at each."""
    given_up = False
    for step, value in enumerate(reports):
        trial.report(value, step)
        given_up = trial.should_prune()
    return given_up


def _tell(study: optuna.study.Study, asked: optuna.trial.Trial, trial: Trial) -> None:
    from optuna.trial import TrialState

    if study._storage.get_trial(asked._trial_id).state.is_finished():
        return  # before this search was begun again
    _judged(asked, trial.reports)
    if trial.stopped:
        study.tell(asked, state=TrialState.PRUNED)
    else:
        study.tell(asked, trial.performance)


def _storage(given: Any) -> Any:
    """A path becomes a journal file of Optuna's."""
    if isinstance(given, os.PathLike) or (isinstance(given, str) and "://" not in given):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(os.fspath(given)))
    return given


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every trial, and so does the progress display."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
