"""Pruners that look at data, from config_list to a smaller model, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from digit_networks import (
    ACTIVATION_PRUNERS,
    BUT_LAST,
    HALF,
    MEASURING,
    batches,
    evaluator,
    kept,
    residual,
    sgd,
)
from oracle import randomise
from snapshots import assert_unchanged, snapshot
from torch import nn

import compress
from compress import ModelSpeedup
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks, applied_masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    L1FilterPruner,
    LAMPPruner,
    MovementPruner,
    OBDFilterPruner,
    Pruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
    WandaPruner,
)

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


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("kind", [ActivationAPoZRankFilterPruner, OBDFilterPruner])
def test_a_compiled_model_is_measured_as_it_is_written(kind: type[Any]) -> None:
    model = residual()
    compiled = torch.compile(model, backend="eager")
    found = [kind(each, HALF, evaluator(1)).calc_masks() for each in (model, compiled)]
    assert [masks["weight"].tolist() for masks in found[0].values()] == [
        masks["weight"].tolist() for masks in found[1].values()
    ]


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
    with pytest.warns(UserWarning, match="nothing of 'bn1': it is coupled with 'bn3', not to be"):
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
