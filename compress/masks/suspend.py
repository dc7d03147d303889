"""The masks on a model: read, taken off for a while, or written into the parameters for good."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn

from compress.masks.parametrization import (
    AppliedMask,
    applied_to,
    attach,
    detach,
    raw_parameter,
)
from compress.masks.value import Masks


@dataclass
class SuspendedMasks:
    """Masks taken off a model for a while; also a context manager that restores them.

    Attributes:
        masks: what was applied, empty where nothing was.
    """

    masks: Masks
    _applied: list[AppliedMask] = field(repr=False)

    def restore(self) -> None:
        """Put every mask back where it was. A second call does nothing."""
        while self._applied:
            attach(self._applied[0])
            self._applied.pop(0)

    def __enter__(self) -> SuspendedMasks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def applied_masks(model: nn.Module) -> Masks:
    """A copy of the masks that ``model`` computes with now; empty where there are none.

    A tied parameter is listed under the modules that the masks named; a module registered under
    several paths under the first.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for applied in applied_to(model):
        if applied.parametrization.named:
            entries.setdefault(applied.path, {})[applied.name] = applied.parametrization.mask
    return Masks(entries)


def suspend_masks(model: nn.Module) -> SuspendedMasks:
    """Take our masks off ``model``: plain parameters with the raw, unmasked values.

    Names, order of the parameters, `Parameter` objects and classes are those of the plain model.
    Other people's parametrizations are left alone.

    Raises:
        MaskError: something was parametrised on top of a mask; the model is untouched.
    """
    masks, applied = applied_masks(model), applied_to(model)
    for one in applied:
        detach(one)
    return SuspendedMasks(masks, applied)


def remove_masks(model: nn.Module) -> Masks:
    """Write the zeros of our masks into the parameters, in place, and take the masks off.

    Returns:
        What was applied, as `applied_masks`. A model without masks is left as it is.

    Raises:
        MaskError: as `suspend_masks`.
    """
    masks, applied = applied_masks(model), applied_to(model)
    for one in applied:
        detach(one)
        with torch.no_grad():
            cast(nn.Parameter, raw_parameter(one.module, one.name)).masked_fill_(
                ~one.parametrization.mask, 0
            )
    return masks


def masked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` as the plain model has it: plain names in order, masked entries 0.

    ``model`` keeps its masks. Only masked parameters are copied, once each where they are tied.

    Raises:
        MaskError: as `suspend_masks`.
    """
    with suspend_masks(model) as suspended:
        masks = {
            id(raw_parameter(one.module, one.name)): one.parametrization.mask
            for one in suspended._applied
        }
        state: dict[str, Tensor] = model.state_dict()
        zeroed: dict[int, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            key = id(parameter)
            if key in masks and name in state:
                if key not in zeroed:
                    zeroed[key] = parameter.detach().masked_fill(~masks[key], 0)
                state[name] = zeroed[key]
    return state
