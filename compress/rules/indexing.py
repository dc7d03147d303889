"""Functions that take positions by number: indexing, gathering, windows.

The axis that positions are taken from stays as it is; the others pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import normal_axis
from compress.rules.movement import reshape_axes
from compress.rules.registry import Call, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]


def _axes_indexed(index: Any) -> int:
    """How many axes an index tensor (or list) takes the place of: a mask, as many as it has."""
    if isinstance(index, fx.Node):
        return len(shape_of(index)) if index.meta["dtype"] == torch.bool else 1
    return 1


@rule("getitem")
class GetItem(Rule):
    """Basic indexing. A bound in the middle of an axis is the user's number, so the axis stays."""

    def plan(self, call: Call) -> list[tuple[str, Any]] | None:
        """What happens to each input axis, and where new ones come; None for tensor indices."""
        index = call.arg(1, "index")
        items = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(i, (fx.Node, list, bool)) for i in items):
            return None
        if any(isinstance(b, fx.Node) for i in items if isinstance(i, slice)
               for b in (i.start, i.stop, i.step)):  # fmt: skip
            return None
        ndim = len(shape_of(call.first))
        taken = sum(i is not None and i is not Ellipsis for i in items)
        rest = [slice(None)] * (ndim - taken)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = rest
        else:
            items += rest
        kinds = {type(None): "new", slice: "slice", int: "select"}
        if not all(type(i) in kinds for i in items):
            return None
        return [(kinds[type(i)], i) for i in items]

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, steps = list(axes(call.first)), self.plan(call)
        if steps is None:
            return self._by_tensor(call, axes, space)
        result: list[Axis] = []
        for kind, item in steps:
            if kind == "new":
                result.append(None)
                continue
            axis = given.pop(0)
            if kind == "select":
                space.pin(axis, call.node, f"is indexed with {item}")
            elif axis is not None and item.indices(len(axis)) != (0, len(axis), 1):
                space.pin(axis, call.node, "is sliced at a fixed position")
                result.append(None)
            else:
                result.append(axis)
        return tuple(result)

    def run(self, call: Call) -> tuple[int, int, int] | None:
        """Tensors that index neighbouring axes: where they begin, how many axes, and how many new.

        A table of biases by relative position, (places, heads)[index]: 0, 1, 2.
        """
        index, ndim = call.arg(1, "index"), len(shape_of(call.first))
        items = list(index) if isinstance(index, tuple) else [index]
        tensors = [i for i, item in enumerate(items) if isinstance(item, (fx.Node, list))]
        rest = [item for item in items if not isinstance(item, (fx.Node, list))]
        plain = all(item is Ellipsis or item == slice(None) for item in rest)
        plain &= not any(node.meta["dtype"] == torch.uint8 for node in call.inputs)  # an old mask
        if not plain or not tensors or tensors != list(range(tensors[0], tensors[-1] + 1)):
            return None
        taken = sum(_axes_indexed(items[i]) for i in tensors)
        start = tensors[0]
        if Ellipsis in items[:start]:  # what comes behind it counts from the end
            start = ndim - taken - (len(items) - 1 - tensors[-1])
        return start, taken, len(call.shape) - (ndim - taken)

    def _by_tensor(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, run = axes(call.first), self.run(call)
        start, taken, new = run or (0, len(given), len(call.shape))
        indices = [axes(node) for node in call.inputs if node is not call.first]
        for several in (given[start : start + taken], *indices):
            space.pin_all(several, call.node, "is indexed with a tensor")
        return (*given[:start], *[None] * new, *given[start + taken :])

    def value(self, call: Call, known: Knowledge) -> Value:
        value, steps = known.value(call.first), self.plan(call)
        if value is None:
            return None
        if steps is None:
            start, taken, new = self.run(call) or (0, value.dim(), len(call.shape))
            if any(size > 1 for size in value.shape[start : start + taken]):
                return None
            return value.reshape(*value.shape[:start], *[1] * new, *value.shape[start + taken :])
        items: list[Any] = []
        axis = 0
        for kind, item in steps:
            if kind != "new":
                constant, axis = value.shape[axis] == 1, axis + 1
                item = item if not constant else 0 if kind == "select" else slice(None)
            items.append(item)
        return value[tuple(items)]


@rule("narrow", "select", "index_select", "gather", "take_along_dim")
class Pick(Rule):
    """Positions of one axis by number; the indices of ``gather`` go along with the other axes."""

    def dim(self, call: Call) -> int:
        at = 2 if call.name == "take_along_dim" else 1
        return normal_axis(call.arg(at, "dim"), len(shape_of(call.first)))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, dim = list(axes(call.first)), self.dim(call)
        space.pin(given[dim], call.node, f"is picked from by {call.name}")
        given[dim] = None
        if call.name in ("gather", "take_along_dim"):
            return self._gathered(call, given, dim, axes, space)
        for node in call.inputs[1:]:
            space.pin_all(axes(node), call.node, f"says what {call.name} picks")
        if call.name == "select":
            del given[dim]
        return tuple(given)

    def _gathered(
        self, call: Call, given: list[Axis], dim: int, axes: AxesOf, space: LabelSpace
    ) -> Axes:
        index = call.arg(1 if call.name == "take_along_dim" else 2, "index")
        index = call.node.kwargs.get("indices", index)
        reason, before = f"is picked from by {call.name}", shape_of(call.first)
        for i, axis in enumerate(axes(index)):
            size = shape_of(index)[i]
            if i != dim and size == before[i]:
                given[i] = space.tie(given[i], axis, call.node, reason)
            elif i == dim or size > 1 or call.name == "gather":
                space.pin_all((given[i], axis), call.node, reason)
                given[i] = None
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, dim = known.value(call.first), self.dim(call)
        if value is None or value.shape[dim] > 1:
            return None
        return value.squeeze(dim) if call.name == "select" else value


@rule("diagonal")
class Diagonal(Rule):
    """The diagonal of two axes, as a new last axis."""

    def dims(self, call: Call) -> set[int]:
        ndim = len(shape_of(call.first))
        return {
            normal_axis(call.arg(2, "dim1", 0), ndim),
            normal_axis(call.arg(3, "dim2", 1), ndim),
        }

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, dims = axes(call.first), self.dims(call)
        space.pin_all((given[d] for d in dims), call.node, "is what diagonal is taken of")
        return (*(axis for i, axis in enumerate(given) if i not in dims), None)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, dims = known.value(call.first), self.dims(call)
        if value is None or any(value.shape[d] > 1 for d in dims):
            return None
        return value.reshape([*(s for i, s in enumerate(value.shape) if i not in dims), 1])


@rule("unfold")
class Windows(Rule):
    """``F.unfold``: (N, C, H, W) to (N, C · window, places); ``Tensor.unfold``: a new last axis."""

    def sized(self, call: Call) -> bool:
        return True

    def columns(self, call: Call) -> bool:
        return len(call.shape) <= len(shape_of(call.first))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given = list(axes(call.first))
        if self.columns(call):
            space.pin_all(given[-2:], call.node, "is a place that unfold takes windows of")
            window = call.shape[-2] // shape_of(call.first)[-3]
            channels = given[-3]
            return (*given[:-3], None if channels is None else np.repeat(channels, window), None)
        dim = normal_axis(call.arg(1, "dimension"), len(given))
        space.pin(given[dim], call.node, "is a place that unfold takes windows of")
        given[dim] = None
        return (*given, None)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None:
            return None
        if not self.columns(call):
            dim = normal_axis(call.arg(1, "dimension"), value.dim())
            return None if value.shape[dim] > 1 else value.unsqueeze(-1)
        if value.shape[-1] > 1 or value.shape[-2] > 1:
            return None
        if call.arg(3, "padding", 0) not in (0, (0, 0)):
            value = torch.where(value == 0, value, torch.nan)
        window = call.shape[-2] // shape_of(call.first)[-3]
        return value.flatten(-2).repeat_interleave(window if value.shape[-3] > 1 else 1, -2)


@rule("fold")
class Fold(Rule):
    """(N, C · window, places) to (N, C, H, W), summed where windows overlap."""

    def sized(self, call: Call) -> bool:
        return True

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given, before = axes(call.first), shape_of(call.first)
        space.pin(given[-1], call.node, "is a place that fold sums up")
        middle = (*before[:-2], call.shape[-3], before[-2] // call.shape[-3], before[-1])
        split = reshape_axes(given, before, middle, call, space)
        space.pin(split[-2], call.node, "is a place in the windows of fold")
        return (*split[:-2], None, None)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None or value.shape[-2] == 1:
            return None
        zero = (value == 0).all(-1).reshape(*value.shape[:-2], call.shape[-3], -1).all(-1)
        return torch.where(zero, 0.0, torch.nan).double()[..., None, None]
