"""Clipping gradients: by norm, by value, and by unit against the unit's own size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from compress.allocate import expand_filters
from compress.criteria import filters
from compress.errors import ConfigError
from compress.masks import Slot, masked_parameter, parameter_slots, raw_parameter
from compress.pruners.patterns import inputs_first
from compress.training.freezing import within

Parameters = nn.Module | Iterable[Tensor]


def clip_grad_norm(parameters: Parameters, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients together so that their norm is at most ``max_norm``; returns the old one.

    ``torch.nn.utils.clip_grad_norm_`` of a model or of parameters. Errors: ``ConfigError`` for a
    ``max_norm`` that is not above 0.
    """
    _check_positive("max_norm", max_norm)
    return clip_grad_norm_(_parameters(parameters), max_norm, norm_type)


def clip_grad_value(parameters: Parameters, clip_value: float) -> None:
    """Bring every entry of the gradients into [-``clip_value``, ``clip_value``].

    ``torch.nn.utils.clip_grad_value_`` of a model or of parameters. Errors: ``ConfigError`` for a
    ``clip_value`` that is not above 0.
    """
    _check_positive("clip_value", clip_value)
    clip_grad_value_(_parameters(parameters), clip_value)


def clip_grad_adaptive(
    model: nn.Module, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Iterable[str] = ()
) -> None:
    """Scale the gradient G of each unit so that ‖G‖ <= ``clip_factor`` · max(‖W‖, ``eps``).

    Adaptive gradient clipping: High-Performance Large-Scale Image Recognition Without Normalization
    (Brock et al. 2021), eq. 3. A unit is a filter or a row of a matrix; a vector (a bias, the
    weight of a norm) is one unit. Masked weights count as 0. With a gradient scaler: after
    ``unscale_``.

    Args:
        model: after a backward pass.
        clip_factor: the paper's λ.
        eps: the least norm that a unit's weights count for, so that zeros can grow.
        exclude: module paths whose parameters are left alone; the paper leaves the last layer.

    Raises:
        ConfigError: ``clip_factor`` or ``eps`` is not above 0, ``exclude`` names no module, or
            ``model`` is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: got {type(model).__name__}; expected the torch.nn.Module itself, since units "
            "are told by its layers"
        )
    _check_positive("clip_factor", clip_factor)
    _check_positive("eps", eps)
    left_alone = within(model, exclude)
    for slot in parameter_slots(model):
        raw = raw_parameter(slot.module, slot.name)
        if raw is None or raw.grad is None or id(raw) in left_alone:
            continue
        value = masked_parameter(slot.module, slot.name)
        assert value is not None, f"{slot.path}.{slot.name} is a parameter"
        most = clip_factor * _unit_norms(value, slot).clamp(min=eps)
        norms = _unit_norms(raw.grad, slot)
        factors = torch.where(norms > most, most / norms, 1).to(raw.grad.dtype)
        if raw.dim() > 1:
            factors = expand_filters(factors, raw.grad, *_axis(slot))
        raw.grad.mul_(factors)


# -- what they use -------------------------------------------------------------------------


def _parameters(parameters: Parameters) -> Iterator[Tensor]:
    yield from parameters.parameters() if isinstance(parameters, nn.Module) else parameters


def _axis(slot: Slot) -> tuple[int, int]:
    """``(axis, groups)`` of a parameter's units: see `compress.criteria`."""
    first, groups = inputs_first(slot.module)
    return (1, groups) if first and slot.name == "weight" else (0, 1)


def _unit_norms(tensor: Tensor, slot: Slot) -> Tensor:
    """``(units,)`` norms; of a vector ``(1,)``, its own."""
    if tensor.dim() < 2:
        tensor = tensor.detach()
        rows = (tensor.float() if tensor.element_size() < 4 else tensor).reshape(1, -1)
    else:
        rows = filters(tensor, *_axis(slot))
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: got {value!r}; expected a number > 0")
