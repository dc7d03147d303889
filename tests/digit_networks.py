"""Small networks and digits for the pruners that look at data."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from _data import digits
from oracle import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    OBDFilterPruner,
    TaylorFOWeightFilterPruner,
)

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
