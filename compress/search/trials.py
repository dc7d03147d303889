"""Candidates evaluated as really small models, here or by workers, each one once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from compress.errors import SearchError, StateError
from compress.search.journal import Journal
from compress.search.measuring import Job, Outcome, carry_out, chosen_metric, read_metrics
from compress.search.space import Point
from compress.search.subject import Subject
from compress.search.workers import Task, Workers


@dataclass(frozen=True)
class Trial:
    """A candidate, evaluated.

    Attributes:
        number: in the order in which the search asked.
        stage: the search's round, episode or iteration.
        sparsities: by group.
        share: the fraction of the selected layers' weights that is masked.
        metrics: all that the evaluator returned, by name.
        performance: the one that counts.
        parameters: of the small model; where single weights are masked, those that are left.
        flops: of the small model, for the batch of the dummy input; None of a masked one.
        seconds: of training and evaluating it.
        reports: what the fine-tuner yielded.
        stopped: after these it was given up; its performance is the last of them.
    """

    number: int
    stage: int
    sparsities: dict[str, float]
    share: float
    metrics: dict[str, float]
    performance: float
    parameters: int
    flops: float | None
    seconds: float
    reports: list[float] = field(default_factory=list)
    stopped: bool = False


class Trials:
    """Evaluates what a search asks for, and keeps account.

    Args:
        job: what is done with each candidate.
        metric: which number of the evaluator's counts.
        journal: of what has been evaluated before.
        workers: who evaluates.
        seed: with a candidate's number, that of its random numbers.
        seen: called with every trial as soon as there is one.

    Attributes:
        done: all trials, by number.
    """

    def __init__(
        self,
        job: Job,
        metric: str | int | None,
        journal: Journal,
        workers: Workers,
        seed: int,
        seen: Callable[[Trial], None],
    ) -> None:
        self.job, self.metric = job, metric
        self.journal, self.workers, self.seed, self.seen = journal, workers, seed, seen
        self.done: list[Trial] = []

    def evaluate(
        self,
        subject: Subject,
        points: Sequence[Point],
        stage: int,
        rank: Callable[[Trial], float] | None = None,
    ) -> tuple[list[Trial], dict[str, Tensor] | None]:
        """The trials of some points, in their order.

        Args:
            rank: with it, the state of the trained candidate of the highest rank is returned, too.

        Raises:
            SearchError: a candidate's evaluation failed; what was ready before is in the journal.
        """
        first = len(self.done)
        found: dict[int, Trial] = {}
        for index, point in enumerate(points):
            known = self._known(first + index, point)
            if known is not None:
                found[index] = known
        best: tuple[float, int] | None = None
        state = None
        sizes: dict[int, tuple[int, float | None]] = {}
        for index, outcome in self._run(subject, points, found, first, sizes):
            trial = self._trial(points[index], stage, first + index, outcome, sizes[index])
            self.journal.add(str(trial.number), asdict(trial))
            found[index] = trial
            self.seen(trial)
            if rank is not None and (best is None or (rank(trial), -index) > best):
                best, state = (rank(trial), -index), outcome.state
        trials = [found[index] for index in range(len(points))]
        self.done += trials
        if rank is not None and trials:
            top = max(range(len(trials)), key=lambda index: (rank(trials[index]), -index))
            if best is None or -best[1] != top:  # evaluated before a restart
                state = self._again(subject, points[top], trials[top])
        return trials, state

    def measure(
        self,
        model: nn.Module,
        sparsities: Mapping[str, float],
        share: float,
        stage: int,
        flops: float | None,
    ) -> Trial:
        """The trial of a model that is there already, and is not trained for it."""
        number = len(self.done)
        entry = self.journal.get(str(number))
        if entry is not None:
            trial = _trial_of(entry)
        else:
            job = replace(self.job, fine_tuner=None, epochs=0)
            outcome = carry_out(job, deepcopy(model), self.seed + number)
            metrics = self._metrics(outcome, f"{number}, the model of round {stage}")
            trial = Trial(
                number=number,
                stage=stage,
                sparsities=dict(sparsities),
                share=share,
                metrics=metrics,
                performance=chosen_metric(metrics, self.metric),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                flops=flops,
                seconds=outcome.seconds,
            )
            self.journal.add(str(number), asdict(trial))
        self.done.append(trial)
        self.seen(trial)
        return trial

    def recall(self, count: int) -> None:
        """Take the first trials from the journal, as a state that was saved says what they led to.

        Raises:
            StateError: they are not all there.
        """
        entries = [self.journal.get(str(number)) for number in range(count)]
        if None in entries:
            raise StateError(
                f"{self.journal.path}: candidate {entries.index(None)} is missing, and the state "
                "beside it was saved after it; remove both to begin anew"
            )
        self.done = [_trial_of(entry) for entry in entries if entry is not None]
        for trial in self.done:
            self.seen(trial)

    def _known(self, number: int, point: Point) -> Trial | None:
        entry = self.journal.get(str(number))
        if entry is None:
            return None
        trial = _trial_of(entry)
        if trial.sparsities != dict(point.sparsities):
            raise StateError(
                f"{self.journal.path}: candidate {number} was another one than now, though model, "
                "config_list and arguments are the same: an earlier result would not be repeated "
                "(another release, or an own pruner that draws at random); remove the file to "
                "begin anew"
            )
        self.seen(trial)
        return trial

    def _run(
        self,
        subject: Subject,
        points: Sequence[Point],
        known: dict[int, Trial],
        first: int,
        sizes: dict[int, tuple[int, float | None]],
    ) -> Iterator[tuple[int, Outcome]]:
        def maker(index: int) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                small = subject.small(points[index])
                parameters = subject.parameters(small)
                sizes[index] = parameters, subject.flops(small)
                return subject.trainable(small) if self.job.trains else small.model

            return make

        todo = [index for index in range(len(points)) if index not in known]
        tasks = (Task(i, maker(i), self.seed + first + i, f"candidate {first + i}") for i in todo)
        return self.workers.run(self.job, tasks)

    def _trial(
        self,
        point: Point,
        stage: int,
        number: int,
        outcome: Outcome,
        size: tuple[int, float | None],
    ) -> Trial:
        metrics = self._metrics(outcome, f"{number} ({_shown(point)})")
        reports = list(outcome.reports)
        return Trial(
            number=number,
            stage=stage,
            sparsities=dict(point.sparsities),
            share=point.share,
            metrics=metrics,
            performance=reports[-1] if outcome.stopped else chosen_metric(metrics, self.metric),
            parameters=size[0],
            flops=size[1],
            seconds=outcome.seconds,
            reports=reports,
            stopped=outcome.stopped,
        )

    def _metrics(self, outcome: Outcome, candidate: str) -> dict[str, float]:
        if outcome.failure is not None:
            raise SearchError(
                f"candidate {candidate} could not be trained and evaluated; the model is as it "
                f"was. What was raised:\n{outcome.failure}"
            )
        if outcome.stopped:
            return {}
        try:
            metrics = read_metrics(outcome.value)
            chosen_metric(metrics, self.metric)
        except SearchError as error:
            raise SearchError(f"candidate {candidate}: {error}") from error
        return metrics

    def _again(self, subject: Subject, point: Point, trial: Trial) -> dict[str, Tensor] | None:
        """The trained state of a candidate that was evaluated before the search was stopped."""
        candidate = subject.trainable(subject.small(point))
        return carry_out(self.job, candidate, self.seed + trial.number).state


def _trial_of(entry: Mapping[str, Any]) -> Trial:
    return Trial(**{name: value for name, value in entry.items() if name != "id"})


def _shown(point: Point) -> str:
    listed = [f"{name}: {sparsity:.3f}" for name, sparsity in point.sparsities.items()]
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
