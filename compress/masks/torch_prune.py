"""Masks of ``torch.nn.utils.prune``: found on a model, taken off, and put back.

torch keeps a pruned ``weight`` as the parameter ``weight_orig``, the buffer ``weight_mask`` and a
forward pre-hook that sets ``module.weight`` to their product. The `Parameter` object is the one
that the module had before.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from compress.graph.walk import modules_of
from compress.masks.entries import copy_entry, full_name, raise_all


@dataclass(frozen=True)
class TorchMask:
    """One parameter of one module that torch prunes.

    Attributes:
        mask: bool; a copy.
        named: as in `AppliedMask`; torch masks only what it was told to.
        hook: torch's pruning method, under its key among the module's forward pre-hooks.
        layout: names of the module's parameters, buffers and pre-hooks, in order, as they were.
    """

    path: str
    module: nn.Module
    name: str
    mask: Tensor
    hook: tuple[int, BasePruningMethod]
    stored: Tensor
    product: Tensor | None
    layout: tuple[tuple[Any, ...], ...]
    named: bool = True

    def take_off(self) -> None:
        """The module has its plain parameter again, with the unmasked values."""
        module, name = self.module, self.name
        del module._forward_pre_hooks[self.hook[0]]
        del module._buffers[f"{name}_mask"]
        original = module._parameters.pop(f"{name}_orig")
        vars(module).pop(name, None)
        setattr(module, name, original)

    def put_on(self) -> None:
        """Undo `take_off`: the same hook, buffer and order."""
        module, name = self.module, self.name
        module._parameters[f"{name}_orig"] = module._parameters.pop(name)
        module._buffers[f"{name}_mask"] = self.stored
        module._forward_pre_hooks[self.hook[0]] = self.hook[1]
        if self.product is not None:
            setattr(module, name, self.product)
        for registry, order in zip(_registries(module), self.layout, strict=True):
            _reorder(registry, order)


def pruning_hook(module: nn.Module, name: str) -> tuple[int, BasePruningMethod] | None:
    """torch's pruning method for ``module.name`` with its key, or None."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return key, hook
    return None


def torch_masks(model: nn.Module) -> list[TorchMask]:
    """Everything that torch prunes in ``model``, in module order.

    Raises:
        MaskError: a mask is not of 0 and 1; or a parameter that several modules share is pruned in
            one of them and not, or otherwise, in another, which no mask of the parameter can say.
    """
    found: list[TorchMask] = []
    problems: list[str] = []
    for path, module in modules_of(model):
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, BasePruningMethod):
                one = _torch_mask(path, module, key, hook, problems)
                found += [] if one is None else [one]
    if found:
        problems += _disagreements(model, found)
    raise_all("what torch.nn.utils.prune masks here cannot be taken over", problems)
    return found


def _torch_mask(
    path: str, module: nn.Module, key: int, hook: BasePruningMethod, problems: list[str]
) -> TorchMask | None:
    name: str = hook._tensor_name
    stored = module._buffers[f"{name}_mask"]
    # What is checked is what torch multiplies with, whatever method made it.
    mask = copy_entry(path, {name: stored}, problems).get(name)
    if mask is None or stored is None:
        return None
    layout = tuple(tuple(registry) for registry in _registries(module))
    product = vars(module).get(name)
    return TorchMask(path, module, name, mask, (key, hook), stored, product, layout)


def _disagreements(model: nn.Module, found: Iterable[TorchMask]) -> list[str]:
    """What is wrong with parameters that several modules have, where torch prunes one of them."""
    masks = {(id(one.module), f"{one.name}_orig"): one for one in found}
    first = {id(one.module._parameters[f"{one.name}_orig"]): one for one in reversed(list(found))}
    problems = []
    for path, module in modules_of(model):
        for name, parameter in module._parameters.items():
            one = first.get(id(parameter))
            if one is None:
                continue
            other = masks.get((id(module), name))
            if other is None or not torch.equal(other.mask, one.mask):
                problems.append(
                    f"{full_name(path, name)!r} is the same parameter as "
                    f"{full_name(one.path, one.name)!r} and is "
                    f"{'not pruned' if other is None else 'pruned otherwise'}; prune both alike "
                    "(torch.nn.utils.prune.custom_from_mask with one mask)"
                )
    return problems


def _registries(module: nn.Module) -> tuple[MutableMapping[Any, Any], ...]:
    return module._parameters, module._buffers, module._forward_pre_hooks


def _reorder(registry: MutableMapping[Any, Any], order: tuple[Any, ...]) -> None:
    """Sort what was there by its old place; others after it."""
    place = {key: index for index, key in enumerate(order)}
    items = sorted(registry.items(), key=lambda item: place.get(item[0], len(place)))
    registry.clear()
    registry.update(items)
