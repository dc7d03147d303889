"""SNIP and GraSP: scores by hand, and from config_list to a smaller model before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digit_networks import BUT_LAST, HALF, batches, evaluator, one_layer, residual, sgd
from oracle import randomise
from snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ModelSpeedup
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator
from compress.pruners import GraSPPruner, SNIPFilterPruner, SNIPPruner
from compress.pruners.base import Layer

KINDS = (SNIPPruner, SNIPFilterPruner, GraSPPruner)
TOTAL = [{"total_sparsity": 0.5, "op_types": ["default"]}]


def config_of(kind: type[Any]) -> list[dict[str, Any]]:
    return HALF if kind is SNIPFilterPruner else TOTAL


def scores_of(pruner: Any) -> Tensor:
    pruner.calc_masks()
    layer = pruner.model
    return pruner.score(Layer("", layer, layer.weight.detach()))


# --- by hand


def test_snip_by_hand_over_batches() -> None:
    model = one_layer(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    data = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 4.0]])]
    own = Evaluator(data, loss=lambda model, x: model(x).square().sum() / 2)
    # Outputs (-3, 3) and (-9, -3); gradients [[-3, -6], [3, 6]] and [[9, -36], [3, -12]].
    expected = [abs(1.0 * 6), abs(-2.0 * -42), abs(3.0 * 6), 0.0]
    assert scores_of(SNIPPruner(model, TOTAL, own)).tolist() == expected
    assert scores_of(SNIPFilterPruner(model, HALF, own)).tolist() == [90.0, 18.0]
    masks = SNIPPruner(model, TOTAL, own).calc_masks()
    assert masks[""]["weight"].int().tolist() == [[0, 1], [1, 0]]


def test_snip_of_one_channel_of_zeros_and_of_ties() -> None:
    data = Evaluator([torch.ones(1, 4)], loss=lambda model, x: model(x).sum())
    ties = one_layer(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    masks = SNIPPruner(ties, TOTAL, data).calc_masks()
    assert masks[""]["weight"].int().tolist() == [[0, 0, 1, 1]]  # of equal ones the first go
    assert scores_of(SNIPPruner(one_layer(torch.zeros(1, 4)), TOTAL, data)).tolist() == [0] * 4
    assert scores_of(SNIPFilterPruner(ties, HALF, data)).tolist() == [4.0]


def test_grasp_by_hand_over_batches() -> None:
    # ½Σ(w·x)² has the gradient (w·x)x and the Hessian xxᵀ for each row; over two batches that is
    # g = wA and Hg = gA with A = Σ xxᵀ = [[2, -2], [-2, 20]].
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    data = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 4.0]])]
    own = Evaluator(data, loss=lambda model, x: model(x).square().sum() / 2)
    a = sum(x.T @ x for x in data)
    expected = weight * (weight @ a @ a)
    pruner = GraSPPruner(one_layer(weight), TOTAL, own, temperature=1)
    assert scores_of(pruner).reshape(2, 2).tolist() == expected.tolist()
    assert expected.tolist() == [[96.0, 1704.0], [72.0, 0.0]]
    assert pruner.calc_masks()[""]["weight"].int().tolist() == [[1, 1], [0, 0]]


def test_grasp_is_the_change_of_the_squared_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3).double(), torch.randint(0, 3, (8,))
    own = Evaluator([(x, y)], F.cross_entropy)
    pruner = GraSPPruner(model, TOTAL, own, temperature=5.0)
    pruner.calc_masks()

    def flow() -> Tensor:
        weights = [model[0].weight, model[2].weight]
        gradients = torch.autograd.grad(F.cross_entropy(model(x) / 5, y), weights)
        return sum(g.square().sum() for g in gradients)

    for number in (0, 2):
        weight = model[number].weight
        scores = pruner.score(Layer(str(number), model[number], weight.detach())).reshape_as(weight)
        for index in ((0, 0), (1, 2)):
            full, step = weight.data[index].item(), 1e-5
            weight.data[index] = full * (1 - step)
            less = flow()
            weight.data[index] = full * (1 + step)
            more = flow()
            weight.data[index] = full
            change = (less - more) / (2 * step)  # by removing it, to first order
            torch.testing.assert_close(change, -2 * scores[index], rtol=1e-5, atol=1e-12)


def test_a_temperature_of_200_divides_the_logits() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    layer = nn.Linear(3, 2, bias=False)
    cold = Evaluator([(x, y)], lambda output, y: F.cross_entropy(output / 200, y))
    expected = scores_of(GraSPPruner(layer, TOTAL, cold, temperature=1))
    found = scores_of(GraSPPruner(layer, TOTAL, Evaluator([(x, y)], F.cross_entropy)))
    torch.testing.assert_close(found, expected)
    assert not layer._forward_hooks


def test_scores_are_those_of_batch_norms_that_see_the_batch() -> None:
    model = residual().eval()
    x, y = batches()[0]
    pruner = SNIPPruner(model, [{"total_sparsity": 0.5, "op_names": ["conv1"]}], evaluator(1))
    before = snapshot(model)
    pruner.calc_masks()
    assert_unchanged(before, snapshot(model))
    found = pruner.score(Layer("conv1", model.conv1, model.conv1.weight.detach()))
    model.train()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.conv1.weight])
    torch.testing.assert_close(found, (gradient * model.conv1.weight).abs().flatten().detach())


def test_a_gate_on_a_filter_with_a_norm_feels_nothing_so_that_entries_are_scored() -> None:
    model = residual()
    config_list = [{"sparsity": 0.5, "op_names": ["conv1"]}]
    total = [{"total_sparsity": 0.5, "op_names": ["conv1"]}]
    weight = model.conv1.weight.detach()
    by_filter = SNIPFilterPruner(model, config_list, evaluator(1))
    by_filter.calc_masks()
    gradient = by_filter._found["conv1"]
    scores = by_filter.score(Layer("conv1", model.conv1, weight))
    assert scores.count_nonzero() > 4
    gates = (gradient * weight).flatten(1).sum(1)
    assert gates.abs().max() < 1e-3 * scores.max()
    grasp = GraSPPruner(model, total, evaluator(1), temperature=1)
    grasp.calc_masks()
    sums = (grasp._found["conv1"] * weight).flatten(1).sum(1)
    torch.testing.assert_close(sums, -gradient.square().flatten(1).sum(1), rtol=1e-2, atol=1e-5)


# --- nothing else is changed


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_nothing(kind: type[Any]) -> None:
    model = residual().train()
    model.bn1.eval()
    model.hidden.weight.requires_grad_(False)
    model(batches()[0][0]).sum().backward()
    before = snapshot(model)
    pruner = kind(model, config_of(kind), evaluator())
    masks = pruner.calc_masks()
    assert_unchanged(before, snapshot(model))
    assert pruner.calc_masks() == masks
    _, applied = pruner.compress()
    assert applied == masks == pruner.calc_masks()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_where_the_users_loss_raises(kind: type[Any]) -> None:
    model, calls = residual(), []

    def stumble(output: Tensor, target: Tensor) -> Tensor:
        calls.append(output)
        if len(calls) == 2:
            raise ZeroDivisionError
        return F.cross_entropy(output, target)

    pruner = kind(model, config_of(kind), Evaluator(batches()[:3], stumble))
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        pruner.compress()
    assert_unchanged(before, snapshot(model))


# --- from config_list to a smaller model


@pytest.mark.parametrize("kind", [SNIPPruner, GraSPPruner])
@pytest.mark.parametrize("mode", ["global", "normal"])
def test_weights_to_a_smaller_model(kind: type[Any], mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10)
    )
    randomise(model)
    key = "total_sparsity" if mode == "global" else "sparsity"
    pruner = kind(model, [{key: 0.97, "op_names": ["1", "3"]}], evaluator(), mode=mode)
    _, masks = pruner.compress()
    assert abs(masks.sparsity - 0.97) < 1e-3
    check_smaller(model, masks)


@pytest.mark.parametrize("mode", ["normal", "global", "dependency_aware"])
def test_filters_to_a_smaller_model(mode: str) -> None:
    model = residual()
    key = "total_sparsity" if mode == "global" else "sparsity"
    options = {"dummy_input": batches()[0][0][:1]} if mode == "dependency_aware" else {}
    config_list = [{key: 0.5, "op_types": ["default"]}, *BUT_LAST[1:]]
    _, masks = SNIPFilterPruner(model, config_list, evaluator(), mode=mode, **options).compress()
    check_smaller(model, masks)
    if mode == "dependency_aware":
        assert model.conv1.weight.shape[0] == model.conv3.weight.shape[0] == 4


def check_smaller(model: nn.Module, masks: Any) -> None:
    x = batches()[0][0]
    expected, size = model.eval()(x), sum(p.numel() for p in model.parameters())
    small = ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * size


# --- what is refused


def test_one_ranking_is_the_default_and_asks_for_a_total_sparsity() -> None:
    for kind in (SNIPPruner, GraSPPruner):
        with pytest.raises(ConfigError, match="give total_sparsity, or another mode"):
            kind(nn.Linear(2, 2), HALF, Evaluator([1]))


@pytest.mark.parametrize("temperature", [0, -1.0, True, "200"])
def test_wrong_temperatures(temperature: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"temperature: got {temperature!r}; expected a number > 0"
    ):
        GraSPPruner(nn.Linear(2, 2), TOTAL, Evaluator([1]), temperature=temperature)


def test_a_temperature_needs_logits() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    own = Evaluator([torch.ones(1, 2)], loss=lambda m, x: m(x)[0].sum())
    with pytest.raises(ConfigError, match="which is for logits, and Pair returns a tuple; pass te"):
        GraSPPruner(Pair(2, 2), TOTAL, own).calc_masks()
    apart = Evaluator([torch.ones(1, 2)], loss=lambda m, x: F.linear(x, m.weight).square().sum())
    with pytest.raises(ConfigError, match="not of an output of calling this Linear; pass temperat"):
        GraSPPruner(nn.Linear(2, 2), TOTAL, apart).calc_masks()


def test_grasp_refuses_a_trainer_and_a_loss_without_second_derivative() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="it differentiates twice, which a trainer does not let"):
        GraSPPruner(model, TOTAL, trainer=print, optimizer=sgd(model.parameters()))
    once = Evaluator([torch.ones(1, 2)], loss=lambda m, x: F.hardsigmoid(m(x)).sum())
    with pytest.raises(CompressError, match=r"GraSPPruner cannot .* twice: .* Use SNIPPruner"):
        GraSPPruner(model, TOTAL, once).calc_masks()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_no_batch_uses(kind: type[Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].spare = nn.Linear(2, 2)
    data = Evaluator([torch.rand(3, 2)], loss=lambda m, x: m(x).square().sum())
    with pytest.raises(CompressError, match=r"measured nothing of '0\.spare': no batch used"):
        kind(model, config_of(kind), data).compress()


def test_snip_takes_nnis_trainer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = sgd(model.parameters())

    def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
        model.train()
        for x, y in batches()[:3]:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    v1 = {"trainer": trainer, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss()}
    expected = SNIPPruner(model, TOTAL, evaluator(3)).calc_masks()
    assert SNIPPruner(model, TOTAL, **v1).calc_masks() == expected
