"""Putting masks on a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.masks.locate import by_parameter, locate, owners
from compress.masks.parametrization import (
    AppliedMask,
    MaskParametrization,
    attach,
    detach,
    mask_on,
)


def apply_masks(masks: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> None:
    """Make ``model`` compute with bool masks, in place: see `Masks.apply`.

    Raises:
        MaskError: a mask does not fit, or its parameter is on the meta device; the model is
            untouched.
    """
    wanted = by_parameter(locate(masks, model))
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
                attach(applied)
                attached.append(applied)
    except BaseException:
        for applied in reversed(attached):
            detach(applied)
        raise
    for present, mask, explicit in narrowed:
        present.named |= explicit
        present.mask &= mask.to(present.mask.device)
