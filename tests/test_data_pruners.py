"""Pruners that look at data: what they find, on planted data and on digits."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from _data import digits
from oracle import randomise
from test_evaluator import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress import ModelSpeedup
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    FPGMPruner,
    L1FilterPruner,
    LAMPPruner,
    MovementPruner,
    OBDFilterPruner,
    Pruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
    WandaPruner,
)
from compress.pruners.base import Layer

HALF = [{"sparsity": 0.5, "op_types": ["default"]}]
BUT_LAST = [*HALF, {"exclude": True, "op_names": ["fc"]}]
ACTIVATION_PRUNERS = (ActivationAPoZRankFilterPruner, ActivationMeanRankFilterPruner)
MEASURING = (*ACTIVATION_PRUNERS, TaylorFOWeightFilterPruner, OBDFilterPruner)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Residual(nn.Module):
    """A small residual network; the stream is made by two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8 * 4, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.fc(F.relu(self.hidden(x)))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    randomise(model)
    return model


@cache
def batches() -> list[tuple[Tensor, Tensor]]:
    """Digits of 8×8, 64 at a time."""
    images, labels = digits(size=8).train.tensors
    return list(zip(images.split(64), labels.split(64), strict=True))[:12]


def evaluator(count: int = 4) -> Evaluator:
    return Evaluator(batches()[:count], F.cross_entropy, sgd)


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    Evaluator(batches(), F.cross_entropy, sgd).train(model, 6)
    return model


def trained() -> Any:
    """A network that tells digits apart, a new copy each time."""
    return copy.deepcopy(_trained())


def kept(masks: Masks, layer: str) -> list[int]:
    return masks[layer]["bias"].int().tolist()


def one_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


# --- what they find


@pytest.mark.parametrize("pruner", ACTIVATION_PRUNERS)
@pytest.mark.parametrize("norm", [True, False])
def test_planted_dead_units_are_found(pruner: type[Any], norm: bool) -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6)] if norm else []
    model = nn.Sequential(nn.Conv2d(1, 6, 3), *norms, nn.ReLU(inplace=True), nn.Flatten(),
                          nn.Linear(6 * 36, 2))  # fmt: skip
    model[0].weight.data[[1, 4]] *= 100  # the last that a norm of weights would take
    shift = model[1 if norm else 0].bias.data
    shift.fill_(0.5)
    shift[[1, 4]] = -1e4
    config_list = [{"sparsity": 0.34, "op_names": ["0"]}]
    masks = pruner(model, config_list, evaluator()).calc_masks()
    assert kept(masks, "0") == [1, 0, 1, 1, 0, 1]
    assert kept(L1FilterPruner(model, config_list).calc_masks(), "0") != kept(masks, "0")


def test_apoz_and_mean_by_hand() -> None:
    # Unit 0 is on for 1 of 4 inputs but strongly, unit 1 for 3 of 4 but weakly.
    model = one_layer(torch.tensor([[8.0], [0.5]]), torch.tensor([-16.0, -0.25]))
    data = [torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])]
    for activation in ("relu", "relu6"):
        scores = {}
        for kind in ACTIVATION_PRUNERS:
            pruner = kind(model, HALF, Evaluator(data), activation=activation)
            pruner.calc_masks()
            scores[kind] = pruner.score(Layer("", model, model.weight)).tolist()
        most = 8.0 if activation == "relu" else 6.0
        assert scores[ActivationAPoZRankFilterPruner] == [0.25, 0.75]
        assert scores[ActivationMeanRankFilterPruner] == [most / 4, (0.25 + 0.75 + 1.25) / 4]


class Odd(nn.Module):
    """Activations in every place but behind their layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).add_(x)
        y = torch.relu_(y + self.a(y))  # a is used twice, and reaches one activation in each use
        z = F.gelu(y)  # not the first one
        return self.b(z) * torch.sigmoid(self.c(z))


def test_the_recorded_activation_is_the_first_that_really_follows() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(50, 4)
    pruner = ActivationAPoZRankFilterPruner(model, HALF, Evaluator([x]))
    pruner.calc_masks()
    y = model.norm(model.a(x)) + x
    relu = F.relu(y + model.a(y))
    scores = {t.name: pruner._sums[t.name] for t in pruner.targets}
    # Both calls of a reach the same relu: the first one through the addition.
    assert scores["a"].count == 100
    torch.testing.assert_close(scores["a"].zeros, 2 * (relu == 0).sum(0))
    z = F.gelu(relu)
    torch.testing.assert_close(scores["b"].magnitude, model.b(z).abs().double().sum(0))  # none
    torch.testing.assert_close(scores["c"].magnitude, torch.sigmoid(model.c(z)).double().sum(0))


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, over all filters of a layer."""
    return float(torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1])


