"""Shrink an optimizer's state along with the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress.errors import SpeedupError
from compress.graph.watch import tensors_in
from compress.speedup.plan import Plan, Slice


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Whether it trains this model, and all state lies along its parameter's axes.

    A state tensor can shrink when it is a number, or has for each axis of the parameter the same
    size, or 1 (Adafactor's averages over rows and columns). Errors: ``SpeedupError`` for anything
    else, such as the one flat history of LBFGS, and for an optimizer of another model: of a copy
    from before, its state would silently stay as large as it is.
    """
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not any(id(parameter) in trained for parameter in model.parameters()):
        raise SpeedupError(
            f"optimizer: this {type(optimizer).__name__} trains no parameter of the model; pass "
            "one that was made of this model's parameters, not of a copy's"
        )
    for path, parameter in model.named_parameters():
        for name, value in optimizer.state.get(parameter, {}).items():
            for tensor in tensors_in(value):
                if not _fits(tensor, value, parameter):
                    raise SpeedupError(
                        f"{path}: {type(optimizer).__name__} keeps {name!r} of shape "
                        f"{tuple(tensor.shape)} for a parameter of shape {tuple(parameter.shape)}: "
                        "it lies along none of its axes and cannot shrink along; make a new "
                        "optimizer after speedup_model()"
                    )


def _fits(tensor: torch.Tensor, value: Any, parameter: torch.Tensor) -> bool:
    sizes = zip(tensor.shape, parameter.shape, strict=False)
    along = tensor.dim() == parameter.dim() and all(s in (1, p) for s, p in sizes)
    return tensor.dim() == 0 or (tensor is value and (along or tensor.numel() == 1))


def slice_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    plan: Plan,
    before: Mapping[str, tuple[int, ...]],
) -> None:
    """Shrink an optimizer's state along with its parameters, which had the shapes ``before``.

    Its parameter groups stay: they hold the same ``Parameter`` objects.
    """
    shrunk = list(_shrunk_state(optimizer, model, plan, before))  # all, before any is put in
    for state, name, value in shrunk:
        state[name] = value


def _shrunk_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    plan: Plan,
    before: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for path, parameter in model.named_parameters():
        cut, state = plan.slices.get(path), optimizer.state.get(parameter)
        if cut is None or not state or path not in before:
            continue
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == len(before[path]):
                yield state, name, _along(cut, value, before[path])(value)


def _along(cut: Slice, value: torch.Tensor, before: tuple[int, ...]) -> Slice:
    """The part of a slice along the axes that a state tensor has in full."""
    full = [s == b and b > 1 for s, b in zip(value.shape, before, strict=True)]
    keep = tuple(k if is_full else None for k, is_full in zip(cut.keep, full, strict=True))
    gather = cut.gather
    if gather is not None and not full[gather[0]]:
        gather = None
    return Slice(keep, gather)
