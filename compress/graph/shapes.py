"""Compact tensors and the matching of axes in a reshape.

A *compact* tensor has the number of dimensions of the tensor it describes, but size 1 on every axis
it does not depend on: what is known of an activation (N, C, H, W) per channel is (1, C, 1, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

Shape = tuple[int, ...]
Group = tuple[tuple[int, ...], tuple[int, ...]]


def regroup(before: Shape, after: Shape) -> list[Group]:
    """Match the axes of a reshape into the smallest groups with equal products, in order.

    ``(2, 6, 7, 7) -> (2, 294)`` gives ``[((0,), (0,)), ((1, 2, 3), (1,))]``. Axes of size 1 join
    the group at hand. Both shapes hold the same number of elements (at least one).
    """
    groups: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        size_left = size_right = 1
        if i < len(before):
            left, size_left, i = [i], before[i], i + 1
        if j < len(after):
            right, size_right, j = [j], after[j], j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * before[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * after[j], j + 1
        groups.append((tuple(left), tuple(right)))
    return groups


def reshape_compact(compact: torch.Tensor, before: Shape, after: Shape) -> torch.Tensor:
    """The compact form of ``full.reshape(after)``, where ``full`` has the shape ``before``.

    Only the groups of axes that the tensor depends on are expanded.
    """
    expanded: list[int] = []
    result: list[int] = []
    for left, right in regroup(before, after):
        constant = all(compact.shape[a] == 1 for a in left)
        expanded += [1 if constant else before[a] for a in left]
        result += [1 if constant else after[a] for a in right]
    return compact.expand(expanded).reshape(result)


def along(vector: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """A vector as a compact tensor of ``ndim`` dimensions that varies along ``axis``."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)


def per_position(compact: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A compact float tensor at each position of one axis: (size,), NaN where it varies."""
    axis %= compact.dim()
    if compact.numel() == compact.shape[axis]:
        return compact.reshape(-1).expand(size)
    columns = compact.movedim(axis, 0).reshape(compact.shape[axis], -1)
    same = (columns == columns[:, :1]).all(1)
    vector = torch.where(same, columns[:, 0], torch.nan)
    return vector.expand(size) if vector.shape[0] == 1 else vector


def normal_axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def numel(shape: Sequence[int]) -> int:
    return prod(shape)