@pytest.mark.parametrize("kind", [TaylorFOWeightFilterPruner, OBDFilterPruner])
def test_taylor_ranks_filters_as_leaving_them_out_does(kind: type[Any]) -> None:
    model = trained().eval()
    data = batches()[:8]
    pruner = kind(model, [{"sparsity": 0.5, "op_names": ["hidden"]}], evaluator(8))
    pruner.calc_masks()
    scores = pruner.score(Layer("hidden", model.hidden, model.hidden.weight))
    truth = []
    with torch.no_grad():
        dense = [F.cross_entropy(model(x), y) for x, y in data]
        for unit in range(len(scores)):
            saved = model.hidden.weight[unit].clone()
            model.hidden.weight[unit] = 0
            changed = [F.cross_entropy(model(x), y) for x, y in data]
            truth.append(sum((a - b) ** 2 for a, b in zip(changed, dense, strict=True)))
            model.hidden.weight[unit] = saved
    assert correlation(scores, torch.stack(truth)) > 0.7


def test_taylor_by_hand_over_batches() -> None:
    model = one_layer(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    data = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 4.0]])]
    own = Evaluator(data, loss=lambda model, x: model(x).square().sum() / 2)
    pruner = TaylorFOWeightFilterPruner(model, HALF, own)
    pruner.calc_masks()
    # Batch by batch: outputs (-3, 4) and (-9, -1); the gradient is output ⊗ input.
    first = [(1 * -3) ** 2 + (-2 * -6) ** 2, (3 * 4) ** 2 + (0.5 * 8) ** 2]
    second = [(1 * 9) ** 2 + (-2 * -36) ** 2, (3 * 1) ** 2 + (0.5 * -4) ** 2]
    expected = [a + b for a, b in zip(first, second, strict=True)]
    assert pruner.score(Layer("", model, model.weight)).tolist() == expected


