"""Reading and writing parts of tensors: indices, picks along one axis, diagonals, windows.

An axis that is taken whole keeps its labels, and so does a slice of one: the bounds may be counted
anew, which a replay tells. An axis of which single positions are named stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import normal_axis
from compress.rules.elementwise import LARGEST_VALUE
from compress.rules.movement import reshape_axes
from compress.rules.registry import OPAQUE, Call, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]
_MASKS = (torch.bool, torch.uint8)
_SLICED = "is sliced at a fixed position"


@dataclass(frozen=True)
class Picked:
    """What ``x[index]`` takes of x.

    ``axes``: for each axis of ``x[index]`` the axis of x that it is, in order; None for others.
    ``parts``: the axes of x that are there in part, with their slices. ``fixed``: the axes of x of
    which positions are picked, and how (a clause). ``items``: one for each axis, and new axis.
    """

    axes: list[int | None]
    parts: dict[int, slice]
    fixed: dict[int, str]
    items: list[Any]

    def by_number(self) -> bool:
        """Whether there are no tensors, lists and new axes in the index."""
        return all(isinstance(item, (int, slice)) for item in self.items)


def picked(call: Call) -> Picked | None:
    """Read the index of a call; None for forms that are not foreseen."""
    shape = shape_of(call.first)
    items = _items(call.arg(1, "index"), len(shape))
    if items is None:
        return None
    left: list[tuple[int | None, bool]] = []  # by numbers and slices: axis of x, tensor index?
    parts: dict[int, slice] = {}
    fixed: dict[int, str] = {}
    axis = 0
    for item in items:
        if item is None:
            left.append((None, False))
        elif isinstance(item, slice):
            if _has_tensors(item):
                fixed[axis] = _SLICED
            elif item.indices(shape[axis]) != (0, shape[axis], 1):
                parts[axis] = item
            left.append((None if axis in fixed else axis, False))
        elif _takes_one(item):
            fixed[axis] = f"is indexed with {item}"
        else:
            for each in range(axis, axis + _consumed(item)):
                fixed[each] = "is indexed with a tensor"
                left.append((None, True))
        axis += _consumed(item)
    joined = _with_tensors_joined(left, max(map(_rank, items), default=0))
    return Picked(joined, parts, fixed, items)


def _with_tensors_joined(left: list[tuple[int | None, bool]], rank: int) -> list[int | None]:
    """Tensor indices give their common axes where they are, or at the front if they are apart."""
    at = [i for i, (_, tensor) in enumerate(left) if tensor]
    axes = [axis for axis, tensor in left if not tensor]
    if at:
        first = at[0] if at[-1] - at[0] == len(at) - 1 else 0
        axes[first:first] = [None] * rank
    return axes


def _items(index: Any, ndim: int) -> list[Any] | None:
    """The parts of an index, one for each axis and each new axis; None for unforeseen forms."""
    items = list(index) if isinstance(index, tuple) else [index]
    for item in items:
        known = item is None or item is Ellipsis or isinstance(item, (int, slice, fx.Node, list))
        zero_dim_mask = isinstance(item, fx.Node) and not shape_of(item) and _is_mask(item)
        if isinstance(item, bool) or zero_dim_mask or not known:
            return None
    rest = [slice(None)] * (ndim - sum(_consumed(i) for i in items if i is not Ellipsis))
    at = items.index(Ellipsis) if any(i is Ellipsis for i in items) else None
    return items + rest if at is None else [*items[:at], *rest, *items[at + 1 :]]


def _takes_one(item: Any) -> bool:
    """An integer, or a tensor that holds one: the axis is gone."""
    return isinstance(item, int) or (isinstance(item, fx.Node) and not shape_of(item))


def _consumed(item: Any) -> int:
    """How many axes of x an item takes."""
    if isinstance(item, fx.Node) and _is_mask(item):
        return len(shape_of(item))
    return 0 if item is None else 1


def _rank(item: Any) -> int:
    """How many axes a tensor as index gives."""
    if isinstance(item, list):
        return 1 + max(map(_rank, item), default=0)
    if isinstance(item, fx.Node):
        return 1 if _is_mask(item) else len(shape_of(item))
    return 0


def _is_mask(node: fx.Node) -> bool:
    return node.meta["dtype"] in _MASKS


def _has_tensors(item: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (item.start, item.stop, item.step))


def _pin_picked(call: Call, taken: Picked, axes: AxesOf, space: LabelSpace) -> None:
    """Keep the axes that are picked from, and the tensors that say where."""
    for axis, reason in taken.fixed.items():
        space.pin(axes(call.first)[axis], call.node, reason)
    indices: list[fx.Node] = []
    fx.node.map_arg(call.arg(1, "index"), indices.append)
    for node in indices:
        space.pin_all(axes(node), call.node, "says which positions are picked")


class Indexing(Rule):
    """``x[index]``, read or written."""

    moves = True

    def sized(self, call: Call) -> bool:
        taken = picked(call)
        return taken is not None and bool(taken.parts)

    def picks(self, call: Call) -> dict[int, np.ndarray]:
        shape, taken = shape_of(call.first), picked(call)
        if taken is None:
            return {}
        found = {axis: np.arange(shape[axis])[part] for axis, part in taken.parts.items()}
        if taken.by_number():
            ones = ((axis, item) for axis, item in enumerate(taken.items) if isinstance(item, int))
            found |= {axis: np.arange(shape[axis])[[item]] for axis, item in ones}
        return found


def _along_parts(tensor: torch.Tensor, taken: Picked) -> torch.Tensor:
    """A compact tensor of x with its slices taken, where it varies."""
    items = [slice(None)] * tensor.dim()
    for axis, part in taken.parts.items():
        items[axis] = part if tensor.shape[axis] > 1 else slice(None)
    return tensor[tuple(items)]


@rule("getitem")
class GetItem(Indexing):
    """``x[index]``: what is sliced has a part of the labels."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        given, taken = list(axes(call.first)), picked(call)
        if taken is None or len(taken.axes) != len(call.shape):
            return OPAQUE.labels(call, axes, space, "is indexed in a way without a rule")
        _pin_picked(call, taken, axes, space)
        for axis, part in taken.parts.items():
            labels = given[axis]
            if labels is not None:
                space.sliced.append(labels)
                given[axis] = np.ascontiguousarray(labels[part])
        return tuple(None if axis is None else given[axis] for axis in taken.axes)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, taken = known.value(call.first), picked(call)
        if value is None or taken is None:
            return None
        if any(isinstance(item, (fx.Node, list)) for item in taken.items):
            if not value.is_floating_point():
                return None
            value = _along_parts(value, taken)
            if taken.fixed:  # known where all positions are the same
                low, value = (f(value, tuple(taken.fixed), True) for f in (torch.amin, torch.amax))
                value = torch.where(low == value, value, torch.nan)
            return value.reshape([1 if a is None else value.shape[a] for a in taken.axes])
        axis, items = 0, list(taken.items)
        for at, item in enumerate(items):
            if item is not None:
                if value.shape[axis] == 1:
                    items[at] = 0 if isinstance(item, int) else slice(None)
                axis += 1
        return value[tuple(items)]


