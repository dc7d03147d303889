"""Trained weights of a small model, written back to where they were in the large one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compress.graph.walk import leaves_of
from compress.speedup.plan import Plan, Slice


def moves_constants(plan: Plan) -> bool:
    """Whether a plan put into parameters what masked channels still do in the large model.

    Then the small model's weights, trained on, are none of the large one's.
    """
    return bool(plan.biases or plan.new_biases or plan.carries)


def put_back(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Write a small model's ``state_dict`` into the model that a plan made it of, in place.

    What the plan removed is left as it is; under the masks the model computes what the small one
    does, if the plan moves no constants.
    """
    with torch.no_grad():
        for path, tensor, _ in leaves_of(model):
            value = state.get(path)
            if value is None:  # a buffer that is not saved
                continue
            value = value.to(tensor.device)
            if path in plan.scales:
                scale = plan.scales[path]
                wide = (value.double() + scale.shift) / scale.factor - scale.shift
                value = wide.to(tensor.dtype)
            cut = plan.slices.get(path)
            if cut is None:
                tensor.copy_(value)
            else:
                _put(tensor, cut, value)


def _put(tensor: Tensor, cut: Slice, value: Tensor) -> None:
    kept = [
        np.arange(size) if keep is None else keep
        for size, keep in zip(tensor.shape, cut.keep, strict=True)
    ]
    grid = list(np.ix_(*kept))
    if cut.gather is not None:
        axis, positions = cut.gather
        shape = positions.shape + (1,) * (tensor.dim() - 2)
        # Each row (or column) keeps other positions along the gathered axis.
        grid[axis] = kept[axis][positions].reshape(shape) if len(kept[axis]) else positions
    tensor[tuple(torch.from_numpy(np.ascontiguousarray(g)).to(tensor.device) for g in grid)] = value
