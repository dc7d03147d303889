"""All that running a user's code could leave changed, as a value that compares."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """All that a pruner could leave changed, as values that compare."""
    found: list[Any] = [(name, t.clone()) for name, t in model.state_dict().items()]
    found += [(n, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()]
    found += [(n, p.requires_grad) for n, p in model.named_parameters()]
    found += [(n, m.training, sorted(vars(m))) for n, m in model.named_modules()]
    found += [
        (n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    ]
    found += [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    if optimizer is not None:
        found += [copy.deepcopy(optimizer.state_dict()), sorted(vars(optimizer))]
        found.append(len(optimizer._optimizer_step_pre_hooks))
    return found


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert plain(one) == plain(other)


def plain(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.tolist, value)
