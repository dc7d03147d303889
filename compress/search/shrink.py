"""Small copies of one model under many masks: recorded once, cut as often as is asked."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from compress.masks import Masks
from compress.speedup.cut import Cutter, Options
from compress.speedup.decide import Limits
from compress.speedup.plan import Plan
from compress.speedup.surgery import by_leaf


class Shrinker:
    """Makes what `ModelSpeedup` makes of a model, as copies.

    Args:
        model: plain; it is cut and put together again, so it must be nobody else's.
        dummy_input: an input of it.
    """

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        self.model, self.dummy_input = model, dummy_input
        self._cutter: Cutter | None = None

    def small(self, masks: Masks) -> tuple[nn.Module, Plan]:
        """A copy of the model without what is masked, and what was done to it.

        Raises:
            CompressError: as `ModelSpeedup`.
        """
        with torch.inference_mode(False):
            flat = by_leaf(self.model, masks)
            first = self._cutter is None
            if self._cutter is None:
                options = Options("exact", Limits(1, 1), True)
                self._cutter = Cutter(self.model, self.dummy_input, flat, options)
            else:
                self._cutter.renew(flat)
            # Nobody compares what the copies compute: the code is seen to follow the first time,
            # and then where a plan has something new in it.
            cut = self._cutter.cut(always_replay=first)
            try:
                return deepcopy(self.model), cut.plan
            finally:
                cut.undo()

    def masked(self, masks: Masks) -> nn.Module:
        """A copy of the model with its masks written into the weights."""
        copy = deepcopy(self.model)
        masks.make_permanent(copy)
        return copy
