"""Layers that say themselves what they compute: what pruners and speedup see of them."""

from __future__ import annotations

import pytest
import torch
from oracle import check_exact, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner


class TurnedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class StandardConv(nn.Conv2d):
    """Each filter has mean 0 and variance 1, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-5)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


class ScaledConv(nn.Conv2d):
    """Standardised and scaled, as in NFNet."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=1)
        self.gain = nn.Parameter(torch.empty(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, padding=1)


def pruned(model: nn.Module, x: Tensor, layers: list[str]) -> nn.Module:
    """The model without half of the units of some layers, held against the masked one."""
    torch.manual_seed(0)
    randomise(model)
    config = [{"sparsity": 0.5, "op_names": layers}]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
    check_exact(model, x, {path: dict(each) for path, each in pruner.calc_masks().items()})
    return model


def test_a_product_with_a_transposed_weight_is_a_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 8), TurnedLinear(8, 8), nn.ReLU(), TurnedLinear(8, 3))
    pruned(model, torch.randn(2, 5), ["0", "1"])
    assert [model[i].weight.shape for i in (0, 1, 3)] == [(4, 5), (4, 4), (3, 4)]


@pytest.mark.parametrize("kind", ["standard", "scaled"])
def test_a_weight_that_is_computed_from_a_parameter_makes_units(kind: str) -> None:
    conv = StandardConv(3, 8, 3, padding=1) if kind == "standard" else ScaledConv(3, 8, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 4, 1))
    pruned(model, torch.randn(2, 3, 6, 6), ["0"])
    assert model[0].weight.shape == (4, 3, 3, 3)
    assert model[2].in_channels == 4