def test_obd_is_the_hessians_diagonal() -> None:
    # ½ Σ x² (w·x)²-like losses have the Hessian x xᵀ for each row; with one-hot x it is diagonal,
    # so that the estimate is exact whatever the signs.
    model = one_layer(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    data = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    own = Evaluator(data, loss=lambda model, x: model(x).square().sum() / 2)
    pruner = OBDFilterPruner(model, HALF, own, samples=1)
    pruner.calc_masks()
    expected = [(4 * 1 + 9 * 4) / 2, (4 * 9 + 9 * 0.25) / 2]
    assert pruner.score(Layer("", model, model.weight)).tolist() == expected


def test_obd_where_there_is_no_curvature() -> None:
    model = one_layer(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    data = [torch.ones(1, 2)]
    flat = OBDFilterPruner(model, HALF, Evaluator(data, loss=lambda m, x: m(x).sum()))
    assert kept_rows(flat.calc_masks()) == [0, 1]
    assert flat._scores[""].tolist() == [0, 0]
    once = Evaluator(data, loss=lambda m, x: F.hardsigmoid(m(x)).sum())
    with pytest.raises(CompressError, match=r"this model's loss twice: derivative for .* Use Tayl"):
        OBDFilterPruner(model, HALF, once).calc_masks()


def kept_rows(masks: Masks) -> list[int]:
    return masks[""]["weight"].any(1).int().tolist()


def test_slim_gathers_gammas_near_zero_and_masks_those() -> None:
    model, plain = trained(), trained()
    config_list = [{"total_sparsity": 0.18, "op_types": ["BatchNorm2d"]}]
    options: dict[str, Any] = {"mode": "global", "training_epochs": 25, "scale": 0.05}
    _, masks = SlimPruner(model, config_list, evaluator(12), **options).compress()
    evaluator(12).train(plain, 25)

    def gammas(model: nn.Module) -> Tensor:
        norms = (model.get_submodule(name) for name in ("bn1", "bn2", "bn3"))
        return torch.cat([norm.weight.detach().abs() for norm in norms])

    with suspend_masks(model):
        sparse = gammas(model)
    stays = torch.cat([masks[name]["weight"] for name in ("bn1", "bn2", "bn3")])
    assert int((~stays).sum()) == 4  # of 22
    assert sparse[~stays].max() <= sparse[stays].min()
    # Some are nearly nothing, and those are masked; training without the penalty leaves all large.
    assert sparse[~stays].max() < 0.05 * sparse.max()
    assert gammas(plain).min() > 0.2 * gammas(plain).max()
    assert sparse.median() < 0.3 * gammas(plain).median()


def test_slim_adds_its_subgradient_in_each_step() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight.data = torch.tensor([1.0, -1.0, 0.0])
    config_list = [{"sparsity": 0.4, "op_types": ["BatchNorm1d"]}]
    data = [torch.rand(4, 2)] * 2
    nothing = Evaluator(
        data, None, lambda p: torch.optim.SGD(p, 1.0), loss=lambda m, x: m(x).sum() * 0
    )
    pruner = SlimPruner(model, config_list, nothing, scale=0.25, training_epochs=1)
    _, masks = pruner.compress()
    with suspend_masks(model):
        assert model[1].weight.tolist() == [0.5, -0.5, 0.0]
    assert masks["1"]["weight"].tolist() == masks["1"]["bias"].tolist() == [True, True, False]


def test_movement_sums_over_the_steps() -> None:
    model = one_layer(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    data = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])]
    own = Evaluator(
        data, None, lambda p: torch.optim.SGD(p, 0.5), loss=lambda m, x: m(x)[0, 0] - m(x)[0, 1]
    )
    pruner = MovementPruner(model, HALF, own, training_epochs=1)
    with pytest.raises(CompressError, match=r"no scores yet: they come from training"):
        pruner.calc_masks()
    _, masks = pruner.compress()
    # Gradients [[1, 1], [-1, -1]] then [[1, -1], [-1, 1]]; weights move between the two.
    first = torch.tensor([[-1.0, 2.0], [3.0, 4.0]])
    second = torch.tensor([[-0.5, -2.5], [3.5, -4.5]])
    scores = first + second
    assert pruner._scores[""].reshape(2, 2).tolist() == scores.tolist()
    assert masks[""]["weight"].int().tolist() == [[0, 0], [1, 1]]
    assert pruner.calc_masks() == masks


def test_wanda_by_hand() -> None:
    model = one_layer(torch.tensor([[3.0, -2.0, 1.0], [1.0, -6.0, 2.0], [2.0, 2.0, 2.0]]))
    data = [torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 4.0]]])]
    config_list = [{"sparsity": 0.34, "op_types": ["Linear"]}]
    pruner = WandaPruner(model, config_list, Evaluator(data))
    masks = pruner.calc_masks()
    norms = [1.0, 2.0, 5.0]
    expected = [[3.0, 4.0, 5.0], [1.0, 12.0, 10.0], [2.0, 4.0, 10.0]]
    assert pruner.score(Layer("", model, model.weight)).tolist() == expected
    assert pruner._sums[""].squares.sqrt().tolist() == norms
    assert masks[""]["weight"].int().tolist() == [[0, 1, 1]] * 3
    zeros = one_layer(torch.zeros(2, 4))  # of equal ones the first go
    ties = WandaPruner(zeros, HALF, Evaluator([torch.ones(1, 4)])).calc_masks()
    assert ties[""]["weight"].int().tolist() == [[0, 0, 1, 1]] * 2


def test_wanda_takes_transformers_conv1d() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, plain = Conv1D(3, 4), nn.Linear(4, 3)
    layer.weight.data = plain.weight.data.t().contiguous()
    data = Evaluator([torch.rand(5, 4)])
    masks = [WandaPruner(m, HALF, data).calc_masks()[""]["weight"] for m in (layer, plain)]
    assert torch.equal(masks[0], masks[1].t())


