"""What pruners that look at data find: by hand, on planted data and on digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digit_networks import (
    ACTIVATION_PRUNERS,
    HALF,
    batches,
    evaluator,
    kept,
    one_layer,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.evaluator import Evaluator
from compress.masks import Masks, suspend_masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    FPGMPruner,
    L1FilterPruner,
    LAMPPruner,
    MovementPruner,
    OBDFilterPruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
    WandaPruner,
)
from compress.pruners.base import Layer

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


def without_magnitudes(model: Any) -> Any:
    """Computes the same, and the norm of a hidden unit's weights says nothing of what it is worth.

    ReLU lets a factor through, so that each unit can be larger and what reads it smaller.
    """
    factor = torch.logspace(-1, 1, 20)[
        torch.randperm(20, generator=torch.Generator().manual_seed(1))
    ]
    with torch.no_grad():
        model.hidden.weight *= factor[:, None]
        model.hidden.bias *= factor
        model.fc.weight /= factor
    return model


def loss_without_each(model: Any, layer: nn.Module) -> Tensor:
    """(units,), the squared changes of the loss, summed over 8 batches, as each filter is 0."""
    data, truth = batches()[:8], []
    with torch.no_grad():
        dense = [F.cross_entropy(model(x), y) for x, y in data]
        for unit in range(len(layer.weight)):
            saved = layer.weight[unit].clone()
            layer.weight[unit] = 0
            changed = [F.cross_entropy(model(x), y) for x, y in data]
            truth.append(sum((a - b) ** 2 for a, b in zip(changed, dense, strict=True)))
            layer.weight[unit] = saved
    return torch.stack(truth)


HIDDEN = [{"sparsity": 0.5, "op_names": ["hidden"]}]


@pytest.mark.parametrize("kind", [TaylorFOWeightFilterPruner, OBDFilterPruner])
def test_taylor_ranks_filters_as_leaving_them_out_does(kind: type[Any]) -> None:
    model = trained().eval()
    pruner = kind(model, HIDDEN, evaluator(8))
    pruner.calc_masks()
    scores = pruner.score(Layer("hidden", model.hidden, model.hidden.weight))
    assert correlation(scores, loss_without_each(model, model.hidden)) > 0.8


def test_taylor_ranks_them_so_where_norms_mislead() -> None:
    model = without_magnitudes(trained().eval())
    layer = Layer("hidden", model.hidden, model.hidden.weight)
    pruner = TaylorFOWeightFilterPruner(model, HIDDEN, evaluator(8))
    pruner.calc_masks()
    truth = loss_without_each(model, model.hidden)
    assert correlation(pruner.score(layer), truth) > 0.8
    assert correlation(L1FilterPruner(model, HIDDEN).score(layer), truth) < 0.4


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
    assert sparse[~stays].max() < 0.1 * sparse.max()
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
    assert pruner.score(Layer("", model, model.weight)).reshape(3, 3).tolist() == expected
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
