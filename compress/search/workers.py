"""Where candidates are evaluated: in this process, or by any `concurrent.futures.Executor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.errors import ConfigError, SearchError
from compress.search.measuring import Job, Outcome, carry_out

_IN_FLIGHT = 32  # small models that wait for workers at the same time, at most


@dataclass(frozen=True)
class Task:
    """A candidate to be evaluated; its model is made when its turn comes.

    Attributes:
        index: of the task, for the caller.
        make: gives the small model, which is nobody else's.
        seed: of its random numbers.
    """

    index: int
    make: Callable[[], nn.Module]
    seed: int


class Workers:
    """Evaluates tasks; the results do not depend on who does it, nor on how many do.

    Args:
        executor: None: in this process. An executor is used as it is, and left open. A function
            that returns one is called again where all its workers died.
    """

    def __init__(self, executor: Executor | Callable[[], Executor] | None) -> None:
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
        self._given = executor
        self._executor: Executor | None = executor if isinstance(executor, Executor) else None

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[int, Outcome]]:
        """Index and outcome of each task, in the order in which they are ready.

        Raises:
            SearchError: a task cannot be sent to the workers, or workers die of it.
        """
        if self._given is None:
            for task in tasks:
                yield task.index, carry_out(job, task.make(), task.seed)
            return
        executor = self._opened()
        waiting: dict[Future[Outcome], int] = {}
        for task in tasks:
            waiting[executor.submit(carry_out, job, task.make(), task.seed)] = task.index
            if len(waiting) >= min(getattr(executor, "_max_workers", _IN_FLIGHT), _IN_FLIGHT):
                yield from self._ready(waiting)
        while waiting:
            yield from self._ready(waiting)

    def close(self) -> None:
        """End the workers that were made here."""
        if self._executor is not None and self._executor is not self._given:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def _opened(self) -> Executor:
        if self._executor is None:
            assert callable(self._given), "checked by the constructor"
            self._executor = self._given()
        return self._executor

    def _ready(self, waiting: dict[Future[Any], int]) -> Iterator[tuple[int, Outcome]]:
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            index = waiting.pop(future)
            error = future.exception()
            if error is not None:
                raise SearchError(f"the workers cannot evaluate a candidate: {error}") from error
            yield index, future.result()