@rule("setitem")
class SetItem(Indexing):
    """``x[index] = value``: what is written has the axes that are taken, as x has."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        taken = picked(call)
        if taken is None:
            return OPAQUE.labels(call, axes, space, "is written in a way without a rule")
        _pin_picked(call, taken, axes, space)
        result: list[Axis] = list(axes(call.first))
        for axis in taken.fixed:
            result[axis] = None
        written = call.arg(2, "value")
        if isinstance(written, fx.Node):
            self._tie_written(call, written, taken, result, axes, space)
        return tuple(result)

    def _tie_written(
        self, call: Call, written: fx.Node, taken: Picked, result: list[Axis], axes: AxesOf,
        space: LabelSpace,
    ) -> None:  # fmt: skip
        sizes, given, shape = shape_of(written), axes(written), call.shape
        for back in range(1, len(sizes) + 1):
            target = taken.axes[-back] if back <= len(taken.axes) else None
            if target is None:
                space.pin(given[-back], call.node, "is written to positions by number")
                continue
            there, part = result[target], taken.parts.get(target, slice(None))
            if sizes[-back] == len(range(shape[target])[part]):
                piece = None if there is None else there[part]
                tied = space.tie(piece, given[-back], call.node, "is written to a fixed size")
                result[target] = there if target in taken.parts else tied

    def value(self, call: Call, known: Knowledge) -> Value:
        before, taken, written = known.value(call.first), picked(call), call.arg(2, "value")
        value = known.value(written) if isinstance(written, fx.Node) else torch.tensor(written)
        if taken is None or value is None or value.dim() > len(taken.axes):
            return None
        value = value.reshape([1] * (len(taken.axes) - value.dim()) + list(value.shape))
        if taken.by_number():
            return self._overwritten(call, before, value, taken)
        return None if before is None else self._unchanged(before, value, taken)

    def _overwritten(self, call: Call, before: Value, value: torch.Tensor, taken: Picked) -> Value:
        """What was there, with what is written in its place."""
        if before is None:
            before = torch.full((1,) * len(call.shape), torch.nan, dtype=torch.float64)
        sizes = list(before.shape)
        for at, axis in enumerate(taken.axes):
            if axis is not None and value.shape[at] > 1:
                sizes[axis] = call.shape[axis]
        for axis in (*taken.parts, *taken.fixed):
            sizes[axis] = call.shape[axis]
        if prod(sizes) > LARGEST_VALUE or not before.is_floating_point():
            return None
        result = before.expand(sizes).clone()
        items = [i if size > 1 else 0 if isinstance(i, int) else slice(None)
                 for i, size in zip(taken.items, sizes, strict=True)]  # fmt: skip
        result[tuple(items)] = value.to(result.dtype)
        return None if bool(result.isnan().all()) else result

    def _unchanged(self, before: torch.Tensor, value: torch.Tensor, taken: Picked) -> Value:
        """Known where what was there and what is written are the same."""
        if not before.is_floating_point() or taken.parts:
            return None
        sizes = [1] * before.dim()
        for at, axis in enumerate(taken.axes):
            if axis is not None:
                sizes[axis] = value.shape[at]
            elif value.shape[at] > 1:
                return None
        return torch.where(before == value.reshape(sizes), before, torch.nan)


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


@rule("index_add", "index_copy")
class WriteRows(Rule):
    """``x.index_add(dim, index, source)``: of both tensors all axes go together but ``dim``."""

    def parts(self, call: Call) -> tuple[list[fx.Node], int]:
        """x and the source, and the axis whose positions are named."""
        dim = normal_axis(call.arg(1, "dim"), len(call.shape))
        return [call.first, call.arg(3, "source", call.node.kwargs.get("tensor"))], dim

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        (x, source), dim = self.parts(call)
        space.pin_all(axes(call.arg(2, "index")), call.node, "says which positions are written")
        result: list[Axis] = list(axes(x))
        for i, axis in enumerate(axes(source)):
            if i == dim:
                space.pin_all((result[i], axis), call.node, "is written to positions by number")
                result[i] = None
            else:
                reason = "is written to a fixed size"
                result[i] = space.tie(result[i], axis, call.node, reason)
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        """What is 0 before and in the source."""
        nodes, dim = self.parts(call)
        values = [known.value(node) for node in nodes]
        zeros = [(v == 0).all(dim, keepdim=True) for v in values if v is not None]
        if len(zeros) < len(nodes):
            return None
        return torch.where(zeros[0] & zeros[1], 0.0, torch.nan).double()


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
