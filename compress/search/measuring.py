"""How good a candidate is: what runs where it is evaluated, and how its result is read."""

from __future__ import annotations

import math
import random
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import SearchError
from compress.evaluator import Evaluator
from compress.graph.run import eager, evaluating
from compress.measure.latency import stopwatch
from compress.unchanged import random_kept

_ALONE = threading.Lock()  # a cluster's worker may have threads, which share random numbers


@dataclass(frozen=True)
class Job:
    """What is done with every candidate; picklable where the user's functions are.

    Attributes:
        evaluator: its ``eval_fn`` scores; it trains where there is no ``fine_tuner``.
        fine_tuner: trains a model in place, before it is scored. Where it is a generator, what it
            yields says how good the model is so far.
        epochs: passes of ``evaluator.train``, in the place of a ``fine_tuner``.
        threads: of torch, so that sums come out the same wherever it runs.
        stop: ``stop(what was yielded so far)``: whether the rest is not worth the time.
    """

    evaluator: Evaluator
    fine_tuner: Callable[[nn.Module], Any] | None
    epochs: int
    threads: int
    stop: Callable[[Sequence[float]], bool] | None = None

    @property
    def trains(self) -> bool:
        return self.fine_tuner is not None or self.epochs > 0


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: a value or, of what the user's functions raised, the traceback.

    ``state`` is its state_dict after the training, where there was one; ``reports`` what the
    fine-tuner yielded. A candidate that was ``stopped`` was not scored.
    """

    value: Any
    state: dict[str, Tensor] | None
    seconds: float
    failure: str | None = None
    reports: tuple[float, ...] = ()
    stopped: bool = False


def carry_out(job: Job, model: nn.Module, seed: int) -> Outcome:
    """Train and score a candidate; random numbers, of which it has its own, go on as before."""
    threads = torch.get_num_threads()
    with _ALONE, random_kept(job.evaluator.train_loader), stopwatch() as elapsed:
        torch.set_num_threads(job.threads)
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            reports, stopped = _trained(job, model)
            if stopped:
                return Outcome(None, None, elapsed(), None, reports, True)
            state = model.state_dict() if job.trains else None
            return Outcome(_scored(job, model), state, elapsed(), None, reports)
        except Exception:  # of the user's functions, and told with all of its words
            return Outcome(None, None, elapsed(), traceback.format_exc())
        finally:
            torch.set_num_threads(threads)


def _scored(job: Job, model: nn.Module) -> Any:
    """What the evaluator returns; where nobody wants the copy after it, that may change it."""
    if job.trains:
        return job.evaluator.evaluate(model)
    assert job.evaluator.eval_fn is not None, "the search asked for it"
    with eager(), evaluating(model), torch.no_grad():
        return job.evaluator.eval_fn(model)


def _trained(job: Job, model: nn.Module) -> tuple[tuple[float, ...], bool]:
    """What the fine-tuner yielded, and whether it was stopped."""
    reports: list[float] = []
    if job.fine_tuner is None:
        if job.epochs:
            job.evaluator.train(model, job.epochs, progress=False)
        return (), False
    with torch.enable_grad():
        steps = job.fine_tuner(model)
        for report in steps if isinstance(steps, Iterator) else ():
            reports.append(chosen_metric(read_metrics(report), None))
            if job.stop is not None and job.stop(reports):
                return tuple(reports), True
    return tuple(reports), False


def read_metrics(value: Any) -> dict[str, float]:
    """What an evaluator returned, as numbers by name.

    A number is ``{"metric": number}``; of a tuple or list the names are "0", "1", ..., of a
    namedtuple its fields.

    Raises:
        SearchError: there is something else in it, or NaN.
    """
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        pairs = value._asdict().items()
    elif isinstance(value, (tuple, list)):
        pairs = enumerate(value)
    else:
        pairs = [("metric", value)]
    found = {str(name): _number(each, value) for name, each in pairs}
    if not found:
        raise SearchError(f"the evaluator returned an empty {type(value).__name__}; {_EXPECTED}")
    return found


def chosen_metric(metrics: Mapping[str, float], metric: str | int | None) -> float:
    """The one that counts.

    Raises:
        SearchError: none of this name, or several and none named, or it is NaN or infinite.
    """
    if metric is None and len(metrics) > 1:
        raise SearchError(
            f"the evaluator returned several numbers, {_listed(metrics)}; pass metric= the one "
            f"that counts, such as metric={_shown(next(iter(metrics)))}"
        )
    name = next(iter(metrics)) if metric is None else str(metric)
    if name not in metrics:
        raise SearchError(
            f"metric: got {metric!r}; the evaluator returned {_listed(metrics)}: pass one of these"
        )
    if not math.isfinite(metrics[name]):
        raise SearchError(
            f"the evaluator returned {metrics[name]} for {name!r}; expected a finite number: look "
            "at the data and the model, or return a number that says how bad it is"
        )
    return metrics[name]


_EXPECTED = "expected a number, or a tuple or dict of numbers with metric= naming the one"


def _number(value: Any, whole: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (Real, np.number)):
        return float(value)
    what = "None (is there a return?)" if whole is None else f"{value!r:.60}"
    raise SearchError(f"the evaluator returned {what}; {_EXPECTED}")


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{_shown(name)}: {value:g}" for name, value in metrics.items())


def _shown(name: str) -> str:
    return name if name.isdigit() else repr(name)


def changed_tensor(before: Mapping[str, Tensor], model: nn.Module) -> str:
    """The first entry of the state_dict that differs from ``before``; or ""."""
    now = model.state_dict()
    names: Sequence[str] = [*before, *(name for name in now if name not in before)]
    for name in names:
        if name not in now or name not in before or not _equal(before[name], now[name]):
            return name
    return ""


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return True  # extra state of any kind
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
