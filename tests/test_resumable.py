"""Stop and go on: what is in a state file, what is refused, and kills at random moments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_networks import batches, evaluator, residual, sgd
from torch import nn
from torch.nn import functional as F

from compress import (
    ADMMPruner,
    AGPPruner,
    IterativePruner,
    LotteryTicketPruner,
    Masks,
)
from compress.errors import StateError
from compress.schedule.state import read_state, write_state
from compress.speedup.plan import Attribute, Plan, Slice

ROOT = Path(__file__).parents[1]
CONFIG = [{"sparsity": 0.6, "op_types": ["Conv2d"]}]
X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class StopError(Exception):
    """Ends a run half-way."""


def noisy(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Training that depends on every kind of random number and on the optimizer's state."""
    for _ in range(2):
        images, labels = random.choice(batches())
        images = images + float(np.random.rand()) * torch.randn_like(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def run(state: Any, kind: type[Any], stop: int | None = None, **options: Any) -> Any:
    """A whole run, or one that fails in the training of call ``stop``."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = residual()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.5)
    torch.manual_seed(1)
    pruner = kind(
        model, CONFIG, optimizer, lr_scheduler=scheduler, total_iteration=3, state=state, **options
    )
    for calls, _ in enumerate(pruner.rounds(), 1):
        noisy(model, optimizer)
        scheduler.step()
        if calls == stop:
            raise StopError
    return pruner


def assert_same(one: Any, other: Any) -> None:
    assert one.masks == other.masks
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AGPPruner, {"pruning_algorithm": "l1"}),
        (IterativePruner, {"pruning_algorithm": "l1", "speedup": True, "dummy_input": X}),
        (IterativePruner, {"schedule": "cyclic"}),
        (LotteryTicketPruner, {}),
        (LotteryTicketPruner, {"rewind_step": 1}),
    ],
)
def test_a_run_that_broke_off_ends_as_one_that_did_not(
    kind: type[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(None, kind, **options)
    state = tmp_path / "state"
    for stop in (1, 2):
        with pytest.raises(StopError):
            run(state, kind, stop, **options)
    torch.rand(3)
    assert_same(run(state, kind, **options), whole)
    again = run(state, kind, stop=1, **options)  # all is done: nothing is trained
    assert_same(again, whole)
    assert os.listdir(tmp_path) == ["state"]


def test_admm_goes_on(tmp_path: Path) -> None:
    def make(state: Any) -> ADMMPruner:
        return ADMMPruner(
            residual(), CONFIG, evaluator(2), num_iterations=3, training_epochs=1, row=0.1,
            state=state,
        )  # fmt: skip

    whole = make(None)
    whole.compress()
    broken, train, calls = make(tmp_path / "state"), evaluator(2).train, []

    def stumble(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StopError
        train(*arguments, **options)

    assert broken.evaluator is not None
    broken.evaluator.train = stumble  # type: ignore[method-assign]
    with pytest.raises(StopError):
        broken.compress()
    resumed = make(tmp_path / "state")
    resumed.compress()
    assert resumed.masks == whole.masks
    assert torch.equal(resumed.model.conv2.weight, whole.model.conv2.weight)  # type: ignore[arg-type]


def test_training_over_epochs_goes_on(tmp_path: Path) -> None:
    config = [{"final_sparsity": 0.6, "end_epoch": 4, "op_types": ["Conv2d"]}]

    def train(state: Any, stop: int | None) -> AGPPruner:
        torch.manual_seed(1)
        model = residual()
        optimizer = sgd(model.parameters())
        pruner = AGPPruner(model, config, optimizer, state=state)
        pruner.compress()
        for epoch in range(pruner.epoch, 5):
            pruner.update_epoch(epoch)
            if epoch == stop:
                raise StopError
            torch.rand(1)
            for images, labels in batches()[:2]:
                optimizer.zero_grad()
                F.cross_entropy(model(images + torch.randn_like(images)), labels).backward()
                optimizer.step()
        return pruner

    whole = train(None, None)
    for stop in (2, 3):
        with pytest.raises(StopError):
            train(tmp_path / "state", stop)
    assert_same(train(tmp_path / "state", None), whole)


def test_a_loaders_own_generator_goes_on(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(
        *(torch.cat(each) for each in zip(*batches()[:2], strict=True))
    )

    def make() -> IterativePruner:
        generator = torch.Generator().manual_seed(3)
        loader = torch.utils.data.DataLoader(data, 64, shuffle=True, generator=generator)
        own = evaluator()
        own.train_loader = loader
        return IterativePruner(
            residual(), CONFIG, total_iteration=2, evaluator=own, state=tmp_path / "state"
        )

    pruner = make()
    for _ in pruner.rounds():
        next(iter(pruner.evaluator.train_loader))  # type: ignore[union-attr, arg-type]
    drawn = pruner.evaluator.train_loader.generator.get_state()  # type: ignore[union-attr]
    resumed = make()
    resumed.compress()
    assert torch.equal(resumed.evaluator.train_loader.generator.get_state(), drawn)  # type: ignore[union-attr]


# --- what is refused


def small(**options: Any) -> IterativePruner:
    given = {"pruning_algorithm": "l1", "total_iteration": 2, "finetuner": print} | options
    model, config = given.pop("model", None) or residual(), given.pop("config_list", CONFIG)
    return IterativePruner(model, config, **given)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"config_list": [{"sparsity": 0.5, "op_types": ["Conv2d"]}]},
         "config_list[0].sparsity: the file has 0.6, this is 0.5"),
        ({"total_iteration": 4}, "arguments.total_iteration: the file has 2, this is 4"),
        ({"pruning_algorithm": "l2"}, "pruning_algorithm: the file has 'l1', this is 'l2'"),
        ({"pruning_params": {"round_to": 2}}, "pruning_params.round_to: the file has 'noth"),
        ({"model": nn.Sequential(nn.Conv2d(1, 4, 1))}, "model.module conv1: the file has 'Conv2d'"),
    ],
)  # fmt: skip
def test_another_state_is_refused(other: dict[str, Any], expected: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    next(small(state=state).rounds())
    pruner = small(state=state, **other)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with pytest.raises(StateError) as error:
        next(pruner.rounds())
    assert "this state belongs to something else" in str(error.value)
    assert expected in str(error.value)
    assert all(torch.equal(v, before[n]) for n, v in pruner.model.state_dict().items())


def test_another_seed_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = residual()
    next(small(model=model, state=tmp_path / "state").rounds())
    model = residual()
    torch.manual_seed(2)
    with pytest.raises(StateError, match="seed: the file has 0, this is 2"):
        next(small(model=model, state=tmp_path / "state").rounds())


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no state", encoding="utf-8")
    with pytest.raises(StateError, match="cannot be read as a safetensors file"):
        next(small(state=tmp_path / "text").rounds())
    Masks({"a": {"weight": torch.ones(2)}}).save(tmp_path / "masks")
    with pytest.raises(StateError, match=r"no state of a pruner.*'compress\.masks'"):
        next(small(state=tmp_path / "masks").rounds())
    with pytest.raises(StateError, match="the state cannot be saved"):
        next(small(state=tmp_path / "nowhere" / "state").rounds())


def test_any_structure_comes_back(tmp_path: Path) -> None:
    plan = Plan(
        slices={"a": Slice((np.arange(3), None), (1, np.ones((2, 2), np.int64)))},
        attributes=[Attribute("m", "size", (3, [4]), (2, None))],
    )
    state = {
        1: [True, None, 1.5, "x", float("inf")],
        "t": (torch.arange(3), np.zeros(2)),
        2.5: plan,
    }
    path = tmp_path / "state"
    write_state(path, {"a": 1}, state)
    found = read_state(path, {"a": 1})
    assert found[1] == state[1]
    assert torch.equal(found["t"][0], torch.arange(3))
    assert isinstance(found["t"], tuple)
    assert found["t"][1].dtype == np.float64
    assert found[2.5].slices["a"].shape((5, 6)) == (3, 2)
    assert found[2.5].attributes == plan.attributes
    with pytest.raises(StateError, match=r"state\['f'\]: a function cannot be saved"):
        write_state(path, {"a": 1}, {"f": residual})
    assert read_state(path, {"a": 1})[1] == state[1]


# --- kills


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_at_random.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "7"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed 7 times") == 3
