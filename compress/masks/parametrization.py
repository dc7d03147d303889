"""A mask on one parameter of one module: how it is put on and taken off.

Putting one on is torch's own function; taking it off is ours, because torch's edits the class of
the module, which a deepcopy shares with its original, and puts the parameter back at the end of the
module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.graph.walk import modules_of
from compress.masks.entries import full_name, raise_all
from compress.masks.torch_prune import pruning_hook


class MaskParametrization(nn.Module):
    """What stands between a raw parameter and its module: ``where(mask, raw, 0)``.

    Args:
        mask: bool, the shape of the parameter.
        named: whether the user's masks named this parameter here, rather than reached it because
            another module has the same one.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, named: bool = True) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.named = named
        # The order of the module's parameters before the first mask: see detach.
        self.order: tuple[str, ...] = ()

    def forward(self, raw: Tensor) -> Tensor:
        """The masked parameter; a product instead would let NaN and inf through."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call,attr-defined]
        if raw.device.type == "cpu" and raw.dtype in _BITS and not traced:
            masked: Tensor = _Masked.apply(raw, self.mask)
            return masked
        return torch.where(self.mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device))


class _Masked(torch.autograd.Function):
    """``where(mask, raw, 0)`` and its gradient: the bits of each number, times 0 or 1.

    On a CPU, ``where`` takes ten times as long for a mask without a pattern, which no branch
    prediction can guess.
    """

    @staticmethod
    def forward(raw: Tensor, mask: Tensor) -> Tensor:
        return (raw.view(_BITS[raw.dtype]) * mask).view(raw.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Masked.apply(gradient, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        masked: Tensor = _Masked.apply(tangent, *ctx.saved_tensors)
        return masked

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], raw: Tensor, mask: Tensor
    ) -> tuple[Tensor, int]:
        pairs = zip((raw, mask), in_dims, strict=True)
        batched = (t if axis is None else t.movedim(axis, 0) for t, axis in pairs)
        return _Masked.apply(*batched), 0


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@dataclass(frozen=True)
class AppliedMask:
    """One mask on one parameter of one module object."""

    path: str
    module: nn.Module
    name: str
    parametrization: MaskParametrization

    @property
    def mask(self) -> Tensor:
        return self.parametrization.mask

    @property
    def named(self) -> bool:
        return self.parametrization.named

    def put_on(self) -> None:
        """Parametrise; the module's first mask remembers the order of its parameters."""
        module, part = self.module, self.parametrization
        others = masks_on(module)
        part.order = next(iter(others.values())).order if others else tuple(module._parameters)
        if parametrize.is_parametrized(module):
            _unshare_class(module)
        with _stand_in(module, self.name):
            parametrize.register_parametrization(module, self.name, part)
        if isinstance(module, nn.RNNBase):
            _make_copyable(module)

    def take_off(self) -> None:
        """The raw parameter goes back to its name, place and class."""
        module, name = self.module, self.name
        original = parts_of(module, name).original
        parts = cast(nn.ModuleDict, module.parametrizations)
        del parts[name]
        if len(parts) == 0:
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
        else:
            _unshare_class(module, without=name)
        setattr(module, name, original)
        order = {key: place for place, key in enumerate(self.parametrization.order)}
        items = sorted(module._parameters.items(), key=lambda item: order.get(item[0], len(order)))
        module._parameters.clear()
        module._parameters.update(items)


def raw_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The stored `Parameter` behind ``module.name``, under our mask or torch's if there is one.

    None where ``name`` is no parameter of ``module``, or is parametrised by somebody else.
    """
    found = dict(module._parameters.items()).get(name)  # a scripted module's has no get()
    if found is None and mask_on(module, name) is not None:
        found = parts_of(module, name)._parameters.get("original")
    if found is None and pruning_hook(module, name) is not None:
        found = module._parameters.get(f"{name}_orig")
    return found


def masked_parameter(module: nn.Module, name: str) -> Tensor | None:
    """`raw_parameter` with 0 where our mask or torch's is; gradients go to the raw one."""
    raw = raw_parameter(module, name)
    if raw is None or name in module._parameters:
        return raw
    ours = mask_on(module, name)
    mask = module._buffers[f"{name}_mask"] if ours is None else ours.mask
    assert mask is not None
    return torch.where(mask.bool(), raw, 0)


def masks_on(module: nn.Module) -> dict[str, MaskParametrization]:
    """Our masks on the parameters of ``module`` itself, by name."""
    if "parametrizations" not in module._modules:  # is_parametrized() takes ten times as long
        return {}
    names = list(cast(nn.ModuleDict, module.parametrizations))
    return {
        name: cast(MaskParametrization, parts_of(module, name)[0])
        for name in names
        if is_ours(parts_of(module, name))
    }


def mask_on(module: nn.Module, name: str) -> MaskParametrization | None:
    return masks_on(module).get(name)


def applied_to(model: nn.Module) -> list[AppliedMask]:
    """All our masks on ``model``, in module order; raises if one cannot be taken off."""
    applied = [
        AppliedMask(path, module, name, part)
        for path, module in modules_of(model)
        for name, part in masks_on(module).items()
    ]
    problems = [
        f"{full_name(one.path, one.name)!r}: it was parametrised again on top of its mask; call "
        "torch.nn.utils.parametrize.remove_parametrizations on it first"
        for one in applied
        if "1" in parts_of(one.module, one.name)._modules
    ]
    raise_all("these masks cannot be taken off", problems)
    return applied


def parts_of(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    every = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, every[name])


def is_ours(parts: parametrize.ParametrizationList) -> bool:
    return "0" in parts._modules and isinstance(parts[0], MaskParametrization)


@contextmanager
def _stand_in(module: nn.Module, name: str) -> Iterator[None]:
    """Another parameter of the same memory is at ``name`` while torch parametrises it.

    torch calls ``set_()`` on it, after which autograd accumulates its gradient in a new node: hooks
    on the old one, such as those of a ``DistributedDataParallel`` made before, would be lost.
    """
    parameter = module._parameters.get(name)
    if parameter is not None:
        other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        module._parameters[name] = other
    try:
        yield
    finally:
        if parameter is not None:
            masked = mask_on(module, name) is not None
            owner = parts_of(module, name)._parameters if masked else module._parameters
            owner["original" if masked else name] = parameter


def _make_copyable(module: nn.RNNBase) -> None:
    """Let a masked LSTM, GRU or RNN be deepcopied after a training step.

    It caches its weights as of the last forward; masked ones belong to that step's autograd graph,
    which cannot be copied.
    """
    cls: Any = type(module)
    copy_rest = cls.__deepcopy__

    def deepcopy(self: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
        with torch.no_grad():
            self._init_flat_weights()
        return cast(nn.RNNBase, copy_rest(self, memo))

    cls.__deepcopy__ = deepcopy


def _unshare_class(module: nn.Module, without: str | None = None) -> None:
    """Give a parametrised module a class of its own, without the property ``without``.

    torch makes one class per parametrised module and keeps the tensors' properties on it; a
    deepcopy has the same class, so that editing it for one would break the other.
    """
    cls = type(module)
    attributes = {
        key: value
        for key, value in vars(cls).items()
        if key not in ("__dict__", "__weakref__", without)
    }
    module.__class__ = type(cls.__name__, cls.__bases__, attributes)
