"""Rewinding to early weights, and ADMM's three updates by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digit_networks import batches, evaluator, residual
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ADMMPruner, Evaluator, LotteryTicketPruner
from compress.errors import CompressError, ConfigError
from compress.masks import applied_masks, suspend_masks

CONFIG = [{"sparsity": 0.75, "op_types": ["Conv2d"]}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for images, labels in batches()[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()


def raw(model: nn.Module) -> dict[str, Tensor]:
    with suspend_masks(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


class Run:
    """A pruner with what it rewinds, and what there was at the begin of each round."""

    def __init__(self, **options: Any) -> None:
        self.model = residual()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.1)
        self.pruner = LotteryTicketPruner(
            self.model, CONFIG, self.optimizer, lr_scheduler=self.scheduler, total_iteration=2,
            **options,
        )  # fmt: skip
        self.begins: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.states: list[int] = []
        self.sparsities: list[float] = []

    def go(self, steps: int = 3) -> None:
        for _ in self.pruner.rounds():
            self.begins.append(raw(self.model))
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.states.append(len(self.optimizer.state))
            self.sparsities.append(self.pruner.masks.sparsity)
            train(self.model, self.optimizer, self.scheduler, steps)


def test_rewinding_to_the_initial_weights() -> None:
    run = Run()
    run.go()
    assert len(run.begins) == 3
    assert same(run.begins[0], run.begins[1])
    assert same(run.begins[0], run.begins[2])
    assert run.rates == [0.01] * 3
    assert run.states == [0] * 3  # Adam's averages are as at first, too
    # Exponential: of 936 weights 1 - √0.25 and 0.75 are masked, in each layer.
    assert run.sparsities == [0, 0.5, 0.75]
    assert not same(run.begins[0], raw(run.model))


def test_masks_are_of_the_trained_weights() -> None:
    run = Run()
    for number in run.pruner.rounds():
        if number == 0:
            with torch.no_grad():  # as if training had turned the order around
                weight = run.model.conv1.weight
                weight.copy_(1 / (weight + 1e-3 * weight.sign()))
                expected = weight.abs().flatten().argsort()[:36]
        if number == 1:
            gone = ~run.pruner.masks["conv1"]["weight"].flatten()
            assert set(gone.nonzero().flatten().tolist()) == set(expected.tolist())
            break


def test_rewinding_to_early_weights_and_their_optimizer() -> None:
    run, reference = Run(rewind_step=2), Run()
    run.go()
    train(reference.model, reference.optimizer, reference.scheduler, 1)
    images, labels = batches()[1]
    reference.optimizer.zero_grad()
    F.cross_entropy(reference.model(images), labels).backward()
    reference.optimizer.step()  # what is kept is of just after the optimizer's step
    assert same(run.begins[1], raw(reference.model))
    assert same(run.begins[2], raw(reference.model))
    assert run.rates[1:] == [0.01, 0.01]
    assert run.states == [0, 15, 15]
    assert len(run.optimizer._optimizer_step_post_hooks) == 0


def test_rewinding_the_learning_rate_alone() -> None:
    run = Run(rewind="learning_rate")
    for number in run.pruner.rounds():
        if number == 0:
            train(run.model, run.optimizer, run.scheduler, 3)
            trained = raw(run.model)
            assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
        elif number == 1:
            assert same(raw(run.model), trained)
            assert run.optimizer.param_groups[0]["lr"] == 0.01
            assert len(run.optimizer.state) == 15
            assert run.scheduler.last_epoch == 0


def test_an_evaluator_with_its_own_optimizer() -> None:
    model = residual()
    begin = raw(model)
    pruner = LotteryTicketPruner(model, CONFIG, total_iteration=2, evaluator=evaluator(1))
    _, masks = pruner.compress()
    assert masks.sparsity == 0.75
    assert not same(begin, raw(model))


def test_a_round_that_ends_before_the_step_to_rewind_to() -> None:
    run = Run(rewind_step=4)
    with pytest.raises(CompressError, match="round 0 ended before step 4 of the optimizer"):
        run.go(steps=3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rewind": "all"}, "rewind: got 'all'; expected one of weights, learning_rate"),
        ({"rewind_step": -1}, "rewind_step: got -1; expected a whole number ≥ 0"),
        ({"rewind_step": 2}, "rewind_step: it counts steps of an optimizer; pass optimizer="),
        ({"total_iteration": None}, "total_iteration: got None; it works in rounds"),
        (
            {"speedup": True, "dummy_input": 1},
            "speedup: what is rewound has the first model's size",
        ),
    ],
)
def test_wrong_arguments_of_a_lottery(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        LotteryTicketPruner(residual(), CONFIG, **{"total_iteration": 2, **options})


# --- ADMM


def quadratic(target: Tensor) -> tuple[nn.Module, Evaluator]:
    """f(W) = ½‖W − target‖², trained by one step of gradient descent with rate ½."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = target.clone()
    return model, Evaluator(
        [torch.zeros(1, 4)], None, lambda p: torch.optim.SGD(p, lr=0.5),
        loss=lambda model, batch: (model[0].weight - target).square().sum() / 2,
    )  # fmt: skip


