"""Helpers for fine-tuning a masked or a small model: clipping gradients, freezing parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from compress.allocate import expand_filters
from compress.criteria import filters
from compress.errors import ConfigError, closest
from compress.masks import Slot, masked_parameter, parameter_slots, raw_parameter
from compress.pruners.patterns import inputs_first
from compress.speedup.plan import Plan

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
        ConfigError: ``clip_factor`` or ``eps`` is not above 0, or ``exclude`` names no module.
    """
    _check_positive("clip_factor", clip_factor)
    _check_positive("eps", eps)
    left_alone = _within(model, exclude)
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


@dataclass
class FrozenParts:
    """Parameters that train no more until `restore`; also a context manager that restores them.

    Attributes:
        trainable: names of the parameters that go on training.
    """

    trainable: tuple[str, ...]
    _frozen: list[nn.Parameter] = field(repr=False)

    def restore(self) -> None:
        """Let them train again. A second call does nothing."""
        while self._frozen:
            self._frozen.pop().requires_grad_(True)

    def __enter__(self) -> FrozenParts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def unfreeze_around(model: nn.Module, plan: Plan, classifier: str | None = None) -> FrozenParts:
    """Freeze everything but what a plan changed, the norms that follow it, and the classifier.

    What was frozen before stays frozen, in these parts, too. Frozen parameters lose their
    gradients, so that an optimizer leaves them alone. Batch norms go on counting their statistics
    in train mode.

    Args:
        model: the small model, or the one that the plan was made for.
        plan: ``speedup.plan``.
        classifier: module path; the last layer with a weight of two axes or more if left out.

    Raises:
        ConfigError: the plan changes nothing, or is of another model, or there is no such module.
    """
    changed = _changed_modules(model, plan)
    layers = _in_order(model)
    last = [path for path, module in layers if _has_matrix(module)][-1:]
    kept = changed | _following_norms(layers, changed)
    trainable = _within(model, last if classifier is None else [classifier])
    for path, module in layers:
        if path in kept:
            trainable |= {id(parameter) for parameter in module.parameters(recurse=False)}
            parts = getattr(module, "parametrizations", None)
            trainable |= {id(p) for p in parts.parameters()} if parts is not None else set()
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trainable]
    names = tuple(n for n, p in model.named_parameters() if p.requires_grad and id(p) in trainable)
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    return FrozenParts(names, frozen)


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


def _within(model: nn.Module, paths: Iterable[str]) -> set[int]:
    """The ids of all parameters in these modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[int] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        if path not in modules:
            raise ConfigError(
                f"{path!r}: the model has no module of this name{closest(path, modules)}"
            )
        found |= {id(parameter) for parameter in modules[path].parameters()}
    return found


def _changed_modules(model: nn.Module, plan: Plan) -> set[str]:
    paths = {*plan.slices, *plan.biases, *plan.carries, *plan.scales, *plan.new_biases}
    owners = {path.rpartition(".")[0].partition(".parametrizations")[0] for path in paths}
    owners |= {replacement.module for replacement in plan.replacements}
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(owners - modules.keys())
    if missing:
        raise ConfigError(
            f"plan: it changes {missing[0]!r}, which this {type(model).__name__} does not have"
            f"{closest(missing[0], modules)}; pass the model that it was made for"
        )
    if not owners:
        raise ConfigError(
            "plan: it changes no layer, so there is nothing to train around; look at the report "
            "for what the masks could not remove"
        )
    first = {id(module): path for path, module in model.named_modules()}
    return {first[id(modules[path])] for path in owners}


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters of their own, in the order of the model."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if "parametrizations" not in path.split(".")
        and (any(True for _ in module.parameters(recurse=False)) or _is_parametrised(module))
    ]


def _is_parametrised(module: nn.Module) -> bool:
    return hasattr(module, "parametrizations")


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _following_norms(layers: list[tuple[str, nn.Module]], changed: set[str]) -> set[str]:
    """The norms that are registered after a changed layer, before the next layer."""
    found: set[str] = set()
    after = False
    for path, module in layers:
        if "Norm" in type(module).__name__:
            found |= {path} if after else set()
        elif _has_matrix(module):
            after = path in changed
    return found


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: got {value!r}; expected a number > 0")
