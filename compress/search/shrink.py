"""Small copies of one model under many masks: recorded once, cut as often as is asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.graph.channels import ChannelGraph
from compress.graph.walk import leaves_of, modules_of
from compress.masks import Masks
from compress.speedup.cut import Cut, Cutter, Options
from compress.speedup.decide import Decision, Limits
from compress.speedup.plan import Plan
from compress.speedup.surgery import by_leaf


@dataclass(frozen=True)
class Small:
    """A candidate.

    Attributes:
        model: nobody else's.
        masks: of what it is without.
        plan: what was done to it.
        decision: what stayed, and why; None of a masked model.
    """

    model: nn.Module
    masks: Masks
    plan: Plan
    decision: Decision | None


class Shrinker:
    """Makes what `ModelSpeedup` makes of a model, as copies.

    Args:
        model: plain; it is cut and put together again, so it must be nobody else's.
        dummy_input: an input of it.
        graph: of the model; it learns what the model's code cannot follow. None where single
            weights are masked.
    """

    def __init__(self, model: nn.Module, dummy_input: Any, graph: ChannelGraph | None) -> None:
        self.model, self.dummy_input, self.graph = model, dummy_input, graph
        self._cutter: Cutter | None = None

    def small(self, masks: Masks) -> Small:
        """A copy of the model without what is masked.

        Raises:
            CompressError: as `ModelSpeedup`.
        """
        with torch.inference_mode(False):
            before = {id(t): t.data_ptr() for _, t, _ in leaves_of(self.model)}
            cut = self._cut(masks)
            try:
                return Small(_copied(self.model, before), masks, cut.plan, cut.decision)
            finally:
                cut.undo()

    def learns(self, several: Iterable[Masks]) -> bool:
        """Whether the graph learns anything when the model is cut under some masks."""
        assert self.graph is not None, "whole filters are masked"
        before = self.graph.experience()
        with torch.inference_mode(False):
            for masks in several:
                self._cut(masks).undo()
        return self.graph.experience() != before

    def masked(self, masks: Masks) -> Small:
        """A copy of the model with its masks written into the weights."""
        copy = deepcopy(self.model)
        masks.make_permanent(copy)
        return Small(copy, masks, Plan(), None)

    def _cut(self, masks: Masks) -> Cut:
        flat = by_leaf(self.model, masks)
        first = self._cutter is None
        if self._cutter is None:
            options = Options("exact", Limits(1, 1), True)
            self._cutter = Cutter(self.model, self.dummy_input, flat, options, self.graph)
        else:
            self._cutter.renew(flat)
        # Nobody compares what the copies compute: the code is seen to follow the first time, and
        # then where a plan has something new in it.
        return self._cutter.cut(always_replay=first)


def _copied(model: nn.Module, before: Mapping[int, int]) -> nn.Module:
    """A deepcopy of a model that has been cut, in a fraction of its time.

    It gets the data that the cut made, for the model gets its own back; ``before`` says where the
    data of each tensor was.
    """
    known: dict[int, Any] = {}  # copies by id, as deepcopy keeps them
    for _, tensor, _ in leaves_of(model):
        if before.get(id(tensor)) == tensor.data_ptr():
            continue
        if type(tensor) is nn.Parameter:
            known[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
        elif type(tensor) is torch.Tensor and not tensor.requires_grad:
            known[id(tensor)] = tensor.detach()
    for _, module in modules_of(model):
        for value in vars(module).values():
            # Each has a dozen, for its hooks; deepcopy takes as long for one as for a tensor.
            if type(value) is OrderedDict and not value:
                known[id(value)] = OrderedDict()
    return deepcopy(model, known)
