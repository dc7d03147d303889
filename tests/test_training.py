"""Clipping against gradients by hand, and what is frozen around a plan."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner, Masks, ModelSpeedup
from compress.errors import ConfigError
from compress.speedup.plan import Plan
from compress.training import (
    clip_grad_adaptive,
    clip_grad_norm,
    clip_grad_value,
    unfreeze_around,
)


def linear(weight: list[list[float]], grad: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    layer.weight.grad = torch.tensor(grad)
    return layer


@pytest.mark.parametrize("whole", [True, False])
def test_norm_and_value_by_hand(whole: bool) -> None:
    model = linear([[1.0, 1.0]], [[3.0, -4.0]])
    given: Any = model if whole else model.parameters()
    assert float(clip_grad_norm(given, 1.0)) == 5
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, -0.8]]))
    assert float(clip_grad_norm(model, 2.0)) == pytest.approx(1)  # below: as it is
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, -0.8]]))
    clip_grad_value(model if whole else model.parameters(), 0.7)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, -0.7]]))


def test_adaptive_by_hand() -> None:
    weight = [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]]
    model = linear(weight, [[30.0, 40.0], [3.0, 4.0], [0.03, 0.04]])
    clip_grad_adaptive(model, clip_factor=0.1, eps=0.01)
    # 0.1 · 5 of 50; 0.1 · 0.01 of 5, since ‖W‖ is 0; and 0.05 is below 0.5.
    expected = torch.tensor([[0.3, 0.4], [0.0006, 0.0008], [0.03, 0.04]])
    torch.testing.assert_close(model.weight.grad, expected)


def test_adaptive_of_vectors_and_masked_weights() -> None:
    model = nn.Linear(2, 2)
    model.weight.data, model.bias.data = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.ones(2) * 3
    Masks({"": {"weight": torch.tensor([[1, 0], [1, 1]])}}).apply(model)
    raw = model.parametrizations.weight.original
    raw.grad, model.bias.grad = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([3.0, 4.0])
    clip_grad_adaptive(model, clip_factor=0.1)
    # The first row's weight is 3 and not 5.
    torch.testing.assert_close(raw.grad, torch.tensor([[0.3, 0.0], [0.3, 0.4]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([3.0, 4.0]) * (0.1 * 18**0.5 / 5))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Embedding(5, 3),
        nn.Conv1d(2, 3, 2).half(),
    ],
    ids=repr,
)
def test_adaptive_is_one_factor_for_each_filter(layer: nn.Module) -> None:
    torch.manual_seed(0)
    weight = layer.weight
    weight.grad = torch.randn_like(weight) * 0.1
    before = weight.grad.clone()
    clip_grad_adaptive(layer, clip_factor=0.05)
    ratio = (weight.grad / before).float()
    own = weight.detach().float()
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out/groups, ...): by group and output
        ratio, own, before = (
            t.float().reshape(2, 2, 3, 9).transpose(1, 2).reshape(6, -1)
            for t in (ratio, own, before)
        )
    ratio, own, before = (t.float().flatten(1) for t in (ratio, own, before))
    expected = (0.05 * own.norm(dim=1) / before.norm(dim=1)).clamp(max=1)
    torch.testing.assert_close(ratio, expected[:, None].expand_as(ratio), rtol=5e-3, atol=1e-3)


def test_adaptive_leaves_out_what_is_excluded_or_has_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model[1:]:
        layer.weight.grad = torch.full((2, 2), 100.0)
    clip_grad_adaptive(model, exclude=["2"])
    assert model[0].weight.grad is None
    assert float(model[1].weight.grad.max()) < 1 and float(model[2].weight.grad.min()) == 100
    with pytest.raises(ConfigError, match="'3': the model has no module of this name"):
        clip_grad_adaptive(model, exclude=["3"])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: clip_grad_norm(m, 0),
        lambda m: clip_grad_value(m, -1),
        lambda m: clip_grad_adaptive(m, float("nan")),
        lambda m: clip_grad_adaptive(m, eps=0),
    ],
)
def test_limits_are_above_zero(call: Any) -> None:
    with pytest.raises(ConfigError, match="expected a number > 0"):
        call(nn.Linear(2, 2))


# -- freezing ------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv4, self.norm4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        x = self.norm4(self.conv4(self.norm3(self.conv3(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


X = torch.rand(4, 3, 10, 10)


def shrunk() -> tuple[Net, Plan]:
    torch.manual_seed(0)
    model = Net()
    config_list = [{"sparsity": 0.5, "op_names": ["conv2"]}]
    options: dict[str, Any] = {"mode": "dependency_aware", "dummy_input": X}
    _, masks = L1FilterPruner(model, config_list, **options).compress()
    speedup = ModelSpeedup(model, X, masks)
    speedup.speedup_model()
    return model, speedup.plan


AROUND = {"conv2", "norm2", "conv3", "norm3", "head"}


def owners(names: Any) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_what_a_plan_changed_its_norms_and_the_classifier_train() -> None:
    model, plan = shrunk()
    model.conv2.bias.requires_grad_(False)  # the user's own wish
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with unfreeze_around(model, plan) as parts:
        assert owners(parts.trainable) == AROUND and "conv2.bias" not in parts.trainable
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parts.trainable)
        assert model.conv1.weight.grad is None
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(4)).backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= set(parts.trainable) and owners(moved) == AROUND
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"conv2.bias"}
    parts.restore()
    assert model.conv1.weight.requires_grad and not model.conv2.bias.requires_grad


def test_it_is_undone_by_a_call_or_after_an_error() -> None:
    model, plan = shrunk()
    parts = unfreeze_around(model, plan, classifier="norm4")
    assert owners(parts.trainable) == AROUND - {"head"} | {"norm4"}
    parts.restore()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError), unfreeze_around(model, plan):
        raise RuntimeError
    assert all(p.requires_grad for p in model.parameters())


def test_a_plan_that_is_only_planned_and_a_masked_model() -> None:
    torch.manual_seed(0)
    model = Net()
    keep = torch.arange(8) < 4
    masks = Masks({
        "conv2": {"weight": keep[:, None, None, None].expand(8, 8, 3, 3), "bias": keep},
        "norm2": {"weight": keep, "bias": keep},
    })  # fmt: skip
    masks.apply(model)
    parts = unfreeze_around(model, ModelSpeedup(model, X).plan)
    assert owners(parts.trainable) == AROUND
    assert "conv2.parametrizations.weight.original" in parts.trainable


def test_wrong_plans_are_refused_and_nothing_is_frozen() -> None:
    model, plan = shrunk()
    with pytest.raises(ConfigError, match="plan: it changes no layer"):
        unfreeze_around(model, Plan())
    with pytest.raises(ConfigError, match=r"it changes 'conv2', which this Linear does not have"):
        unfreeze_around(nn.Linear(2, 2), plan)
    with pytest.raises(ConfigError, match="'heads': the model has no module of this name; did you"):
        unfreeze_around(model, plan, classifier="heads")
    assert all(p.requires_grad for p in model.parameters())


def test_arguments_of_other_kinds_are_refused_by_name() -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"model: got generator; expected the torch\.nn\.Module"):
        clip_grad_adaptive(model.parameters())
    with pytest.raises(ConfigError, match=r"plan: got NoneType; expected speedup\.plan"):
        unfreeze_around(model, None)  # type: ignore[arg-type]
