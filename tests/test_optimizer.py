"""An optimizer goes along: one more step of the small model is the masked model's own step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress import Masks, ModelSpeedup
from compress.errors import SpeedupError

Make = Callable[..., optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=0.05),
    "SGD momentum": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1),
    "SGD nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": partial(optim.SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "Adam foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "Adam fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "Adagrad": partial(optim.Adagrad, lr=0.01, initial_accumulator_value=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.05, t0=1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    ).double()  # fmt: skip


def masks() -> Masks:
    """Whole filters with all that follows them: nothing is left to fold or carry."""
    entries: dict[str, dict[str, Tensor]] = {}
    gone = {"0": [1, 5], "1": [1, 5], "3": [0, 6]}
    for path, rows in gone.items():
        for name, parameter in network().get_submodule(path).named_parameters():
            mask = torch.ones_like(parameter, dtype=torch.bool)
            mask[rows] = False
            entries.setdefault(path, {})[name] = mask
    return Masks(entries)


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(batch(seed)).square().mean().backward()
    optimizer.step()


def trained(make: Make, **options: Any) -> tuple[nn.Module, optim.Optimizer]:
    model = network()
    masks().apply(model)
    optimizer = make(model.parameters(), **options)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, optimizer


def plain_values(model: nn.Module) -> dict[str, Tensor]:
    """The raw parameters of a masked or plain model, by their plain names."""
    return {
        name.replace("parametrizations.", "").replace(".original", ""): p.detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_the_masked_models_on_what_is_kept(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    masked, its_optimizer = copy.deepcopy((model, optimizer))
    speedup = ModelSpeedup(model, batch(9), {}, optimizer=optimizer)
    small = speedup.speedup_model()
    step(masked, its_optimizer, 7)
    step(small, optimizer, 7)
    expected = plain_values(masked)
    for path, parameter in small.named_parameters():
        cut = speedup.plan.slices.get(path)
        want = expected[path] if cut is None else cut(expected[path])
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-9, atol=1e-12)
    assert small[0].out_channels == 6
    assert small[3].weight.shape == (6, 3, 3, 3)


def test_the_step_is_another_without_the_state() -> None:
    """What the test above would not notice if it compared nothing."""
    model, optimizer = trained(OPTIMIZERS["SGD momentum"])
    masked, its_optimizer = copy.deepcopy((model, optimizer))
    speedup = ModelSpeedup(model, batch(9), {})
    small = speedup.speedup_model()
    step(masked, its_optimizer, 7)
    step(small, OPTIMIZERS["SGD momentum"](small.parameters()), 7)
    want = speedup.plan.slices["0.weight"](plain_values(masked)["0.weight"])
    assert float((small[0].weight - want).abs().max().detach()) > 1e-6


@pytest.mark.skipif(not hasattr(optim, "Adafactor"), reason="needs torch 2.5")
def test_factored_state_shrinks_along_the_axes_that_it_has() -> None:
    model, optimizer = trained(optim.Adafactor)
    before = {k: v.clone() for k, v in optimizer.state[model[6].weight].items()}
    speedup = ModelSpeedup(model, batch(9), {}, optimizer=optimizer)
    small = speedup.speedup_model()
    state = optimizer.state[small[6].weight]
    assert state["row_var"].shape == (5, 1)
    assert state["col_var"].shape == (1, 6 * 16)
    assert torch.equal(state["row_var"], before["row_var"])
    kept = speedup.plan.slices["6.weight"].keep[1]
    assert torch.equal(state["col_var"], before["col_var"][:, kept])
    state = optimizer.state[small[3].weight]
    assert state["row_var"].shape == (6, 3, 3, 1)
    assert optimizer.state[small[3].bias]["variance"].shape == (6,)
    step(small, optimizer, 7)


def test_a_state_that_lies_along_no_axis_is_refused_before_anything() -> None:
    model = network()
    optimizer = optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    masks().apply(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    speedup = ModelSpeedup(model, batch(9), {}, optimizer=optimizer)
    with pytest.raises(SpeedupError, match=r"0\.weight: LBFGS keeps .* make a new optimizer"):
        speedup.speedup_model()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_groups_hooks_gradients_and_frozen_parameters_stay() -> None:
    model = network()
    masks().apply(model)
    frozen = model[6].bias.requires_grad_(False)
    hooked = model[3].parametrizations.weight.original
    seen: list[tuple[int, ...]] = []
    hooked.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.1, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.2},
    ]
    optimizer = optim.SGD(groups, momentum=0.9)
    step(model, optimizer, 0)
    members = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    gradients = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    speedup = ModelSpeedup(model, batch(9), {}, optimizer=optimizer)
    small = speedup.speedup_model()
    assert members == [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert small[6].bias is frozen
    assert not frozen.requires_grad
    for path, parameter in small.named_parameters():
        if parameter.requires_grad:
            cut = speedup.plan.slices.get(path)
            old = gradients[id(parameter)]
            assert torch.equal(parameter.grad, old if cut is None else cut(old))
    step(small, optimizer, 1)
    assert seen == [(8, 4, 3, 3), (6, 3, 3, 3)]


def test_an_average_of_the_weights_shrinks_as_a_model_of_its_own() -> None:
    model, optimizer = trained(OPTIMIZERS["Adam"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    step(model, optimizer, 4)
    average.update_parameters(model)
    expected = average.eval()(batch(5))
    with pytest.raises(SpeedupError, match=r"pass model\.module"):
        ModelSpeedup(average, batch(9), {})
    ModelSpeedup(model, batch(9), {}, optimizer=optimizer).speedup_model()
    ModelSpeedup(average.module, batch(9), {}).speedup_model()
    torch.testing.assert_close(average(batch(5)), expected)
    step(model, optimizer, 6)
    average.update_parameters(model)
    assert average.module[0].weight.shape == model[0].weight.shape == (6, 3, 3, 3)


def test_an_optimizer_of_another_model_is_refused_before_anything() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    mask = torch.ones(6, 4)
    mask[0] = 0
    masks = {"0": {"weight": mask, "bias": mask[:, 0]}}
    alien = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    speedup = ModelSpeedup(model, torch.rand(2, 4), masks, optimizer=alien)
    with pytest.raises(SpeedupError, match="optimizer: this SGD trains no parameter of the model"):
        speedup.speedup_model()
    assert model[0].weight.shape == (6, 4)
    part = torch.optim.SGD(model[2].parameters(), lr=0.1)  # of a part is enough
    small = ModelSpeedup(model, torch.rand(2, 4), masks, optimizer=part).speedup_model()
    assert small[0].weight.shape == (5, 4)
