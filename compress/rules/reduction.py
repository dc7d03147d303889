"""Functions that sum up over places: pooling, means, interpolation.

Over places they keep the channels. Over a labelled axis they would mix what may go with what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import normal_axis
from compress.rules.attention import tie_broadcast, zero_positions
from compress.rules.elementwise import LARGEST_VALUE, run_on_values, tied_axes
from compress.rules.registry import OPAQUE, Call, Read, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]
_STATISTICS = frozenset("mean sum amax amin std var std_mean var_mean norm logsumexp".split())


@rule("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d",
      "interpolate", "upsample", "max_pool1d_with_indices", "max_pool2d_with_indices",
      "max_pool3d_with_indices", "adaptive_max_pool1d_with_indices",
      "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d_with_indices", "max_unpool1d",
      "max_unpool2d", "max_unpool3d")  # fmt: skip
class Pooling(Rule):
    """Windows over the last axes (as many as the function's rank).

    The places to put (``max_unpool``) go along with the channels.
    """

    def rank(self, call: Call) -> int:
        digits = [c for c in call.name if c.isdigit()]
        return int(digits[0]) if digits else len(call.shape) - 2

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        rank, given = self.rank(call), list(axes(call.first))
        for i in range(len(given) - rank, len(given)):
            space.pin(given[i], call.node, f"is a place that {call.name} pools over")
            given[i] = None
        if call.name.startswith("max_unpool"):
            places = axes(call.arg(1, "indices"))[: len(given) - rank]
            for i, axis in enumerate(places):
                given[i] = space.tie(given[i], axis, call.node, "has places of fixed size")
        if call.shape and not isinstance(call.shape[0], int):  # with indices: places, per channel
            return tuple(tuple(given) for _ in call.shape)
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Any:
        value, places = known.value(call.first), tuple(range(-self.rank(call), 0))
        if value is None:
            return None
        if any(value.shape[axis] > 1 for axis in places):  # known place by place
            zero = (value == 0).all(places, keepdim=True)
            if not bool(zero.any()):
                return None
            value = torch.where(zero, 0.0, torch.nan).double()
        if call.shape and not isinstance(call.shape[0], int):
            return value, None
        changes = call.name.startswith(("lp_pool", "max_unpool"))
        if changes or self._counts_padding(call):
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


@rule("sum", "amax", "amin", "max", "min", "std", "var", "prod", "logsumexp", "any", "all",
      "norm", "argmax", "argmin", "median", "cumsum", "cumprod", "softmax", "log_softmax",
      "softmin", "normalize", "sort", "topk", "argsort", "std_mean", "var_mean",
      "linalg_vector_norm", "kthvalue", "quantile", "diff", "logcumsumexp", "cummax", "cummin",
      "mode", "msort", "linalg_norm")  # fmt: skip
class Reduction(Rule):
    """Functions along some axes, one lane at a time; the other axes pass.

    The axes of a lane stay, but where a 0 adds nothing: a sum, or a norm, may lose what is 0.
    Where the speedup need not be exact, some only read them (a norm written by hand).
    """

    any_size = True

    def gives_way(self, call: Call, space: LabelSpace) -> bool:
        """Whether fewer positions along the axes are the same function of fewer channels.

        Statistics of a parameter are part of what it is, and stay.
        """
        known = call.name in _STATISTICS and len(call.inputs) == 1
        return not space.exact and known and call.first.op != "get_attr"

    def dims(self, call: Call) -> tuple[int, ...]:
        ndim = len(shape_of(call.first))
        second = "norm normalize topk linalg_vector_norm linalg_norm kthvalue quantile diff".split()
        last = ("topk", "sort", "argsort", "diff", "kthvalue", "mode")
        default: Any = 1 if call.name == "normalize" else -1 if call.name in last else None
        dim = call.arg(2 if call.name in second else 1, "dim", default)
        if call.name == "msort":
            dim = 0
        if isinstance(dim, bool):  # var(x, unbiased)
            dim = None
        if dim is None or dim == ():
            return tuple(range(ndim))
        return tuple(normal_axis(d, ndim) for d in ([dim] if isinstance(dim, int) else dim))

    def adds_zeros(self, call: Call) -> bool:
        """Whether positions that are 0 do not count."""
        if call.name not in ("sum", "norm", "linalg_norm", "linalg_vector_norm", "normalize"):
            return False
        order = 2 if call.name == "sum" else call.arg(1, "ord", call.node.kwargs.get("p", 2))
        if call.name == "linalg_norm" and len(self.dims(call)) > 1:  # of a matrix
            return order is None
        return order in (None, "fro") or (isinstance(order, (int, float)) and order > 0)

    def of_two(self, call: Call) -> bool:
        """Whether it is the larger (or smaller) of two tensors, position by position."""
        return len(call.inputs) > 1 and call.name in ("max", "min")

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        if self.of_two(call):
            return tied_axes(call.inputs, axes, call, space)
        if len(call.inputs) > 1:
            return OPAQUE.labels(call, axes, space)
        given, dims, sums = list(axes(call.first)), self.dims(call), self.adds_zeros(call)
        for dim in dims:
            if not sums and not self.gives_way(call, space):
                space.pin(given[dim], call.node, f"is what {call.name} works over")
            if not (sums and call.name == "normalize"):
                given[dim] = None
        if call.shape and not isinstance(call.shape[0], int):
            return tuple(self._drop(given, dims, len(s)) for s in call.shape)
        return self._drop(given, dims, len(call.shape))

    def _drop(self, given: list[Axis], dims: tuple[int, ...], ndim: int) -> Axes:
        if ndim == len(given):
            return tuple(given)
        return tuple(axis for i, axis in enumerate(given) if i not in dims)

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        sums = self.adds_zeros(call)
        if len(call.inputs) > 1 or not (sums or self.gives_way(call, known.graph.space)):
            return
        for dim in self.dims(call):
            labels = known.axis(call.first, dim)
            if labels is not None:
                zero = zero_positions(known, call.first, dim)
                yield Read(labels, ~zero if sums else np.ones(len(labels), bool))

    def value(self, call: Call, known: Knowledge) -> Any:
        if self.of_two(call):
            return run_on_values(call, known)
        value = known.value(call.first)
        if value is None or len(call.inputs) > 1 or not value.is_floating_point():
            return None
        if call.name == "normalize":
            return torch.where(value == 0, value, torch.nan)
        if call.name in ("mean", "sum", "amax", "amin"):
            return self._of_compact(call, value)
        return along_lanes(call, value, self.dims(call))

    def _of_compact(self, call: Call, value: torch.Tensor) -> Value:
        """The function of a compact value: what it does not vary over need not be expanded."""
        dims, keepdim = self.dims(call), len(call.shape) == value.dim()
        result: torch.Tensor = getattr(torch, call.name)(value, dims, keepdim)
        if call.name == "sum":  # what a compact value does not vary over is there as often
            times = [shape_of(call.first)[d] for d in dims if value.shape[d] == 1]
            result = result * prod(times)
        return None if bool(result.isnan().all()) else result


def along_lanes(call: Call, value: torch.Tensor, dims: tuple[int, ...]) -> Any:
    """Run the function along whole lanes of known values; a lane with anything unknown is."""
    shape = shape_of(call.first)
    whole = value.expand([shape[i] if i in dims else s for i, s in enumerate(value.shape)])
    unknown = whole.isnan().any(dims, keepdim=True)
    if whole.numel() > LARGEST_VALUE or bool(unknown.all()):
        return None
    kwargs = {k: v for k, v in call.node.kwargs.items() if k not in ("input", "out", "dtype")}
    arguments: tuple[Any, ...] = call.node.args[1:]
    target: Any = call.node.target
    result = target(torch.where(unknown, 0.0, whole), *arguments, **kwargs)

    def one(part: torch.Tensor) -> Value:
        lanes = unknown if part.dim() == value.dim() else unknown.squeeze(dims)
        return torch.where(lanes, torch.nan, part) if part.is_floating_point() else None

    return one(result) if isinstance(result, torch.Tensor) else tuple(map(one, result))


@rule("cosine_similarity", "cdist")
class Comparison(Rule):
    """Two tensors along an axis that is summed over: it loses positions at which both are 0.

    ``cosine_similarity`` compares along ``dim``; ``cdist`` the rows (…, n, features) with (…, m,
    features).
    """

    def sides(self, call: Call) -> tuple[list[fx.Node], int]:
        """Both tensors, and the axis that is summed over, from the right."""
        nodes = [call.arg(0, "x1"), call.arg(1, "x2")]
        dim = call.arg(2, "dim", 1) if call.name == "cosine_similarity" else -1
        return nodes, dim - len(shape_of(nodes[0])) if dim >= 0 else dim

    def sums(self, call: Call) -> bool:
        """Whether what is 0 in both adds nothing."""
        nodes, _ = self.sides(call)
        if call.name == "cdist":
            return bool(call.arg(2, "p", 2.0) > 0)
        return shape_of(nodes[0]) == shape_of(nodes[1])

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        nodes, dim = self.sides(call)
        if not self.sums(call):
            return OPAQUE.labels(call, axes, space)
        summed = [axes(node)[dim] for node in nodes]
        space.tie(summed[0], summed[1], call.node, f"is summed over in {call.name}")
        if call.name == "cdist":
            lead = tie_broadcast([(node, axes(node)[:-2]) for node in nodes], call, space)
            return (*lead, axes(nodes[0])[-2], axes(nodes[1])[-2])
        rest = []
        for node in nodes:
            own, position = list(axes(node)), len(axes(node)) + dim
            rest.append((*own[:position], *own[position + 1 :]))
        reason = f"meets a fixed size in {call.name}"
        return tuple(space.tie(a, b, call.node, reason) for a, b in zip(*rest, strict=True))

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        nodes, dim = self.sides(call)
        if not self.sums(call):
            return
        zero = np.logical_and.reduce([zero_positions(known, node, dim) for node in nodes])
        for node in nodes:
            labels = known.axis(node, dim)
            if labels is not None:
                yield Read(labels, ~zero)


@rule("weight_norm")
class WeightNorm(Rule):
    """(direction, length, dim): each slice along ``dim`` gets its length."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, dim = list(axes(call.first)), call.arg(2, "dim", 0)
        length, reason = axes(call.arg(1, "g")), "is what weight_norm takes its norm over"
        for i, axis in enumerate(given):
            if i == dim:
                given[i] = space.tie(axis, length[i], call.node, "has a fixed length")
            else:
                space.pin(axis, call.node, reason)
                given[i] = None
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        direction, length = known.value(call.first), known.value(call.arg(1, "g"))
        if direction is None or length is None:
            return None
        rest = [i for i in range(direction.dim()) if i != call.arg(2, "dim", 0)]
        return direction * (length / direction.square().sum(rest, keepdim=True).sqrt())
