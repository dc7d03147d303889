"""Candidates that workers evaluate: the same results whoever does it, and workers that die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from search_jobs import (
    CONFIG,
    KillsWorkers,
    Sleeps,
    evaluate,
    fails,
    network,
    pool,
    tune,
    tune_without_python,
)

from compress.errors import ConfigError, SearchError
from compress.search import SearchResult, SimulatedAnnealingPruner

SEARCH = {"candidates": 3, "cool_down_rate": 0.5, "seed": 3}  # 1 + 3 · 3 candidates


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Forks of a process with more of torch's would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(evaluator: Any = evaluate, **arguments: Any) -> SearchResult:
    pruner = SimulatedAnnealingPruner(network(), CONFIG, evaluator, **SEARCH | arguments)
    pruner.compress()
    assert pruner.result is not None
    return pruner.result


def course(result: SearchResult) -> list[Any]:
    """All but the time."""
    return [result.best.number, *(replace(trial, seconds=0.0) for trial in result.trials)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_of_any_size_finds_what_this_process_does(workers: int) -> None:
    here = search(fine_tuner=tune)
    assert len({trial.performance for trial in here.trials}) > 3
    with pool(workers, trains=True) as executor:
        assert course(search(fine_tuner=tune, executor=executor)) == course(here)
        assert executor.submit(os.getpid).result() != os.getpid()  # it is left open


def test_a_function_that_makes_a_pool() -> None:
    made: list[ProcessPoolExecutor] = []

    def make() -> Executor:
        made.append(pool(2))
        return made[-1]

    assert course(search(executor=make)) == course(search())
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="shutdown"):
        made[0].submit(os.getpid)


@pytest.mark.slow
def test_spawned_workers() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert course(search(fine_tuner=tune, executor=executor)) == course(search(fine_tuner=tune))


def forbidden(model: Any) -> None:
    text = "Unable to handle autograd's threading in combination with fork-based multiprocessing."
    raise RuntimeError(text)  # what torch raises where a parent's threads were forked away


def test_a_fork_that_cannot_train_is_told() -> None:
    with pool(1) as executor, pytest.raises(SearchError, match=r"(?s)autograd.*get_context.*spawn"):
        search(fine_tuner=forbidden, executor=executor)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_what_a_dead_worker_had_is_done_by_another(tmp_path: Any, how: str) -> None:
    made: list[Executor] = []

    def make() -> Executor:
        made.append(pool(2))
        return made[-1]

    found = search(KillsWorkers(tmp_path, 2, how), executor=make)
    assert course(found) == course(search())
    assert len(made) in (2, 3)  # both may die at the same time


def test_a_candidate_that_kills_each_of_its_workers_is_named(tmp_path: Any) -> None:
    with pytest.raises(SearchError, match=r"candidate \d: 3 workers died of it.*too little memory"):
        search(KillsWorkers(tmp_path, 99), executor=lambda: pool(2))
    assert len(list(tmp_path.iterdir())) >= 3  # and one that died beside it


def test_a_pool_that_was_handed_in_and_died_is_replaced_by_this_process(tmp_path: Any) -> None:
    with (
        pool(2) as executor,
        pytest.warns(RuntimeWarning, match="in this process, one after") as told,
    ):
        found = search(KillsWorkers(tmp_path, 99), executor=executor)
    assert course(found) == course(search())
    assert len(told) == 1


def test_a_failure_in_a_worker_is_told_with_its_traceback() -> None:
    with (
        pool(2) as executor,
        pytest.raises(SearchError, match=r"(?s)candidate 0 \(.*def fails|in fails.*no such luck"),
    ):
        search(fails, executor=executor)


def test_what_cannot_be_pickled_is_told() -> None:
    with pool(1) as executor:
        with pytest.raises(SearchError, match=r"evaluator or fine_tuner.*at the top level"):
            search(lambda model: evaluate(model), executor=executor)
        with pytest.raises(SearchError, match=r"evaluator or fine_tuner.*at the top level"):
            search(executor=executor, fine_tuner=lambda model: None)
        model = network()
        model.register_forward_hook(lambda *_: None)
        with pytest.raises(SearchError, match=r"candidate 0: the model cannot be sent.*a hook"):
            SimulatedAnnealingPruner(model, CONFIG, evaluate, executor=executor).compress()


def test_what_a_worker_cannot_load_is_told(monkeypatch: Any) -> None:
    """As in a notebook, whose functions a worker does not know."""
    with pool(1) as executor:
        executor.submit(os.getpid).result()  # the worker is there before the function is
        import search_jobs

        monkeypatch.setattr(search_jobs, "later", _later, raising=False)
        monkeypatch.setattr(_later, "__module__", "search_jobs")
        monkeypatch.setattr(_later, "__qualname__", "later")
        with pytest.raises(SearchError, match=r"(?s)later.*could not load evaluator.*notebook"):
            search(_later, executor=executor)


def _later(model: Any) -> float:
    return evaluate(model)


def test_a_pool_that_was_closed() -> None:
    closed = pool(1)
    closed.shutdown()
    with pytest.raises(SearchError, match="executor: takes no more candidates"):
        search(executor=closed)


def test_what_is_no_executor() -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(ConfigError, match="threads share"):
        search(executor=executor)
    with pytest.raises(ConfigError, match="executor: got int"):
        search(executor=3)
    with pytest.raises(SearchError, match="the function returned a int"):
        search(executor=lambda: 3)
    torch.set_num_threads(2)
    forks = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    with forks as executor, pytest.raises(ConfigError, match=r"forked.*2 torch threads; pass Proc"):
        search(executor=executor)


def test_ctrl_c_leaves_no_work_behind(tmp_path: Any) -> None:
    def interrupt() -> None:
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # A job in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            search(Sleeps(tmp_path), executor=lambda: pool(2))
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    worker = int(next(tmp_path.iterdir()).name)
    for _ in range(200):
        if not _alive(worker):
            return
        time.sleep(0.02)
    raise AssertionError("the worker goes on")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# -- a cluster -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tornado's and the operating system's
def test_a_cluster_finds_the_same_and_survives_its_workers(tmp_path: Any) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=True, **options) as cluster,
        distributed.Client(cluster) as client,
        distributed.Client(cluster.scheduler_address) as by_address,
    ):
        here = course(search(fine_tuner=tune_without_python))
        for each in (client, by_address):
            executor = each.get_executor()
            assert course(search(fine_tuner=tune_without_python, executor=executor)) == here
        (tmp_path / "one").mkdir()
        kills = KillsWorkers(tmp_path / "one", 1, "kill")
        assert course(search(kills, executor=client.get_executor())) == course(search())
        with pytest.raises(SearchError, match=r"(?s)candidate \d+ .*no such luck"):
            search(fails, executor=client.get_executor())
        (tmp_path / "all").mkdir()
        cluster.scheduler.allowed_failures = 0
        kills = KillsWorkers(tmp_path / "all", 99)
        with pytest.raises(SearchError, match=r"candidate \d+: 3 workers died of it"):
            search(kills, executor=client.get_executor())
