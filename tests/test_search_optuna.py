"""Optuna's samplers, pruners and storages in a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_jobs import CONFIG, evaluate, network, pool, tune
from torch import nn

from compress.errors import ConfigError, SearchError, StateError
from compress.search import OptunaPruner, SearchResult
from compress.search.journal import NAME

optuna = pytest.importorskip("optuna")


def search(evaluator: Any = evaluate, n_trials: int = 8, **arguments: Any) -> OptunaPruner:
    pruner = OptunaPruner(network(), CONFIG, evaluator, n_trials=n_trials, **arguments)
    pruner.compress()
    return pruner


def course(pruner: OptunaPruner) -> list[Any]:
    assert pruner.result is not None
    return [pruner.result.best.number, *(replace(t, seconds=0.0) for t in pruner.result.trials)]


def result(pruner: OptunaPruner) -> SearchResult:
    assert pruner.result is not None
    return pruner.result


def test_candidates_meet_the_target_and_the_first_is_uniform() -> None:
    found = result(search(n_trials=25))
    assert len(found.trials) == 25
    assert all(0.5 <= trial.share < 0.6 for trial in found.trials)
    assert found.uniform == 0 and set(found.trials[0].sparsities.values()) == {0.5}
    assert found.best.performance == max(trial.performance for trial in found.trials)
    assert found.best.performance > 0.5 * found.trials[0].performance  # both below 0
    assert len({trial.performance for trial in found.trials}) > 5


def test_the_seed_decides() -> None:
    assert course(search(seed=1)) == course(search(seed=1)) != course(search(seed=2))


def test_less_may_be_better() -> None:
    def error(model: nn.Module) -> float:
        return -evaluate(model)

    found = result(search(error, optimize_mode="minimize"))
    assert course(search())[0] == found.best.number


def test_any_sampler() -> None:
    found = search(sampler=optuna.samplers.RandomSampler(seed=0))
    assert course(found) == course(search(sampler=optuna.samplers.RandomSampler(seed=0)))
    assert course(found) != course(search())


def test_a_batch_does_not_depend_on_the_workers() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = course(search(batch_size=3))
    with pool(2) as executor:
        assert course(search(batch_size=3, executor=executor)) == here
    torch.set_num_threads(threads)


# -- stop and go on ------------------------------------------------------------------------


def cut(folder: Path, candidates: int) -> None:
    """As a kill leaves the journal when so many candidates are done."""
    lines = (folder / NAME).read_bytes().splitlines(keepends=True)
    kept, left = [], candidates
    for line in lines:
        if b'"performance"' in line:
            left -= 1
        if left < 0:
            break
        kept.append(line)
    (folder / NAME).write_bytes(b"".join(kept))


@pytest.mark.parametrize("candidates", [0, 1, 4, 8])
def test_a_search_that_was_killed_goes_on(tmp_path: Path, candidates: int) -> None:
    whole = course(search(experiment_data_dir=tmp_path, batch_size=2))
    cut(tmp_path, candidates)
    assert course(search(experiment_data_dir=tmp_path, batch_size=2)) == whole


def test_more_trials_than_before(tmp_path: Path) -> None:
    before = course(search(experiment_data_dir=tmp_path, n_trials=5, batch_size=2))
    asked: list[nn.Module] = []

    def counted(model: nn.Module) -> float:
        asked.append(model)
        return evaluate(model)

    counted.__module__, counted.__qualname__ = evaluate.__module__, evaluate.__qualname__
    more = search(counted, experiment_data_dir=tmp_path, n_trials=9, batch_size=2)
    assert course(more)[1:6] == before[1:]
    assert len(asked) == 1 + 4  # the dense model, for its input


def test_a_sampler_without_a_seed_repeats_what_it_asked_for(tmp_path: Path) -> None:
    sampler = optuna.samplers.RandomSampler
    before = course(search(experiment_data_dir=tmp_path, sampler=sampler()))
    cut(tmp_path, 4)
    after = course(search(experiment_data_dir=tmp_path, sampler=sampler()))
    assert after[1:5] == before[1:5]
    assert len(after) == len(before)


@pytest.mark.parametrize("kind", ["file", "database"])
def test_a_storage_goes_on_and_is_shared(tmp_path: Path, kind: str) -> None:
    def storage(name: str) -> Any:
        file = tmp_path / name
        return file if kind == "file" else f"sqlite:///{file}"

    one = {"experiment_data_dir": tmp_path / "one", "batch_size": 2}
    whole = search(storage=storage("a"), **one)
    assert course(whole) == course(search(batch_size=2))  # the same as in memory
    assert len(whole.study.get_trials()) == 8
    assert whole.study.best_value == result(whole).best.performance
    cut(tmp_path / "one", 5)  # the storage has more, and is believed
    again = search(storage=storage("a"), **one)
    assert course(again) == course(whole) and len(again.study.get_trials()) == 8
    two = search(storage=storage("a"), seed=1, n_trials=4)  # of another machine
    assert len(two.study.get_trials()) == 12
    assert len(result(two).trials) == 4
    assert two.study.study_name == whole.study.study_name


def test_candidates_that_were_running_in_a_storage_are_done_first(tmp_path: Path) -> None:
    def breaks(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(model)

    calls: list[nn.Module] = []
    breaks.__module__, breaks.__qualname__ = evaluate.__module__, evaluate.__qualname__
    given = {"storage": tmp_path / "study", "experiment_data_dir": tmp_path, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        search(breaks, **given)
    after = search(**given)
    assert course(after) == course(search(batch_size=3))
    assert {trial.state.name for trial in after.study.get_trials()} == {"COMPLETE"}


def test_a_storage_that_is_no_use(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"storage: .*the study cannot be opened"):
        search(storage=f"sqlite:///{tmp_path}/no/such.db")
    optuna.create_study(study_name="mine", storage=f"sqlite:///{tmp_path}/a.db").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(StateError, match=r"the study 'mine' of something else.*another study_name"):
        search(storage=f"sqlite:///{tmp_path}/a.db", study_name="mine")


# -- giving up -----------------------------------------------------------------------------


def reporting(model: nn.Module) -> Iterator[float]:
    for epoch in range(4):
        tune(model)
        yield evaluate(model) - 0.01 / (epoch + 1)


class Counted:
    """A fine-tuner that counts its epochs."""

    def __init__(self) -> None:
        self.epochs = 0

    def __call__(self, model: nn.Module) -> Iterator[float]:
        for report in reporting(model):
            self.epochs += 1
            yield report


@pytest.mark.parametrize("name", ["MedianPruner", "SuccessiveHalvingPruner"])
def test_bad_candidates_are_given_up(name: str) -> None:
    tuner = Counted()
    given = {"MedianPruner": {"n_startup_trials": 2}, "SuccessiveHalvingPruner": {}}[name]
    pruner = getattr(optuna.pruners, name)(**given)
    found = search(n_trials=16, fine_tuner=tuner, pruner=pruner)
    trials = result(found).trials
    stopped = [trial for trial in trials if trial.stopped]
    assert 0 < len(stopped) < 15
    assert tuner.epochs == sum(len(trial.reports) for trial in trials) < 4 * 16
    assert all(len(trial.reports) == 4 for trial in trials if not trial.stopped)
    assert all(trial.performance == trial.reports[-1] and not trial.metrics for trial in stopped)
    assert not result(found).best.stopped
    states = [trial.state.name for trial in found.study.get_trials()]
    assert states == ["PRUNED" if trial.stopped else "COMPLETE" for trial in trials]
    assert "(stopped)" in str(result(found).table(16))


def test_giving_up_does_not_depend_on_the_workers_nor_on_a_kill(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    given = {"n_trials": 12, "batch_size": 4, "fine_tuner": reporting}
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    here = search(pruner=pruner, experiment_data_dir=tmp_path, **given)
    assert any(trial.stopped for trial in result(here).trials)
    with pool(2, trains=True) as executor:
        assert course(search(pruner=pruner, executor=executor, **given)) == course(here)
    cut(tmp_path, 6)
    assert course(search(pruner=pruner, experiment_data_dir=tmp_path, **given)) == course(here)
    torch.set_num_threads(threads)


def test_a_pruner_that_hears_nothing() -> None:
    with pytest.raises(
        SearchError, match=r"fine_tuner yields nothing.*make fine_tuner a generator"
    ):
        search(fine_tuner=tune, pruner=optuna.pruners.MedianPruner())
    with pytest.raises(ConfigError, match="pruner: got one without a fine_tuner"):
        search(pruner=optuna.pruners.MedianPruner())


# -- what is wrong -------------------------------------------------------------------------


def test_an_impossible_target(tmp_path: Path) -> None:
    config_list = [{"sparsity": 0.9, "op_names": ["0"]}]
    given = {"cost": "params", "storage": tmp_path / "study"}
    with pytest.raises(ConfigError, match=r"fraction of params to save: got 0\.9; at most 0\."):
        OptunaPruner(network(), config_list, evaluate, **given).compress()
    assert not (tmp_path / "study").exists()


def test_bad_arguments(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError) as told:
        OptunaPruner(
            network(), CONFIG, evaluate, n_trials=0, batch_size=1.5, sampler="tpe", pruner=3,
            storage=4, study_name=5,
        )  # fmt: skip
    names = [problem.split(":")[0] for problem in told.value.problems]
    assert names == [
        "n_trials", "batch_size", "sampler", "pruner", "study_name", "storage", "pruner",
    ]  # fmt: skip
    monkeypatch.setattr("compress.search.optuna_pruner.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs optuna.*pip install 'compress-torch\[search\]'"):
        OptunaPruner(network(), CONFIG, evaluate)


def test_optuna_is_as_loud_as_before(capsys: Any) -> None:
    before = optuna.logging.get_verbosity()
    search(n_trials=2)
    assert optuna.logging.get_verbosity() == before
    assert "Trial" not in capsys.readouterr().err
