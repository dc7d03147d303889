"""Experts in one parameter of three axes, by ``grouped_mm``."""

from __future__ import annotations

import pytest
import torch
from oracle import check_exact, randomise
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm before 2.10"
)


class Experts(nn.Module):
    """A gated layer for each of several experts; each row goes to one of them."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.count = experts
        self.router = nn.Linear(width, experts)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = self.router(x).argmax(-1).sort()
        ends = torch.histc(chosen.float(), self.count, 0, self.count - 1).cumsum(0).int()
        both = F.grouped_mm(x[order], self.gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return out[order.argsort()]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.experts, self.head = nn.Linear(5, 8), Experts(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.head(x + self.experts(x))


def masked(parameter: Tensor, gone: list[int], axis: int) -> Tensor:
    mask = torch.ones_like(parameter, dtype=torch.bool)
    mask.movedim(axis, 0)[gone] = False
    return mask


def make() -> Mixture:
    torch.manual_seed(0)
    model = Mixture()
    randomise(model)
    return model


def test_hidden_units_of_all_experts_go() -> None:
    model, gone = make(), [0, 3, 4, 11]
    rows = gone + [12 + unit for unit in gone]
    masks = {"experts": {"gate_up": masked(model.experts.gate_up, rows, 1)}}
    check_exact(model, torch.randn(6, 5), masks)
    assert model.experts.gate_up.shape == (3, 16, 8)
    assert model.experts.down.shape == (3, 8, 8)


def test_a_unit_that_one_expert_keeps_stays() -> None:
    model = make()
    mask = masked(model.experts.gate_up, [0, 1, 2, 3, 12, 13, 14, 15], 1)
    mask[1, 0] = mask[1, 1] = mask[1, 12] = mask[1, 13] = True
    mask[1, 2] = mask[1, 14] = mask[0, 3] = mask[0, 15] = True
    speedup = check_exact(model, torch.randn(6, 5), {"experts": {"gate_up": mask}})
    assert model.experts.gate_up.shape == (3, 24, 8)
    assert speedup.report.parameters_after == speedup.report.parameters_before


def test_the_width_around_experts_goes() -> None:
    model, gone = make(), [0, 2, 5, 7]
    masks = {
        "before": {
            "weight": masked(model.before.weight, gone, 0),
            "bias": masked(model.before.bias, gone, 0),
        },
        "experts": {"down": masked(model.experts.down, gone, 1)},
    }
    check_exact(model, torch.randn(6, 5), masks)
    assert model.experts.gate_up.shape == (3, 24, 4)
    assert model.experts.down.shape == (3, 4, 12)
    assert (model.before.out_features, model.head.in_features) == (4, 4)
