"""Where candidates are evaluated: in this process, or by any `concurrent.futures.Executor`."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.errors import ConfigError, SearchError
from compress.search.measuring import Job, Outcome, carry_out

_IN_FLIGHT = 32  # small models that wait for workers at the same time, at most
_FORKED = (
    "torch cannot train in a fork of a process that has trained on some device: pass "
    'ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")), or "forkserver"'
)
_TRIES = 3  # of a candidate whose worker dies


@dataclass(frozen=True)
class Task:
    """A candidate to be evaluated; its model is made when its turn comes.

    Attributes:
        index: of the task, for the caller.
        make: gives the small model, which is nobody else's.
        seed: of its random numbers.
        name: for messages.
    """

    index: int
    make: Callable[[], nn.Module]
    seed: int
    name: str


@dataclass(frozen=True)
class _Order:
    """What is sent for a task, ready to be sent again."""

    index: int
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Workers:
    """Evaluates tasks; the results do not depend on who does it, nor on how many do.

    A candidate whose worker dies is sent again, alone, so that no other is blamed for it. Models
    and the user's functions are pickled; a model on cuda comes up on the same device in the worker.
    Threads of a cluster's worker draw of Python's ``random``, too: what a fine-tuner draws there
    should be of torch or numpy.

    Args:
        executor: None: in this process. An executor is used as it is, and left open; where its
            workers die for good, the rest is done here. A function that returns one is called
            again then.
    """

    def __init__(self, executor: Executor | Callable[[], Executor] | None) -> None:
        _check(executor)
        self._given = executor
        self._executor: Executor | None = executor if isinstance(executor, Executor) else None
        self._dead = False  # the workers of the executor
        self._lost = False  # the executor, which was handed in, for good

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[int, Outcome]]:
        """Index and outcome of each task, in the order in which they are ready.

        Raises:
            SearchError: a task cannot be sent to the workers, or they die of it.
        """
        if self._given is None:
            for task in tasks:
                yield task.index, carry_out(job, task.make(), task.seed)
            return
        waiting: dict[Future[Any], _Order] = {}
        try:
            packed = _packed_job(job, self._opened())
            for task in tasks:
                refused = self._send(_order(job, packed, task), waiting)
                limit = min(getattr(self._executor, "_max_workers", _IN_FLIGHT) + 1, _IN_FLIGHT)
                if refused or len(waiting) >= limit:
                    yield from self._ready(job, waiting, refused)
            while waiting:
                yield from self._ready(job, waiting)
        except BaseException:
            self._abandon(waiting)
            raise

    def close(self) -> None:
        """End the workers that were made here."""
        if self._executor is not None and self._executor is not self._given:
            self._executor.shutdown()
            self._executor = None

    # -- sending and waiting ---------------------------------------------------------------

    def _opened(self) -> Executor:
        if self._executor is None:
            assert callable(self._given), "checked by the constructor"
            made = self._given()
            if not isinstance(made, Executor):
                raise SearchError(
                    f"executor: the function returned a {type(made).__name__}; expected a "
                    "concurrent.futures.Executor"
                )
            _check(made)
            self._executor = made
        return self._executor

    def _send(self, order: _Order, waiting: dict[Future[Any], _Order]) -> list[_Order]:
        """Nothing, or the order, where the workers are dead."""
        if self._lost:
            return [order]
        try:
            waiting[self._opened().submit(order.function, *order.arguments)] = order
        except BrokenExecutor:
            self._dead = True
            return [order]
        except RuntimeError as error:
            raise SearchError(f"executor: takes no more candidates: {error}") from error
        return []

    def _ready(
        self, job: Job, waiting: dict[Future[Any], _Order], refused: Iterable[_Order] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """What is ready; of workers that died, everything that they had, tried again."""
        again = list(refused)
        done = wait(waiting, return_when=FIRST_COMPLETED).done if not again else set(waiting)
        while done:
            for future in done:
                order = waiting.pop(future)
                outcome = self._outcome(job, order, future)
                if outcome is None:
                    again.append(order)
                else:
                    yield order.index, outcome
            # A pool dies as a whole, and what else it had fails at once; a cluster's goes on.
            done = set(waiting) if again else set()
        for order in sorted(again, key=lambda order: order.index):
            yield order.index, self._alone(job, order)

    def _alone(self, job: Job, order: _Order) -> Outcome:
        """The outcome of an order whose worker died, with nothing else under way."""
        for _ in range(1, _TRIES):
            waiting: dict[Future[Any], _Order] = {}
            if self._dead and not self._renewed():
                return _unpacked(order.function(*order.arguments))
            try:
                if not self._send(order, waiting):
                    (future,) = waiting
                    outcome = self._outcome(job, order, future)
                    if outcome is not None:
                        return outcome
            except BaseException:
                self._abandon(waiting)
                raise
        raise SearchError(
            f"{order.name}: {_TRIES} workers died of it, one after the other; look for a crash or "
            "too little memory (fewer workers, smaller batches), or search without executor= to "
            "see where; what is done is in the journal, if there is an experiment_data_dir"
        )

    def _outcome(self, job: Job, order: _Order, future: Future[Any]) -> Outcome | None:
        """What became of an order; None where its worker died."""
        try:
            return _unpacked(future.result())
        except BrokenExecutor:
            self._dead = True
            return None
        except (CancelledError, ConnectionError) as error:
            raise SearchError(
                f"executor: it was closed before {order.name} was evaluated ({error!r}); keep it "
                "open until compress() is done"
            ) from error
        except Exception as error:
            if type(error).__name__ == "KilledWorker":  # dask's, and dask has other workers
                return None
            try:
                pickle.dumps(job)
            except Exception as reason:
                raise SearchError(_unpicklable(reason)) from error
            raise SearchError(
                f"the workers cannot evaluate {order.name}: {type(error).__name__}: {error}"
            ) from error

    def _renewed(self) -> bool:
        """Living workers for those that died; False: this process has to do it."""
        if self._executor is not self._given:
            self.close()
            self._dead = False
        elif not self._lost:
            self._lost = True
            warnings.warn(
                "executor: its workers died, and it cannot be begun again: the other candidates "
                "are evaluated in this process, one after the other; pass a function that makes "
                "an executor (executor=lambda: ProcessPoolExecutor(4)), which is called again",
                RuntimeWarning,
                stacklevel=2,
            )
        return not self._lost

    def _abandon(self, waiting: dict[Future[Any], _Order]) -> None:
        """Leave no work behind that nobody waits for."""
        for future in waiting:
            future.cancel()
        if self._executor is not None and self._executor is not self._given:
            for process in list((getattr(self._executor, "_processes", None) or {}).values()):
                process.terminate()
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _check(executor: object) -> None:
    """Raise ConfigError for what cannot evaluate candidates."""
    if isinstance(executor, ThreadPoolExecutor):
        raise ConfigError(
            "executor: got a ThreadPoolExecutor; threads share their process's random numbers "
            "and modes: pass a ProcessPoolExecutor, or a cluster's"
        )
    if not (executor is None or isinstance(executor, Executor) or callable(executor)):
        raise ConfigError(
            f"executor: got {type(executor).__name__}; expected a concurrent.futures.Executor, "
            "or a function that makes one"
        )
    context = getattr(executor, "_mp_context", None)
    if context is None or context.get_start_method() != "fork":
        return
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    if cuda or threads > 1:
        raise ConfigError(
            "executor: its processes are forked from this one, and would hang, as it uses "
            f"{'cuda' if cuda else f'{threads} torch threads'}; pass ProcessPoolExecutor(n, "
            'mp_context=multiprocessing.get_context("spawn"))'
            + ("" if cuda else ", or call torch.set_num_threads(1) before")
        )


# -- what is sent --------------------------------------------------------------------------


def _packed_job(job: Job, executor: Executor) -> bytes | None:
    """The job, pickled once for all; None where the executor has a pickler of its own.

    A process of a pool that cannot unpickle what it is sent dies without a word, and tensors are
    sent as open files, of which there can be too many: so pools get bytes.
    """
    if not isinstance(executor, ProcessPoolExecutor):
        return None
    try:
        return pickle.dumps(job)
    except Exception as error:
        raise SearchError(_unpicklable(error)) from error


def _order(job: Job, packed: bytes | None, task: Task) -> _Order:
    model = task.make()
    if packed is None:
        return _Order(task.index, task.name, carry_out, (job, model, task.seed))
    try:
        content = pickle.dumps(model)
    except Exception as error:
        raise SearchError(
            f"{task.name}: the model cannot be sent to a worker: {error}; put what cannot be "
            "pickled (an open file, a lambda, a hook) out of it, or search without executor="
        ) from error
    return _Order(task.index, task.name, _carry_out_packed, (packed, content, task.seed))


def _carry_out_packed(job: bytes, model: bytes, seed: int) -> bytes:
    """`carry_out`, in bytes."""
    try:
        arguments = pickle.loads(job), pickle.loads(model)
    except Exception:
        return pickle.dumps(Outcome(None, None, 0.0, _not_found(traceback.format_exc())))
    outcome = carry_out(*arguments, seed)
    if outcome.failure is not None and "fork-based multiprocessing" in outcome.failure:
        outcome = replace(outcome, failure=f"{outcome.failure}{_FORKED}")
    try:
        return pickle.dumps(outcome)
    except Exception:
        return pickle.dumps(Outcome(None, None, outcome.seconds, traceback.format_exc()))


def _unpacked(result: Outcome | bytes) -> Outcome:
    outcome = pickle.loads(result) if isinstance(result, bytes) else result
    assert isinstance(outcome, Outcome), "carry_out returns one"
    return outcome


def _unpicklable(error: Exception) -> str:
    return (
        f"executor: evaluator or fine_tuner cannot be sent to a worker: {error}; define them at "
        "the top level of a module (no lambda, no function within a function), with what they "
        "need, or search without executor="
    )


def _not_found(told: str) -> str:
    return (
        f"{told}The worker could not load evaluator, fine_tuner or model: define them at "
        "the top level of a module that it can import; a notebook or standard input is none"
    )