def test_the_updates_by_hand() -> None:
    target = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    model, data = quadratic(target)
    pruner = ADMMPruner(
        model, [{"sparsity": 0.5, "op_names": ["0"]}], data, num_iterations=2, training_epochs=1,
        rho=1.0, pruning_algorithm="level",
    )  # fmt: skip
    _, masks = pruner.compress()
    # Z = (4, 0, 3, 0), U = 0. The gradient is W - target + (W - Z + U):
    # W: (4, 1, 3, 2) - ½ (0, 1, 0, 2) = (4, .5, 3, 1); Z: Π(W + U) = (4, 0, 3, 0)
    # U: (0, .5, 0, 1)
    # W: W - ½ ((0, -.5, 0, -1) + (0, 1, 0, 2)) = (4, .25, 3, .5); W + U = (4, .75, 3, 1.5)
    # Z: (4, 0, 3, 0); U: (0, .75, 0, 1.5)
    with suspend_masks(model):
        assert model[0].weight.tolist() == [[4, 0.25, 3, 0.5]]
    assert pruner._targets["0.weight"].tolist() == [[4, 0, 3, 0]]
    assert pruner._duals["0.weight"].tolist() == [[0, 0.75, 0, 1.5]]
    assert masks["0"]["weight"].tolist() == [[True, False, True, False]]
    # ½ · ((.25 + .75)² + (.5 + 1.5)²)
    assert pruner.penalty().item() == pytest.approx(2.5)


def test_nnis_names_are_taken_and_filters_go() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    epochs = []

    def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        epochs.append(epoch)
        for images, labels in batches()[:2]:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()

    pruner = ADMMPruner(
        model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], trainer=trainer, optimizer=optimizer,
        criterion=F.cross_entropy, num_iterations=2, training_epochs=3, row=0.5,
    )  # fmt: skip
    norms = model.conv2.weight.detach().flatten(1).norm(dim=1)
    _, masks = pruner.compress()
    assert epochs == [0, 1, 2] * 2
    assert masks == applied_masks(model)
    gone = ~masks["conv2"]["bias"]
    assert int(gone.sum()) == 3
    after = model.conv2.parametrizations.weight.original.detach().flatten(1).norm(dim=1)
    assert bool((after[gone] < 0.7 * norms[gone]).all())  # drawn towards 0
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "evaluator: it trains: pass an Evaluator, or trainer, optimizer and criterion"),
        (
            {"evaluator": Evaluator([1])},
            "evaluator: it trains, and its Evaluator has no optimizer_",
        ),
        ({"num_iterations": 0}, "num_iterations: got 0; expected a whole number ≥ 1"),
        ({"training_epochs": 1.5}, "training_epochs: got 1.5; expected a whole number ≥ 1"),
        ({"row": -1.0}, "rho: got -1.0; expected a number ≥ 0, such as 1e-4"),
    ],
)
def test_wrong_arguments_of_admm(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ADMMPruner(residual(), CONFIG, **options)
