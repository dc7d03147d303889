"""What users give to pruners that look at data, and that nothing of theirs is changed by it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress import ModelSpeedup
from compress.adapters import LightningEvaluator, TransformersEvaluator
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator, TrainerEvaluator, as_evaluator
from compress.progress import progress_bar


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )  # fmt: skip


def loader(**options: Any) -> DataLoader:
    torch.manual_seed(1)
    data = TensorDataset(torch.rand(12, 1, 6, 6), torch.randint(0, 3, (12,)))
    return DataLoader(data, batch_size=4, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def by_loader(**options: Any) -> Evaluator:
    generator = torch.Generator().manual_seed(5)
    data = loader(shuffle=True, generator=generator)
    return Evaluator(data, F.cross_entropy, sgd, **options)


def epoch_of(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
    """NNI v1's trainer, with a scheduler and random numbers of all kinds."""
    model.train()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for x, y in loader(shuffle=True):
        optimizer.zero_grad(set_to_none=False)
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        criterion(model(x + 0.01 * noise), y).backward()
        optimizer.step()
        scheduler.step()


def used(model: nn.Module) -> nn.Module:
    """A model with gradients, and modules in different modes."""
    model(torch.rand(4, 1, 6, 6)).sum().backward()
    model[3].eval()
    return model


@pytest.mark.parametrize("backward", [False, True])
def test_measuring_changes_nothing(backward: bool) -> None:
    model = used(net())
    evaluator = by_loader()
    before = [*snapshot(model), evaluator.train_loader.generator.get_state()]
    seen: list[Tensor | None] = []
    evaluator.measure(model, 2, lambda: seen.append(model[0].weight.grad), backward=backward)
    assert_unchanged(before, [*snapshot(model), evaluator.train_loader.generator.get_state()])
    assert [grad is not None for grad in seen] == [backward] * 2


@pytest.mark.parametrize("limit", [2, None])
def test_measuring_with_a_trainer_changes_nothing(limit: int | None) -> None:
    model = used(net())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    optimizer.step()
    evaluator = TrainerEvaluator(epoch_of, optimizer, F.cross_entropy)
    before, seen = snapshot(model, optimizer), []
    evaluator.measure(model, limit, lambda: seen.append(model[0].weight.grad.abs().sum().item()))
    assert_unchanged(before, snapshot(model, optimizer))
    assert len(seen) == (limit or 3)
    assert min(seen) > 0


def test_a_measured_gradient_is_that_of_one_batch() -> None:
    model = net().eval()
    evaluator = Evaluator(loader(), F.cross_entropy)
    seen: list[Tensor] = []
    evaluator.measure(model, None, lambda: seen.append(model[0].weight.grad.clone()), backward=True)
    for found, (x, y) in zip(seen, loader(), strict=True):
        (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
        torch.testing.assert_close(found, expected)


class Stumble(Exception):
    pass


def raising(*_: Any) -> Any:
    raise Stumble


def broken_loader() -> Any:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield next(iter(loader()))
            torch.rand(3), random.random(), np.random.rand()
            raise Stumble

    return Broken()


def broken_epoch(model: nn.Module, optimizer: Any, criterion: Any) -> None:
    model.train()
    x, y = next(iter(loader(shuffle=True)))
    criterion(model(x), y).backward()
    optimizer.step()
    raise Stumble


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["loader", "criterion", "loss", "trainer"])
def test_nothing_is_left_behind_where_the_users_code_raises(how: str, training: bool) -> None:
    model = used(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evaluator = {
        "loader": Evaluator(broken_loader(), F.cross_entropy, sgd),
        "criterion": Evaluator(loader(), raising, sgd),
        "loss": Evaluator(loader(), None, sgd, loss=raising),
        "trainer": TrainerEvaluator(broken_epoch, optimizer, F.cross_entropy),
    }[how]
    before = snapshot(model, optimizer)
    with pytest.raises(Stumble):
        if training:
            evaluator.train(model, 1, lambda: None)
        else:
            evaluator.measure(model, None, lambda: None, backward=True)
    assert_unchanged(before, snapshot(model, optimizer))


@pytest.mark.parametrize("by_trainer", [False, True])
def test_training_trains_and_calls_before_each_step(by_trainer: bool) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    evaluator: Evaluator = by_loader()
    if by_trainer:
        evaluator = TrainerEvaluator(epoch_of, optimizer, F.cross_entropy)
    before, random_state, steps = snapshot(model), torch.get_rng_state(), []
    model.eval()

    def step() -> None:
        steps.append(model[0].weight.grad.clone())
        model[5].weight.grad.zero_()

    evaluator.train(model, 2, step)
    assert len(steps) == 6
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(before[0][1], model[0].weight)
    assert torch.equal(dict(before[:9])["5.weight"], model[5].weight)  # its gradient was set to 0
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_trainer_with_closures(by_keyword: bool) -> None:
    layer, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)

    def trainer(model: nn.Module, optimizer: Any, criterion: Any) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).sum()
            loss.backward()
            return loss

        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)

    evaluator, before, seen = TrainerEvaluator(trainer, optimizer), layer.weight.clone(), []
    evaluator.measure(layer, 1, lambda: seen.append(layer.weight.grad.tolist()))
    assert torch.equal(layer.weight, before)
    evaluator.train(layer, 1, lambda: layer.weight.grad.add_(2))
    assert seen == [[[1, 1]]]
    torch.testing.assert_close(layer.weight, before - 3)


