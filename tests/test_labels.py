"""Labels by hand: what a reshape, a tie and a pin do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from compress.graph.labels import LabelSpace, each_output
from compress.graph.shapes import per_position, regroup, reshape_compact

NODE = fx.Graph().placeholder("x")


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 6, 7, 7), (2, 294), [((0,), (0,)), ((1, 2, 3), (1,))]),
        ((2, 12, 5), (2, 3, 4, 5), [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]),
        ((4, 6), (3, 8), [((0, 1), (0, 1))]),
        ((5,), (1, 5), [((0,), (0, 1))]),
    ],
)
def test_regroup_matches_axes_by_their_products(before, after, groups):
    assert regroup(before, after) == groups


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.data())
def test_reshaping_a_compact_tensor_is_reshaping_the_full_one(shape, data):
    total = int(np.prod(shape))
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    first = data.draw(st.sampled_from(divisors))
    after = (first, total // first)
    varies = [data.draw(st.booleans()) for _ in shape]
    compact = torch.rand([s if v else 1 for s, v in zip(shape, varies, strict=True)])
    result = reshape_compact(compact, tuple(shape), after)
    assert torch.equal(result.expand(after), compact.expand(shape).reshape(after))


def test_per_position_is_nan_where_a_position_varies():
    value = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert per_position(value, 0, 2).tolist()[0] == 1.0
    assert per_position(value, 0, 2).isnan().tolist() == [False, True]


def test_a_split_that_repeats_labels_needs_no_new_ones():
    space = LabelSpace()
    channels = space.fresh(3)
    flat = space.merge([channels, None], [3, 4], NODE)
    assert flat is not None
    assert flat.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    back = space.split(flat, [3, 2, 2], NODE)
    assert back[0].tolist() == [1, 2, 3]
    assert back[1] is None
    assert back[2] is None
    assert not space.grids


def test_heads_split_and_merged_again_are_the_same_labels_in_any_order():
    space = LabelSpace()
    width = space.fresh(6)
    heads, dims = space.split(width, [2, 3], NODE)
    assert len(space.grids) == 1
    assert np.array_equal(space.merge([heads, dims], [2, 3], NODE), width)
    shuffled = space.merge([dims, heads], [3, 2], NODE)
    assert shuffled.tolist() == width.reshape(2, 3).T.ravel().tolist()
    assert len(space.grids) == 1


def test_ties_join_classes_and_pins_reach_all_of_a_class():
    space = LabelSpace()
    a, b, c = space.fresh(2), space.fresh(2), space.fresh(2)
    space.tie(a, b, NODE, "")
    space.tie(b, c, NODE, "")
    assert space.roots()[c].tolist() == a.tolist()
    assert space.tie(c, None, NODE, "meets a fixed size") is None
    assert space.roots()[a].tolist() == [0, 0]


def test_each_output_is_one_or_several() -> None:
    vector = np.array([1, 2])
    assert list(each_output(None)) == []
    assert list(each_output((None, vector))) == [(None, vector)]
    assert list(each_output(((vector,), None, (None,)))) == [(vector,), (None,)]
    assert list(each_output((None, (vector,)))) == [(vector,)]
