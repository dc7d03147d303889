"""Scores by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress import criteria

# Three filters of a Conv2d(1, 3, (1, 2)): the first and the last are equal.
WEIGHT = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.0]]], [[[3.0, -4.0]]]])


def test_norms_by_hand() -> None:
    assert criteria.l1(WEIGHT).tolist() == [7, 0, 7]
    assert criteria.l2(WEIGHT).tolist() == [5, 0, 5]
    assert criteria.magnitude(WEIGHT).tolist() == [3, 4, 0, 0, 3, 4]


def test_fpgm_by_hand_and_equal_filters_tie_exactly() -> None:
    assert criteria.fpgm(WEIGHT).tolist() == [5, 10, 5]
    filters = torch.randn(40, 300)
    filters[[7, 31]] = filters[3].clone()
    scores = criteria.fpgm(filters)
    assert scores[3] == scores[7] == scores[31]
    assert torch.equal(criteria.fpgm(filters[:1]), torch.zeros(1))


def test_fpgm_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = torch.randn(10, 4)
    whole = criteria.fpgm(filters)
    monkeypatch.setattr(criteria, "_DISTANCES_AT_A_TIME", 30)
    assert torch.equal(criteria.fpgm(filters), whole)


def test_transposed_convolutions_by_output_channel() -> None:
    weight = torch.tensor([[1.0, 10.0], [2.0, 20.0]]).reshape(2, 2, 1)  # (in, out, k)
    assert criteria.l1(weight, axis=1).tolist() == [3, 30]
    # Two groups of one input and two outputs each: four output channels.
    assert criteria.l1(weight, axis=1, groups=2).tolist() == [1, 10, 2, 20]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_filters_of_a_transposed_convolution_are_what_its_channels_depend_on(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 8, 2, groups=groups, bias=False)
    output = layer(torch.ones(1, 4, 1, 1))[0]  # each output channel: the sum of its filter's inputs
    rows = criteria.filters(layer.weight, axis=1, groups=groups)
    assert rows.shape == (8, 4 // groups * 4)
    assert torch.allclose(rows.sum(1), output.sum((1, 2)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    weight = torch.full((1, 70000), 1.0, dtype=dtype)  # its sum is above float16's largest number
    for criterion in (criteria.l1, criteria.l2, criteria.fpgm):
        assert criterion(weight).dtype == torch.float32
    assert criteria.l1(weight).item() == 70000
    assert criteria.magnitude(weight).dtype == torch.float32


def test_double_stays_double_and_no_graph_is_kept() -> None:
    weight = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    scores: list[Tensor] = [c(weight) for c in (criteria.l1, criteria.l2, criteria.fpgm)]
    scores.append(criteria.magnitude(weight))
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in scores)


def test_random_depends_on_its_generator_only() -> None:
    draws = [
        criteria.random(torch.zeros(5, 2), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator()
    assert criteria.random(torch.zeros(4, 3), 1, 2, generator=generator).shape == (6,)


@pytest.mark.parametrize("groups", [1, 2])
def test_taylor_and_obd_by_output_channel(groups: int) -> None:
    weight = torch.arange(1.0, 9).reshape(2, 4, 1)  # (in, out/groups, k)
    other = torch.full_like(weight, 2.0)
    squares = weight.square().squeeze(-1)
    per_channel = squares.sum(0) if groups == 1 else squares.flatten()
    taylor = criteria.taylor_first_order(weight, other, axis=1, groups=groups)
    assert taylor.tolist() == (4 * per_channel).tolist()
    obd = criteria.optimal_brain_damage(weight, -other, axis=1, groups=groups)
    assert obd.tolist() == (-per_channel).tolist()


def test_lamp_by_hand_with_ties_zeros_and_one_entry() -> None:
    assert criteria.lamp(torch.tensor([2.0, 0.0, -2.0, 1.0])).tolist() == [4 / 8, 0, 1, 1 / 9]
    assert criteria.lamp(torch.zeros(3)).tolist() == [0, 0, 0]
    assert criteria.lamp(torch.tensor([[-3.0]])).tolist() == [1]
    tiny = criteria.lamp(torch.tensor([1e-30, 2e-30]))  # squares below float32's smallest
    torch.testing.assert_close(tiny, torch.tensor([1 / 5, 1.0]).double())


def test_wanda_apoz_mean_and_movement_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert criteria.wanda(weight, torch.tensor([3.0, 0.5])).tolist() == [[3, 1], [0, 1.5]]
    assert criteria.movement(weight, torch.tensor([[2.0, 1.0], [5.0, -1.0]])).tolist() == [
        -2, 2, 0, 3
    ]  # fmt: skip
    assert criteria.apoz(torch.tensor([0, 1, 4]), 4).tolist() == [1, 0.75, 0]
    assert criteria.mean_activation(torch.tensor([0.0, 6.0]), 4).tolist() == [0, 1.5]