def test_lamp_by_hand() -> None:
    model = nn.Sequential(
        one_layer(torch.tensor([[1.0, -2.0], [0.0, 2.0]])), one_layer(torch.tensor([[10.0, 20.0]]))
    )
    pruner = LAMPPruner(model, [{"total_sparsity": 0.5, "op_types": ["default"]}])
    scores = [pruner.score(Layer(str(i), m, m.weight.detach())) for i, m in enumerate(model)]
    # Squares 0 1 4 4, and the sums of what is not smaller: 9 9 8 4; of equal ones the first first.
    torch.testing.assert_close(scores[0], torch.tensor([1 / 9, 4 / 8, 0, 1.0]).double())
    torch.testing.assert_close(scores[1], torch.tensor([100 / 500, 1.0]).double())
    masks = pruner.calc_masks()
    assert masks["0"]["weight"].int().tolist() == [[0, 1], [0, 1]]
    assert masks["1"]["weight"].int().tolist() == [[0, 1]]
    assert LAMPPruner(nn.Linear(2, 2), HALF, mode="normal").calc_masks().sparsity == 2 / 4
    dead = one_layer(torch.zeros(2, 3))
    assert LAMPPruner(dead, HALF, mode="normal").score(
        Layer("", dead, dead.weight)
    ).tolist() == [0] * 6  # fmt: skip


def test_fpgm_drops_planted_duplicates_where_l1_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        model.weight[:4] = model.weight[0] * 3  # large, and replaceable by one of them
        # Four of one place are the densest there is; the other four are small and all different.
    config_list = [{"sparsity": 0.375, "op_types": ["Conv2d"]}]
    by_distance = FPGMPruner(model, config_list).calc_masks()[""]["bias"]
    by_norm = L1FilterPruner(model, config_list).calc_masks()[""]["bias"]
    assert int((~by_norm[:4]).sum()) == 0
    assert int((~by_distance[:4]).sum()) == 3


# --- shared weights


def test_tied_layers_are_scored_once_over_all_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    data = [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(2)]
    own = Evaluator(data, F.cross_entropy)
    config_list = [{"sparsity": 0.5, "op_names": ["0", "2"]}]
    inside = [x for x, _ in data] + [F.relu(model[0](x)) for x, _ in data]

    wanda = WandaPruner(model, config_list, own)
    masks = wanda.calc_masks()
    assert torch.equal(masks["0"]["weight"], masks["2"]["weight"])
    squares = torch.cat(inside).double().square().sum(0)
    torch.testing.assert_close(wanda._sums["0"].squares, squares)

    apoz = ActivationAPoZRankFilterPruner(model, config_list, own)
    masks = apoz.calc_masks()
    assert torch.equal(masks["0"]["bias"], masks["2"]["bias"])
    outputs = [F.relu(model[i](x)) for i, half in ((0, inside[:2]), (2, inside[2:])) for x in half]
    torch.testing.assert_close(apoz._sums["0"].zeros, (torch.cat(outputs) == 0).sum(0))

    taylor = TaylorFOWeightFilterPruner(model, config_list, own)
    taylor.calc_masks()
    expected = torch.zeros(4)
    for x, y in data:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
        expected += (gradient * model[0].weight).square().sum(1).detach()
    torch.testing.assert_close(taylor._scores["0"], expected)


# --- nothing else is changed


@pytest.mark.parametrize("kind", [*MEASURING, WandaPruner])
def test_calc_masks_changes_nothing(kind: type[Any]) -> None:
    model = residual().train()
    model.bn1.eval()
    model.hidden.weight.requires_grad_(False)
    model(batches()[0][0]).sum().backward()
    before = snapshot(model)
    pruner = kind(model, BUT_LAST, evaluator())
    masks = pruner.calc_masks()
    assert_unchanged(before, snapshot(model))
    assert pruner.calc_masks() == masks  # and so the same again
    _, applied = pruner.compress()
    assert applied == masks == applied_masks(model)
    assert pruner.calc_masks() == masks  # without its own masks on
    assert applied_masks(model) == masks


@pytest.mark.parametrize("kind", [*MEASURING, WandaPruner, SlimPruner, MovementPruner])
def test_nothing_is_left_where_the_users_loss_raises(kind: type[Any]) -> None:
    model = residual()
    L1FilterPruner(model, [{"sparsity": 0.2, "op_names": ["conv1"]}]).compress()
    calls = []

    def stumble(model: nn.Module, batch: Any) -> Any:
        calls.append(model(batch[0]))
        if len(calls) == 2:
            raise ZeroDivisionError
        return calls[-1].square().mean()

    broken = Evaluator(batches()[:3], None, sgd, loss=stumble, forward=stumble)
    config_list = [{"sparsity": 0.5, "op_types": ["default"]}]
    pruner = kind(model, config_list, broken)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        pruner.compress()
    assert_unchanged(before, snapshot(model))


