"""Functions that sum up over places: pooling, means, interpolation.

Over places they keep the channels. Over a labelled axis they would mix what may go with what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import normal_axis, per_position
from compress.rules.elementwise import tied_axes
from compress.rules.registry import Call, Read, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]


@rule("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d",
      "interpolate", "upsample")  # fmt: skip
class Pooling(Rule):
    """Windows over the last axes (as many as the function's rank)."""

    def rank(self, call: Call) -> int:
        digits = [c for c in call.name if c.isdigit()]
        return int(digits[0]) if digits else len(call.shape) - 2

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        rank, given = self.rank(call), list(axes(call.first))
        for i in range(len(given) - rank, len(given)):
            space.pin(given[i], call.node, f"is a place that {call.name} pools over")
            given[i] = None
        if call.shape and not isinstance(call.shape[0], int):  # with indices: places, per channel
            return tuple(tuple(given) for _ in call.shape)
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, rank = known.value(call.first), self.rank(call)
        if value is None or any(s > 1 for s in value.shape[-rank:]):
            return None
        if call.shape and not isinstance(call.shape[0], int):
            return None
        if call.name.startswith("lp_pool") or self._counts_padding(call):
            return torch.where(value == 0, value, torch.nan)
        return value

    def _counts_padding(self, call: Call) -> bool:
        """Whether zeros outside the picture enter an average."""
        if not call.name.startswith("avg_pool"):
            return False
        padding = call.arg(3, "padding", 0)
        padded = padding != 0 if isinstance(padding, int) else any(padding)
        divisor = call.arg(6, "divisor_override")
        return divisor is not None or (padded and bool(call.arg(5, "count_include_pad", True)))


@rule("roi_align", "roi_pool", "grid_sample", "grid_sampler")
class Sampling(Rule):
    """Places of a picture (N, C, H, W) that another tensor names, channel by channel.

    ``roi_align``: boxes (K, 5) or a list of them, to (K, C, h, w); ``grid_sample``: places
    (N, h, w, 2), to (N, C, h, w). Outside of the picture there may be zeros.
    """

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        given = axes(call.first)
        for i, axis in enumerate(given):
            if i != 1:
                space.pin(axis, call.node, f"is a place that {call.name} looks up")
        for node in call.inputs[1:]:
            space.pin_all(axes(node), call.node, f"says where {call.name} looks")
        if call.shape and not isinstance(call.shape[0], int):  # with indices: places, per channel
            return tuple((None, given[1], *[None] * (len(s) - 2)) for s in call.shape)
        return (None, given[1], *[None] * (len(call.shape) - 2))

    def value(self, call: Call, known: Knowledge) -> Any:
        value = known.value(call.first)
        if value is None or any(s > 1 for i, s in enumerate(value.shape) if i != 1):
            return None
        value = torch.where(value == 0, value, torch.nan)
        several = call.shape and not isinstance(call.shape[0], int)
        return (value, *[None] * (len(call.shape) - 1)) if several else value


_PASS_ZEROS = frozenset(["sum", "norm", "normalize"])


@rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "prod", "logsumexp", "any", "all",
      "norm", "argmax", "argmin", "median", "cumsum", "cumprod", "softmax", "log_softmax",
      "softmin", "normalize", "sort", "topk", "argsort", "std_mean", "var_mean")  # fmt: skip
class Reduction(Rule):
    """The axes that are worked over stay; the others pass.

    Sums and norms do not feel zeros: there a position that is known to be 0 may go.
    """

    def dims(self, call: Call) -> tuple[int, ...]:
        ndim = len(shape_of(call.first))
        at = {"norm": 2, "normalize": 2, "topk": 2, "logsumexp": 1}.get(call.name, 1)
        default: Any = {"topk": -1, "sort": -1, "argsort": -1, "normalize": 1}.get(call.name)
        dim = call.arg(at, "dim", default)
        if isinstance(dim, bool):  # var(x, unbiased)
            dim = None
        if dim is None or dim == ():
            return tuple(range(ndim))
        return tuple(normal_axis(d, ndim) for d in ([dim] if isinstance(dim, int) else dim))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        if len(call.inputs) > 1:  # max(a, b)
            return tied_axes(call.inputs, axes, call, space)
        given, dims = list(axes(call.first)), self.dims(call)
        if not self.passes_zeros(call):
            for dim in dims:
                space.pin(given[dim], call.node, f"is what {call.name} works over")
                given[dim] = None
        elif call.name != "normalize":
            for dim in dims:
                given[dim] = None
        if call.shape and not isinstance(call.shape[0], int):
            return tuple(self._drop(given, dims, len(s)) for s in call.shape)
        return self._drop(given, dims, len(call.shape))

    def passes_zeros(self, call: Call) -> bool:
        """Whether a 0 less among what is worked over makes no difference."""
        power = 2 if call.name == "sum" else call.arg(1, "p", 2)
        power = 2 if power in ("fro", None) else power
        return call.name in _PASS_ZEROS and isinstance(power, (int, float)) and power > 0

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if not self.passes_zeros(call):
            return
        value = known.value(call.first)
        for dim in self.dims(call):
            labels = known.axis(call.first, dim)
            if labels is not None:
                constants = None if value is None else per_position(value, dim, len(labels))
                zero = np.zeros(len(labels), bool) if constants is None else constants.numpy() == 0
                yield Read(labels, ~zero)

    def _drop(self, given: list[Axis], dims: tuple[int, ...], ndim: int) -> Axes:
        if ndim == len(given):
            return tuple(given)
        return tuple(axis for i, axis in enumerate(given) if i not in dims)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if call.name == "normalize":
            return None if value is None else torch.where(value == 0, value, torch.nan)
        if value is None or call.name not in ("mean", "sum", "amax", "amin"):
            return None
        dims = self.dims(call)
        if any(value.shape[d] > 1 for d in dims):
            return None
        if call.name == "sum":
            for dim in dims:
                value = value * shape_of(call.first)[dim]
        if len(call.shape) < value.dim():
            value = value.reshape([s for i, s in enumerate(value.shape) if i not in dims])
        return value
