"""Putting masks on a model: as ours, as torch's, or for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from compress.masks.locate import Slot, by_parameter, locate, owners
from compress.masks.parametrization import (
    AppliedMask,
    MaskParametrization,
    applied_to,
    mask_on,
    raw_parameter,
)
from compress.masks.torch_prune import TorchMask, torch_masks


def apply_masks(masks: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
    """Make ``model`` compute with bool masks, in place: see `Masks.apply`.

    What ``torch.nn.utils.prune`` masks in it becomes a mask of ours.

    Raises:
        MaskError: a mask does not fit, or its parameter is on the meta device; the model is
            untouched.
    """
    found, pruned = locate(masks, model), torch_masks(model)
    for one in pruned:
        one.take_off()
    try:
        found += [(Slot(one.path, one.module, one.name), one.mask) for one in pruned]
        _attach(found, model)
    except BaseException:
        for one in reversed(pruned):
            one.put_on()
        raise


def put_torch_masks(masks: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
    """Mask with ``torch.nn.utils.prune``: see `Masks.apply_torch_prune`."""
    applied_to(model)  # raises where a mask that is on it cannot be taken off
    apply_masks(masks, model)
    for one in applied_to(model):
        one.take_off()
        prune.custom_from_mask(one.module, one.name, one.mask)  # type: ignore[no-untyped-call]


def make_permanent(masks: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
    """Write the zeros in: see `Masks.make_permanent`."""
    applied_to(model)
    apply_masks(masks, model)
    write_zeros(applied_to(model))


def write_zeros(applied: Iterable[AppliedMask | TorchMask]) -> None:
    """Take masks off, and make 0 in the parameters what they mask."""
    for one in applied:
        one.take_off()
        with torch.no_grad():
            raw = cast(nn.Parameter, raw_parameter(one.module, one.name))
            raw.masked_fill_(~one.mask, 0)


def _attach(found: list[tuple[Slot, Tensor]], model: nn.Module) -> None:
    wanted = by_parameter(found)
    slots = owners(model)
    attached: list[AppliedMask] = []
    narrowed: list[tuple[MaskParametrization, Tensor, bool]] = []
    try:
        for key, (mask, named) in wanted.items():
            for slot in slots[key]:
                explicit = (id(slot.module), slot.name) in named
                present = mask_on(slot.module, slot.name)
                if present is not None:
                    narrowed.append((present, mask, explicit))
                    continue
                part = MaskParametrization(mask.to(slot.parameter.device, copy=True), explicit)
                applied = AppliedMask(slot.path, slot.module, slot.name, part)
                applied.put_on()
                attached.append(applied)
    except BaseException:
        for applied in reversed(attached):
            applied.take_off()
        raise
    for present, mask, explicit in narrowed:
        present.named |= explicit
        present.mask &= mask.to(present.mask.device)
