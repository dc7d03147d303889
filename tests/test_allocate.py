"""Counts, ties and limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import allocate
from compress.errors import ConfigError, MaskError


def kept(keep: Tensor) -> list[int]:
    return keep.int().tolist()


@pytest.mark.parametrize(
    ("units", "sparsity", "pruned"),
    [
        (10, 0.3, 3),
        (64, 0.5, 32),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (7, 0.5, 3),
        (1, 0.99, 0),
        (1, 0.99999999999, 0),
        (3, 0.0, 0),
        (1000, 0.999, 999),
    ],
)
def test_prune_count(units: int, sparsity: float, pruned: int) -> None:
    assert allocate.prune_count(units, sparsity) == pruned


@pytest.mark.parametrize(
    ("round_to", "min_channels", "keep"),
    [(1, 1, 4), (8, 1, 8), (3, 1, 6), (1, 6, 6), (4, 5, 8), (1, 50, 10), (16, 1, 10)],
)
def test_keep_count_of_ten_at_sixty_percent(round_to: int, min_channels: int, keep: int) -> None:
    assert allocate.keep_count(10, 0.6, round_to, min_channels) == keep


def test_golden_keep_vectors_with_ties() -> None:
    assert kept(allocate.keep_highest(torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0]), 3)) == [
        1,
        0,
        0,
        1,
        1,
    ]
    assert kept(allocate.keep_highest(torch.zeros(4), 2)) == [0, 0, 1, 1]
    assert kept(allocate.keep_highest(torch.tensor([5.0]), 1)) == [1]


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40),
    st.integers(0, 99).map(lambda percent: percent / 100),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_counts_are_exact_and_the_lowest_go(
    values: list[float], sparsity: float, round_to: int, min_channels: int
) -> None:
    scores = torch.tensor(values)
    keep = allocate.per_layer(
        {"a": scores}, {"a": sparsity}, round_to=round_to, min_channels=min_channels
    )["a"]
    count, units = int(keep.sum()), len(values)
    exact = units - math.floor(round(sparsity * 100) * units / 100)
    assert count >= max(1, min(units, min_channels), exact)
    assert count == units or (count % round_to == 0 and count - round_to < max(exact, min_channels))
    if round_to == min_channels == 1:
        assert count == exact
    if not bool(keep.all()):
        assert scores[~keep].max() <= scores[keep].min()


def test_scores_that_are_not_finite_name_the_layer() -> None:
    scores = {"fine": torch.ones(2), "conv1": torch.tensor([1.0, torch.nan])}
    with pytest.raises(MaskError, match=r"'conv1' \(1 of 2 units\)"):
        allocate.per_layer(scores, {"fine": 0.5, "conv1": 0.5})
    with pytest.raises(MaskError, match=r"'conv1' \(1 of 2 units\)"):
        allocate.global_(scores, {"fine": 1, "conv1": 1}, 0.5)


# --- one ranking over several layers


def test_global_golden() -> None:
    scores = {"a": torch.tensor([1.0, 5.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    keep = allocate.global_(scores, {"a": 1, "b": 1}, 0.6)
    assert kept(keep["a"]) == [0, 1, 0]
    assert kept(keep["b"]) == [0, 1]


def test_global_counts_weights_not_units() -> None:
    scores = {"big": torch.tensor([1.0, 2.0]), "small": torch.tensor([3.0, 4.0])}
    # 20 of the 22 weights are big's; half of all is nearest to its first filter.
    keep = allocate.global_(scores, {"big": 10, "small": 1}, 0.5)
    assert kept(keep["big"]) == [0, 1]
    assert kept(keep["small"]) == [0, 1]


def test_global_ties_go_by_layer_then_index() -> None:
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    keep = allocate.global_(scores, {"a": 1, "b": 1}, 0.5)
    assert kept(keep["a"]) == [0, 0, 1]  # one unit is left
    assert kept(keep["b"]) == [0, 1, 1]


def test_global_respects_the_limit_of_a_layer() -> None:
    scores = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    keep = allocate.global_(scores, {"a": 1, "b": 1}, 0.5, max_sparsity={"a": 0.5})
    assert kept(keep["a"]) == [0, 0, 1, 1]
    assert kept(keep["b"]) == [0, 0, 1, 1]


def test_global_half_way_masks_less() -> None:
    keep = allocate.global_({"a": torch.arange(3.0)}, {"a": 4}, 0.5)
    assert kept(keep["a"]) == [0, 1, 1]


def test_unreachable_total_says_what_is_reachable() -> None:
    scores = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    limits = {"a": 0.25, "b": 0.5}
    with pytest.raises(ConfigError) as caught:
        allocate.global_(scores, {"a": 1, "b": 1}, 0.8, max_sparsity=limits)
    assert "total_sparsity 0.8 over 2 layers ('a', 'b'): at most 0.3750 can be" in str(caught.value)
    assert "min_channels=1 and round_to=1" in str(caught.value)
    with pytest.raises(ConfigError, match=r"at most 0\.5000"):
        allocate.global_(scores, {"a": 1, "b": 1}, 0.8, min_channels=2)
    # What only the size of a unit forbids is no error: 9 of 10 is the nearest to 0.95.
    keep = allocate.global_({"a": torch.arange(10.0)}, {"a": 3}, 0.95)
    assert int(keep["a"].sum()) == 1


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 0.6),
    st.integers(1, 4),
)
def test_global_is_within_half_a_step_and_never_empties(
    drawn: list[tuple[list[int], int]], sparsity: float, round_to: int
) -> None:
    scores = {str(i): torch.tensor(values).float() for i, (values, _) in enumerate(drawn)}
    sizes = {str(i): size for i, (_, size) in enumerate(drawn)}
    try:
        keep = allocate.global_(scores, sizes, sparsity, round_to=round_to)
    except ConfigError:
        return
    assert all(k.any() for k in keep.values())
    assert all(len(k) == int(k.sum()) or int(k.sum()) % round_to == 0 for k in keep.values())
    masked = sum(int((~k).sum()) * sizes[name] for name, k in keep.items())
    total = sum(len(k) * sizes[name] for name, k in keep.items())
    step = max(sizes.values()) * round_to
    room = sum((len(k) - 1) * sizes[name] for name, k in keep.items())
    assert masked <= sparsity * total + step / 2
    assert masked >= min(sparsity * total - step / 2, room - step * len(keep))


def test_global_ignores_no_layer_with_one_unit() -> None:
    keep = allocate.global_({"a": torch.ones(1), "b": torch.ones(9)}, {"a": 1, "b": 1}, 0.5)
    assert kept(keep["a"]) == [1]
    assert int(keep["b"].sum()) == 4


# --- from filters to weights


def test_expand_golden() -> None:
    keep = torch.tensor([True, False])
    assert allocate.expand_filters(keep, torch.empty(2, 3)).int().tolist() == [[1] * 3, [0] * 3]
    transposed = allocate.expand_filters(keep, torch.empty(3, 2, 1), axis=1)
    assert transposed.squeeze(2).int().tolist() == [[1, 0]] * 3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 8, 3, groups=2),
        nn.Conv3d(4, 8, 1),
        nn.ConvTranspose1d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3, groups=2),
        nn.ConvTranspose3d(4, 8, 2, groups=4),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.groups}",
)
def test_expanded_masks_silence_exactly_the_masked_channels(layer: nn.Module) -> None:
    keep = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    transposed = "Transpose" in type(layer).__name__
    axis, groups = (1, int(layer.groups)) if transposed else (0, 1)
    mask = allocate.expand_filters(keep, layer.weight, axis, groups)
    assert mask.shape == layer.weight.shape
    with torch.no_grad():
        layer.weight *= mask
        layer.bias *= keep
    output = layer(torch.rand(1, 4, *[5] * (layer.weight.dim() - 2)))
    assert torch.equal(output[0].flatten(1).abs().sum(1) != 0, keep)
