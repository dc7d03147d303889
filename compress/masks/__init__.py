"""Masks as a value, and masks on a model.

`Masks` says which entries of which parameters are kept: it prints, compares, combines, is checked
against a model, and is saved without pickle. `Masks.apply` makes a model compute with them (and
train: masked entries are 0 in the forward and get a zero gradient), `suspend_masks` takes them off
for a while, `remove_masks` writes the zeros into the parameters for good. A mask on a model is a
`torch.nn.utils.parametrize` parametrization.
"""

from compress.masks.locate import Slot, parameter_slots
from compress.masks.parametrization import (
    MaskParametrization,
    masked_parameter,
    raw_parameter,
)
from compress.masks.suspend import (
    SuspendedMasks,
    applied_masks,
    masked_state_dict,
    remove_masks,
    suspend_masks,
)
from compress.masks.value import Masks

__all__ = [
    "MaskParametrization",
    "Masks",
    "Slot",
    "SuspendedMasks",
    "applied_masks",
    "masked_parameter",
    "masked_state_dict",
    "parameter_slots",
    "raw_parameter",
    "remove_masks",
    "suspend_masks",
]