def test_a_frozen_weight_is_not_trained() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    by_loader().train(model, 1)
    assert torch.equal(model[0].weight, before)


def test_evaluate_leaves_everything_and_says_what_is_missing() -> None:
    model = used(net())
    before = snapshot(model)

    def score(model: nn.Module) -> Tensor:
        model.train()
        return model(torch.rand(5, 1, 6, 6)).sum() * 0 + 3

    assert Evaluator(eval_fn=score).evaluate(model) == 3.0
    assert TrainerEvaluator(evaluator=score).evaluate(model) == 3.0
    assert_unchanged(before, snapshot(model))
    with pytest.raises(ConfigError, match="pass eval_fn="):
        by_loader().evaluate(model)


class Keywords(nn.Module):
    """As transformers' models: keyword arguments in, an object with a loss out."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.as_dict = as_dict

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        loss = F.cross_entropy(self.layer(inputs), labels)
        return {"loss": loss} if self.as_dict else type("Output", (), {"loss": loss})()


@pytest.mark.parametrize("as_dict", [True, False])
def test_batches_of_keywords(as_dict: bool) -> None:
    batch = {"inputs": torch.rand(3, 2), "labels": torch.tensor([0, 1, 1])}
    model = Keywords(as_dict)
    loss = Evaluator([batch]).loss(model, batch)
    assert loss.item() == F.cross_entropy(model.layer(batch["inputs"]), batch["labels"]).item()


def test_batches_of_other_kinds() -> None:
    double = nn.Linear(2, 2)
    x = torch.rand(3, 2)
    assert torch.equal(Evaluator([x]).forward(double, x), double(x))
    assert torch.equal(Evaluator([x]).forward(double, (x,)), double(x))
    bilinear = nn.Bilinear(2, 2, 1)
    two = (x, x, torch.zeros(3, 1))
    assert torch.equal(Evaluator([two]).forward(bilinear, two), bilinear(x, x))
    own = Evaluator([3.0], forward=lambda model, b: model(x * b), loss=lambda model, b: x.sum() * b)
    assert torch.equal(own.forward(double, 3.0), double(x * 3))
    assert own.loss(double, 3.0) == x.sum() * 3
    assert list(Evaluator([1, 2, 3]).batches(2)) == [1, 2]
    assert next(Evaluator([{"a": x}], device="meta").batches())["a"].is_meta


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Evaluator(iter([1])), "train_loader: got an iterator, which gives its batches on"),
        (lambda: Evaluator([1], 3), "criterion: got int; expected a function"),
        (
            lambda: Evaluator([1], nn.MSELoss),
            "criterion: got the class MSELoss; expected one",
        ),
        (lambda: as_evaluator(3, None, None, None), "evaluator: got int; expected an Evaluator or"),
        (lambda: as_evaluator(None, 3, None, None), "trainer: got int; expected a function (model"),
        (lambda: as_evaluator(None, None, 3, None), "optimizer: got int; expected a torch.optim"),
        (lambda: as_evaluator(Evaluator(), epoch_of, None, 1), "an Evaluator and trainer, crit"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert expected in str(caught.value)


def test_what_is_missing_is_said() -> None:
    model = net()
    with pytest.raises(CompressError, match="train_loader gave no batch"):
        Evaluator([]).measure(model, 1, lambda: None)
    with pytest.raises(ConfigError, match="cannot be trained: it trains, and its Evaluator has no"):
        Evaluator([1]).train(model, 1)
    with pytest.raises(ConfigError, match="no loss for a batch of type list: expected"):
        Evaluator(loader()).measure(model, 1, lambda: None, backward=True)
    with pytest.raises(ConfigError, match="returned no loss with it: pass loss="):
        Evaluator([{"input": torch.rand(2, 1, 6, 6)}]).measure(
            model, 1, lambda: None, backward=True
        )
    unreduced = Evaluator(loader(), lambda output, y: F.cross_entropy(output, y, reduction="none"))
    with pytest.raises(
        ConfigError, match=r"the loss on a batch is of shape \(4,\); expected a ten"
    ):
        unreduced.measure(model, 1, lambda: None, backward=True)
    with pytest.raises(ConfigError, match="the loss on a batch is a float; expected a tensor of"):
        Evaluator(loader(), lambda output, y: 0.5).loss(model, next(iter(loader())))
    with pytest.raises(ConfigError, match="optimizer_factory returned a NoneType; expected a"):
        Evaluator(loader(), F.cross_entropy, lambda parameters: None).train(model, 1)
    other = torch.optim.SGD(net().parameters(), 0.1)
    lacking = TrainerEvaluator(epoch_of, other, F.cross_entropy).lacks(model)
    assert lacking.startswith("optimizer has none of this model's parameters")


def test_a_trainer_with_an_optimizer_of_its_own_is_told_and_undone() -> None:
    model = net()
    given = torch.optim.SGD(model.parameters(), 0.1)

    def own(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        epoch_of(model, torch.optim.SGD(model.parameters(), 0.1), criterion, epoch)

    evaluator, before = TrainerEvaluator(own, given, F.cross_entropy), snapshot(model, given)
    with pytest.raises(CompressError, match=r"trainer never called step\(\) of the optimizer"):
        evaluator.measure(model, 1, lambda: None)
    assert_unchanged(before, snapshot(model, given))
    with pytest.raises(CompressError, match=r"trainer never called step\(\) of the optimizer"):
        evaluator.train(model, 1)
    assert_unchanged(before, snapshot(model, given))


def test_the_bar_is_for_terminals_and_for_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(shown: bool) -> str:
        with progress_bar("measuring", 2, shown) as advance:
            advance()
            advance()
        return capsys.readouterr().err

    monkeypatch.setattr("compress.progress._PATIENCE_S", -1.0)
    assert run(True) == ""  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "measuring" in run(True)
    assert run(False) == ""
    monkeypatch.setattr("compress.progress._PATIENCE_S", 60.0)
    assert run(True) == ""


@pytest.mark.parametrize(
    ("kind", "extra"), [(LightningEvaluator, "lightning"), (TransformersEvaluator, "transformers")]
)
def test_an_adapter_whose_library_is_missing(
    kind: type[Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(CompressError, match=rf"pip install compress-torch\[{extra}\]"):
        kind(nn.Linear(1, 1))


def test_running_sums_that_are_no_buffers_stay() -> None:
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return super().forward(x)

    model = Counting(2, 2)
    model.seen = seen = torch.zeros(())
    Evaluator([torch.rand(3, 2)]).measure(model, 1, lambda: None)
    assert model.seen is seen
    assert model.seen == 0


@pytest.mark.parametrize("shown", [True, False])
def test_a_speedup_that_takes_long_has_a_bar(
    shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.progress._PATIENCE_S", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    masks = {"0": {"bias": torch.zeros(6)}}
    ModelSpeedup(net(), torch.rand(2, 1, 6, 6), masks, progress=shown).speedup_model()
    assert ("speeding up" in capsys.readouterr().err) is shown