def test_masks_from_before_are_on_while_it_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.data.fill_(2)
    dead = torch.tensor([True, False, True, True])
    Masks({"0": {"weight": dead[:, None].expand(4, 3), "bias": dead}}).apply(model)
    x = torch.rand(9, 3)
    pruner = WandaPruner(model, [{"sparsity": 0.25, "op_names": ["2"]}], Evaluator([x]))
    for _ in range(2):
        _, masks = pruner.compress()
        assert masks["2"]["weight"].int().tolist() == [[1, 0, 1, 1]] * 2
        assert torch.equal(masks["0"]["bias"], dead)
        assert masks == applied_masks(model)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (TaylorFOWeightFilterPruner, {}, "evaluator: got None; it looks at data: pass evaluator="),
        (TaylorFOWeightFilterPruner, {"evaluator": Evaluator()}, "its Evaluator has no train_load"),
        (SlimPruner, {"evaluator": Evaluator([1])}, "it trains, and its Evaluator has no optimize"),
        (SlimPruner, {"training_epochs": -1}, "training_epochs: got -1; expected a whole number"),
        (SlimPruner, {"scale": -1.0}, "scale: got -1.0; expected a number ≥ 0"),
        (MovementPruner, {"training_epochs": 0}, "its scores come from training: expected 1 or"),
        (OBDFilterPruner, {"samples": 0}, "samples: got 0; expected a whole number ≥ 1"),
        (WandaPruner, {"training_batches": 0}, "training_batches: got 0; expected a whole number"),
        (WandaPruner, {"trainer": print}, "it needs both trainer and optimizer, or evaluator="),
        (ActivationAPoZRankFilterPruner, {"activation": "tanh"}, "activation: got 'tanh'; expect"),
    ],
)
def test_wrong_arguments(kind: type[Any], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), HALF, **options)
    assert expected in str(caught.value)


def test_obd_refuses_a_trainer() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="it differentiates twice, which a trainer does not let"):
        OBDFilterPruner(model, HALF, trainer=print, optimizer=sgd(model.parameters()))


@pytest.mark.parametrize("kind", [*MEASURING, WandaPruner, MovementPruner])
def test_a_layer_that_no_batch_uses(kind: type[Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].spare = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    data = Evaluator([torch.rand(3, 2)], None, sgd, loss=lambda m, x: m(x).sum())
    with pytest.raises(CompressError, match=r"measured nothing of '0\.spare': no batch used"):
        kind(model, HALF, data).compress()
    assert list(model.state_dict()) == list(before)
    assert not applied_masks(model)


def test_a_batch_norm_without_weights_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    with pytest.raises(ConfigError, match=r"'1': it has no weight \(affine=False\); exclude it"):
        SlimPruner(model, HALF, training_epochs=0)


# --- from config_list to a smaller model


def check_shrinks(model: nn.Module, pruner: Pruner, least: float = 0.0) -> ModelSpeedup:
    """Mask, shrink, compare; at least this fraction of the parameters goes."""
    x = batches()[0][0]
    _, masks = pruner.compress()
    model.eval()
    expected, size = model(x), sum(p.numel() for p in model.parameters())
    speedup = ModelSpeedup(model, x, masks)
    small = speedup.speedup_model()
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) <= (1 - least) * size
    return speedup


