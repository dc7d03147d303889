"""The oracle over torchvision's families: whole architectures on small pictures."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from oracle import (
    MaskDict,
    SeededChoices,
    assert_same_outputs,
    check_exact,
    draw_masks,
    masked_copy,
    outputs,
    randomise,
)
from torch import Tensor, nn

from compress import L1FilterPruner, ModelSpeedup

# The side of the picture, and the largest share of the parameters that may be left where half of
# the filters of each layer are masked by L1 norm, every layer by itself: residual adds keep what
# one branch keeps.
FAMILIES = {
    "alexnet": (64, 0.26),
    "vgg11": (32, 0.26),
    "vgg11_bn": (32, 0.26),
    "resnet18": (32, 0.5),
    "resnet50": (32, 0.5),
    "resnext50_32x4d": (32, 0.85),
    "wide_resnet50_2": (32, 0.4),
    "densenet121": (32, 0.3),
    "squeezenet1_1": (32, 0.26),
    "googlenet": (32, 0.5),
    "inception_v3": (75, 0.5),
    "mobilenet_v2": (32, 0.5),
    "mobilenet_v3_small": (32, 0.5),
    "mobilenet_v3_large": (32, 0.5),
    "mnasnet0_5": (32, 0.5),
    "efficientnet_b0": (32, 0.7),
    "efficientnet_v2_s": (32, 0.7),
    "shufflenet_v2_x0_5": (32, 0.6),
    "regnet_x_400mf": (32, 0.9),
    "regnet_y_400mf": (32, 0.95),
}
SMALL = [
    "resnet18", "densenet121", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "efficientnet_b0", "shufflenet_v2_x0_5", "regnet_x_400mf", "regnet_y_400mf",
]  # fmt: skip
HALF = [{"sparsity_per_layer": 0.5, "op_types": ["default"]}]


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A network with everything random, in eval mode, and pictures for it."""
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, num_classes=7, **extra)
    if hasattr(model, "classifier") and hasattr(model, "avgpool"):
        narrow_classifier(model)
    side = FAMILIES[name][0]
    pictures = torch.randn(2, 3, side, side, dtype=dtype)
    model.to(dtype)
    randomise(model)
    calibrate(model, pictures)
    return model.eval(), pictures


def narrow_classifier(model: nn.Module) -> None:
    """Hidden layers of 4096 are the same to the engine as of 256, but for the time they take."""
    width = 256
    for index, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear) and layer.in_features > 4096:
            model.classifier[index] = nn.Linear(layer.in_features, width)
        elif isinstance(layer, nn.Linear) and layer.in_features == 4096:
            outs = width if layer.out_features == 4096 else layer.out_features
            model.classifier[index] = nn.Linear(width, outs)


def calibrate(model: nn.Module, pictures: Tensor) -> None:
    """Statistics near the true ones keep the numbers of a deep network in range."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
        model(pictures)
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean += 0.3 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
            norm.running_var += norm.running_var.mean()


def half_of_the_filters(model: nn.Module) -> MaskDict:
    _, masks = L1FilterPruner(copy.deepcopy(model), HALF).compress()
    return {path: dict(each) for path, each in masks.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_filters_of_every_layer(name: str) -> None:
    model, pictures = make(name)
    speedup = check_exact(model, pictures, half_of_the_filters(model))
    report = speedup.report
    assert report.parameters_after < FAMILIES[name][1] * report.parameters_before


@pytest.mark.parametrize("name", SMALL)
def test_masks_of_every_kind(name: str) -> None:
    """In double precision, where nothing can be put down to rounding."""
    model, pictures = make(name, torch.float64)
    check_exact(model, pictures, draw_masks(SeededChoices(len(name)), model), trains=False)


@pytest.mark.parametrize("name", SMALL)
def test_filters_masked_with_their_norms(name: str) -> None:
    model, pictures = make(name, torch.float64)
    speedup = check_exact(model, pictures, half_with_norms(model), trains=False)
    assert not speedup.report.constants_carried
    assert speedup.report.parameters_after < 0.95 * speedup.report.parameters_before


def half_with_norms(model: nn.Module) -> MaskDict:
    masks = half_of_the_filters(model)
    modules = list(model.named_modules())
    for (path, module), (after, norm) in pairwise(modules):
        if path not in masks or not isinstance(module, nn.Conv2d):
            continue
        if isinstance(norm, nn.BatchNorm2d) and norm.num_features == module.out_channels:
            keep = masks[path]["weight"].flatten(1).any(1)
            masks[after] = {"weight": keep, "bias": keep.clone()}
    return masks


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 299)])
def test_auxiliary_heads_shrink_and_stay_exact(name: str, side: int) -> None:
    """They run in train mode only: compared there, with the statistics of eval mode."""
    model, _ = make(name)
    pictures = torch.randn(1, 3, side, side)
    masks = half_of_the_filters(model)
    reference = masked_copy(model, masks)
    heads = [m for n, m in model.named_children() if "aux" in n.lower()]
    before = sum(p.numel() for head in heads for p in head.parameters())
    ModelSpeedup(model, pictures, masks).speedup_model()
    assert sum(p.numel() for head in heads for p in head.parameters()) < 0.6 * before
    with torch.no_grad():
        expected, got = (outputs(_without_chance(m), pictures) for m in (reference, model))
    assert len(expected) == len(heads) + 1
    assert_same_outputs(expected, got, 1e-5)
    total = torch.stack([t.sum() for t in outputs(model, pictures)]).sum()
    total.backward()
    assert all(p.grad is not None for p in model.parameters())


def _without_chance(model: nn.Module) -> nn.Module:
    """In train mode, but for batch norms and dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return model
