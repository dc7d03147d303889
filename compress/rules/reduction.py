"""Functions that sum up over places: pooling, means, interpolation.

Over places they keep the channels. Over a labelled axis they would mix what may go with what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import normal_axis
from compress.rules.elementwise import tied_axes
from compress.rules.registry import Call, Read, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]
_STATISTICS = frozenset("mean sum amax amin std var std_mean var_mean norm logsumexp".split())


@rule("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d",
      "interpolate")  # fmt: skip
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


@rule("amax", "amin", "max", "min", "std", "var", "prod", "logsumexp", "any", "all",
      "argmax", "argmin", "median", "cumsum", "cumprod", "softmax", "log_softmax",
      "softmin", "sort", "topk", "argsort", "std_mean", "var_mean")  # fmt: skip
class Reduction(Rule):
    """The axes that are worked over stay; the others pass.

    Where the speedup need not be exact, some only read them (a norm written by hand).
    """

    def gives_way(self, call: Call, space: LabelSpace) -> bool:
        """Whether fewer positions along the axes are the same function of fewer channels.

        Statistics of a parameter are part of what it is, and stay.
        """
        known = call.name in _STATISTICS and len(call.inputs) == 1
        return not space.exact and known and call.first.op != "get_attr"

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
        for dim in dims:
            if not self.gives_way(call, space):
                space.pin(given[dim], call.node, f"is what {call.name} works over")
            given[dim] = None
        if call.shape and not isinstance(call.shape[0], int):
            return tuple(self._drop(given, dims, len(s)) for s in call.shape)
        return self._drop(given, dims, len(call.shape))

    def _drop(self, given: list[Axis], dims: tuple[int, ...], ndim: int) -> Axes:
        if ndim == len(given):
            return tuple(given)
        return tuple(axis for i, axis in enumerate(given) if i not in dims)

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if not self.gives_way(call, known.graph.space):
            return
        for dim in self.dims(call):
            labels = known.axis(call.first, dim)
            if labels is not None:
                yield Read(labels, np.ones(len(labels), bool))

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None or call.name not in ("mean", "sum", "amax", "amin"):
            return None
        dims, keepdim = self.dims(call), len(call.shape) == value.dim()
        result: torch.Tensor = getattr(torch, call.name)(value, dims, keepdim)
        if call.name == "sum":  # what a compact value does not vary over is there as often
            times = [shape_of(call.first)[d] for d in dims if value.shape[d] == 1]
            result = result * prod(times)
        return None if bool(result.isnan().all()) else result
