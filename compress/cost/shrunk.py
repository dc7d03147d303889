"""What a model really costs once it is shrunk: a copy is cut and measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
from torch import nn

from compress.cost.model import cost_model
from compress.graph.channels import ChannelGraph
from compress.masks import Masks, suspend_masks
from compress.measure.latency import latencies
from compress.speedup import ModelSpeedup

_IN_TURN, _TURNS = 3, 8  # passes of each model that follow one another, and how often
_ERROR = 0.015  # more turns are taken until the standard error is this fraction
_MOST_MS = 5_000.0  # or the small model has run for so long


class Shrunk:
    """Cuts copies of a model, and measures them.

    Times are of small and dense model in turn, a few passes of each, since the speed of a machine
    that has other work changes from second to second.

    Attributes:
        dense: what the dense model costs.

    Args:
        model: is not touched.
        dummy_input: what it is run on.
        cost: "params", "flops", "memory" or "latency".
        relative: of a latency the ratio to the dense model's of the same moments counts: the time
            is given as it would be at the speed that the machine had for `dense`.
    """

    def __init__(self, model: nn.Module, dummy_input: Any, cost: str, relative: bool) -> None:
        self.plain = deepcopy(model)
        suspend_masks(self.plain)
        self.dummy_input, self.cost, self.relative = dummy_input, cost, relative
        self._turns: dict[bytes, np.ndarray] = {}  # of each cut: (turns, dense and small)
        self._last: tuple[bytes, nn.Module] | None = None
        if cost == "latency":
            self.dense = float(np.median(self._times({"dense": self.plain})))
        else:
            self.dense = self._size(self.plain)

    def cut(self, masks: Masks) -> nn.Module:
        """A shrunk copy."""
        small = deepcopy(self.plain)
        speedup = ModelSpeedup(small, self.dummy_input, masks, verify=False, progress=False)
        return speedup.speedup_model()

    def measure(self, gone: np.ndarray, masks: Callable[[np.ndarray], Masks]) -> float:
        """What the model costs without ``gone``; asked again, it is timed for longer."""
        key = gone.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = key, self.cut(masks(gone))
        small = self._last[1]
        if self.cost != "latency":
            return self._size(small)
        asked = 0
        while True:
            news = self._times({"dense": self.plain, "small": small})
            turns = np.concatenate([self._turns.get(key, news[:0]), news])
            self._turns[key] = turns
            asked += len(news)
            values = turns[:, 1] / turns[:, 0] if self.relative else turns[:, 1]
            spent = float(turns[-asked:, 1].sum()) * _IN_TURN
            if standard_error(values) <= _ERROR or spent >= _MOST_MS:
                return float(np.median(values)) * (self.dense if self.relative else 1.0)

    def _size(self, model: nn.Module) -> float:
        return cost_model(self.cost, ChannelGraph(model, self.dummy_input)).dense

    def _times(self, models: dict[str, nn.Module]) -> np.ndarray:
        """The median of each turn of each model, (turns, models)."""
        found = latencies(
            models, self.dummy_input, warmup=2, repeats=_IN_TURN * _TURNS, in_turn=_IN_TURN
        )
        samples = [np.reshape(each.samples_ms, (_TURNS, _IN_TURN)) for each in found.values()]
        medians: np.ndarray = np.median(np.stack(samples, axis=-1), axis=1)
        return medians


def standard_error(values: np.ndarray) -> float:
    """Of the median of samples, as a fraction of it; from their median absolute deviation."""
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))  # σ, of a normal distribution
    return 1.2533 * spread / median / math.sqrt(len(values))