@pytest.mark.parametrize("mode", ["normal", "global", "dependency_aware"])
@pytest.mark.parametrize("kind", [*MEASURING, SlimPruner])
def test_filters_to_a_smaller_model(kind: type[Any], mode: str) -> None:
    model = residual()
    key = "total_sparsity" if mode == "global" else "sparsity"
    config_list = [{key: 0.5, "op_types": ["default"]}, {"exclude": True, "op_names": ["fc"]}]
    options: dict[str, Any] = {"training_epochs": 1} if kind is SlimPruner else {}
    if mode == "dependency_aware":
        options["dummy_input"] = batches()[0][0][:1]
    pruner = kind(model, config_list, evaluator(), mode=mode, **options)
    speedup = check_shrinks(model, pruner, least=0.3)
    if mode == "dependency_aware":
        assert all(not layer.kept for layer in speedup.report.layers)
        assert model.conv1.weight.shape[0] == model.conv3.weight.shape[0] == 4


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (WandaPruner, {"sparsity": 0.5}, {}),
        (MovementPruner, {"sparsity": 0.96}, {"training_epochs": 1}),
        (LAMPPruner, {"total_sparsity": 0.75}, {}),
    ],
)
def test_weights_to_a_smaller_model(
    kind: type[Any], config: dict[str, float], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10)
    )
    with torch.no_grad():
        if kind is WandaPruner:
            model[1].bias[:16] = -1e4  # inputs of the next layer that are never there
        else:
            model[3].weight[5:] *= 1e-6
    if kind is not LAMPPruner:
        options = {"evaluator": evaluator(), **options}
    pruner = kind(model, [{**config, "op_names": ["3"]}], **options)
    check_shrinks(model, pruner, least=0.2 if kind is not MovementPruner else 0.05)


def test_nni_users_bring_a_trainer() -> None:
    model = residual()
    optimizer = sgd(model.parameters())

    def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        model.train()
        for x, y in batches()[:3]:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    v1 = {"trainer": trainer, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss()}
    before = snapshot(model, optimizer)
    for kind in (*ACTIVATION_PRUNERS, TaylorFOWeightFilterPruner, WandaPruner):
        kind(model, BUT_LAST, **v1, training_batches=2).calc_masks()
    assert_unchanged(before, snapshot(model, optimizer))
    slim = SlimPruner(model, [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], **v1)
    assert slim.training_epochs == 10
    slim.training_epochs = 1
    check_shrinks(model, slim, least=0.3)


def test_dependency_aware_slim_masks_the_filters_and_leaves_excluded_norms() -> None:
    model, x = residual(), batches()[0][0][:1]
    half = {"sparsity": 0.5, "op_types": ["BatchNorm2d"]}
    options: dict[str, Any] = {"training_epochs": 0, "mode": "dependency_aware", "dummy_input": x}
    masks = SlimPruner(model, [half], **options).calc_masks()
    for norm, conv in (("bn1", "conv1"), ("bn2", "conv2"), ("bn3", "conv3")):
        rows = masks[conv]["weight"].flatten(1)
        assert torch.equal(rows.all(1), masks[norm]["weight"])
        assert torch.equal(rows.any(1), masks[norm]["bias"])
    assert torch.equal(masks["bn1"]["weight"], masks["bn3"]["weight"])
    assert "hidden" not in masks
    # bn3 may not lose any, so that bn1, which meets it in the addition, may not either.
    with pytest.warns(UserWarning, match="masks nothing of 'bn1'"):
        masks = SlimPruner(
            model, [half, {"exclude": True, "op_names": ["bn3"]}], **options
        ).calc_masks()
    assert masks["bn1"]["weight"].all()
    assert int(masks["bn2"]["weight"].sum()) == 3
    assert masks["conv2"]["weight"].flatten(1).any(1).int().tolist() == kept(masks, "bn2")


def test_slim_silences_grouped_transposed_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    randomise(model)
    x = torch.rand(2, 1, 5, 5)
    config_list = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    options: dict[str, Any] = {"mode": "dependency_aware", "dummy_input": x, "training_epochs": 0}
    _, masks = SlimPruner(model, config_list, **options).compress()
    silent = model[:2](x).abs().sum((0, 2, 3)) == 0
    assert torch.equal(~silent, masks["2"]["weight"])
    assert int(silent.sum()) == 2  # as many in each group


def test_names_of_nni() -> None:
    for name in compress.__all__:
        assert getattr(compress, name) is not None
    for short, long in (
        ("L1NormPruner", "L1FilterPruner"),
        ("L2NormPruner", "L2FilterPruner"),
        ("TaylorFOWeightPruner", "TaylorFOWeightFilterPruner"),
        ("ActivationAPoZRankPruner", "ActivationAPoZRankFilterPruner"),
        ("ActivationMeanRankPruner", "ActivationMeanRankFilterPruner"),
    ):
        assert getattr(compress, short) is getattr(compress, long)
