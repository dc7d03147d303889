"""Functions that move elements without changing them: views, transposes, joins, splits, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, EqualParts, LabelSpace
from compress.graph.shapes import normal_axis, numel, regroup, reshape_compact
from compress.rules.registry import OPAQUE, Call, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]


def reshape_axes(
    axes: Axes, before: Sequence[int], after: Sequence[int], call: Call, space: LabelSpace
) -> Axes:
    """The axes of a tensor of shape ``before`` seen as ``after``."""
    result: list[Axis] = [None] * len(after)
    if numel(before) == 0:
        space.pin_all(axes, call.node, "is reshaped while empty")
        return tuple(result)
    for left, right in regroup(tuple(before), tuple(after)):
        left = tuple(a for a in left if before[a] > 1)
        right = tuple(a for a in right if after[a] > 1)
        if not left or all(axes[a] is None for a in left):
            continue
        merged = space.merge([axes[a] for a in left], [before[a] for a in left], call.node)
        assert merged is not None
        parts = space.split(merged, [after[a] for a in right], call.node)
        for axis, part in zip(right, parts, strict=True):
            result[axis] = part
    return tuple(result)


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze",
      "unsqueeze")  # fmt: skip
class Reshape(Rule):
    """Any change of shape that keeps the elements' order; the recorded shapes say which."""

    moves = True

    def given_sizes(self, call: Call) -> dict[int, int]:
        sizes = call.rest(1, "shape") if call.name in ("view", "reshape") else ()
        return {i: s for i, s in enumerate(sizes) if isinstance(s, int) and s != -1}

    def splits(self, call: Call) -> list[tuple[int, tuple[int, ...]]]:
        if not self.given_sizes(call):
            return []
        groups = regroup(shape_of(call.first), call.shape)
        return [
            (left[0], tuple(call.shape[axis] for axis in right))
            for left, right in groups
            if len(left) == 1 < len(right)
        ]

    def part_sizes(self, call: Call, shapes: Any) -> list[int]:
        """``view(self.bias_shape)``: the whole shape as one attribute."""
        given = self.given_sizes(call)
        return list(shapes) if len(given) == len(call.shape) else []

    def sized(self, call: Call) -> bool:
        if call.name in ("view", "reshape"):  # 1 cannot shrink, and -1 is counted anew
            return any(size not in (1, -1) for size in call.rest(1, "shape"))
        return call.name in ("unflatten", "squeeze")

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        if not isinstance(call.node.meta["dtype"], torch.dtype) or _changes_dtype(call):
            space.pin_all(axes(call.first), call.node, "is reinterpreted as another dtype")
            return (None,) * len(call.shape)
        return reshape_axes(axes(call.first), shape_of(call.first), call.shape, call, space)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None or _changes_dtype(call) or numel(call.shape) == 0:
            return None
        return reshape_compact(value, shape_of(call.first), call.shape)


def _changes_dtype(call: Call) -> bool:
    return call.name == "view" and call.node.meta["dtype"] != call.first.meta["dtype"]


@rule("permute", "transpose", "swapaxes", "swapdims", "t", "T", "mT", "H", "mH", "adjoint",
      "movedim", "moveaxis")  # fmt: skip
class Permute(Rule):
    """Another order of the axes."""

    moves = True

    def order(self, call: Call) -> tuple[int, ...]:
        """Which input axis each output axis is."""
        ndim = len(call.shape)
        if call.name == "permute":
            return tuple(normal_axis(d, ndim) for d in call.rest(1, "dims"))
        positions = torch.empty(tuple(range(2, 2 + ndim)), device="meta")
        if call.name in ("T", "mT", "H", "mH"):
            moved = getattr(positions, call.name)
        else:
            function = getattr(torch.Tensor, call.name)
            moved = function(positions, *call.node.args[1:], **_without_input(call))
        return tuple(size - 2 for size in moved.shape)

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given = axes(call.first)
        return tuple(given[i] for i in self.order(call))

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        return None if value is None else value.permute(self.order(call))


def _without_input(call: Call) -> dict[str, Any]:
    return {k: v for k, v in call.node.kwargs.items() if k not in ("input", "self")}


@rule("cat", "concat", "concatenate")
class Cat(Rule):
    """Tensors one after another along an axis."""

    moves = True

    def parts(self, call: Call) -> tuple[list[fx.Node], int]:
        tensors = [t for t in call.arg(0, "tensors") if shape_of(t) != (0,)]
        return tensors, normal_axis(call.arg(1, "dim", 0), len(call.shape))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        tensors, dim = self.parts(call)
        result: list[Axis] = list(axes(tensors[0]))
        for tensor in tensors[1:]:
            for i, axis in enumerate(axes(tensor)):
                if i != dim and call.shape[i] > 1:
                    result[i] = space.tie(result[i], axis, call.node, "is joined to a fixed size")
        pieces = [axes(t)[dim] for t in tensors]
        if any(p is not None for p in pieces):
            result[dim] = np.concatenate(
                [
                    np.zeros(shape_of(t)[dim], np.int64) if p is None else p
                    for t, p in zip(tensors, pieces, strict=True)
                ]
            )
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        tensors, dim = self.parts(call)
        values = [known.value(t) for t in tensors]
        if all(v is None for v in values):
            return None
        ndim = len(call.shape)
        filled = [torch.full((1,) * ndim, torch.nan) if v is None else v for v in values]
        sizes = [max(v.shape[i] for v in filled) for i in range(ndim)]
        return torch.cat(
            [
                v.expand([shape_of(t)[dim] if i == dim else s for i, s in enumerate(sizes)])
                for t, v in zip(tensors, filled, strict=True)
            ],
            dim,
        )


@rule("stack")
class Stack(Rule):
    """Tensors side by side along a new axis."""

    moves = True

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        tensors = call.arg(0, "tensors")
        dim = normal_axis(call.arg(1, "dim", 0), len(call.shape))
        result = list(axes(tensors[0]))
        for tensor in tensors[1:]:
            for i, axis in enumerate(axes(tensor)):
                result[i] = space.tie(result[i], axis, call.node, "is stacked on a fixed size")
        result.insert(dim, None)
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        dim = normal_axis(call.arg(1, "dim", 0), len(call.shape))
        ndim, values = len(call.shape) - 1, [known.value(t) for t in call.arg(0, "tensors")]
        if all(value is None for value in values):
            return None
        unknown = torch.full((1,) * ndim, torch.nan, dtype=torch.float64)
        filled = [unknown if value is None else value for value in values]
        size = [max(sizes) for sizes in zip(*(value.shape for value in filled), strict=True)]
        return torch.stack([value.expand(size) for value in filled], dim)


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
class Split(Rule):
    """Consecutive pieces along an axis. Equal pieces stay equal: the code may count them anew."""

    moves = True

    def sized(self, call: Call) -> bool:
        return True

    def dim(self, call: Call) -> int:
        return normal_axis(call.arg(2, "dim", 0), len(shape_of(call.first)))

    def part_sizes(self, call: Call, shapes: Any) -> list[int]:
        return [shape[self.dim(call)] for shape in shapes]

    def pieces(self, call: Call) -> tuple[int, list[int]]:
        return self.dim(call), self.part_sizes(call, call.shapes)

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> tuple[Axes, ...]:
        given, dim = axes(call.first), self.dim(call)
        axis = given[dim]
        if axis is None:
            return tuple(given for _ in call.shape)
        sizes = [s[dim] for s in call.shapes]
        pieces = np.split(axis, np.cumsum(sizes)[:-1])
        if len(set(sizes)) == 1 and len(sizes) > 1:
            space.equal_parts.append(EqualParts(np.stack(pieces), call.node))
        elif call.name == "chunk":
            space.pin(axis, call.node, "is cut into unequal chunks")
        return tuple((*given[:dim], piece, *given[dim + 1 :]) for piece in pieces)

    def value(self, call: Call, known: Knowledge) -> Any:
        value, dim = known.value(call.first), self.dim(call)
        if value is None or value.shape[dim] == 1:
            return tuple(value for _ in call.shape)
        sizes = [s[dim] for s in call.shapes]
        return torch.split(value, sizes, dim)


@rule("unbind")
class Unbind(Rule):
    """One tensor for each position of an axis; how many there are is the caller's code."""

    moves = True

    def sized(self, call: Call) -> bool:
        return True

    def dim(self, call: Call) -> int:
        return normal_axis(call.arg(1, "dim", 0), len(shape_of(call.first)))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> tuple[Axes, ...]:
        given, dim = axes(call.first), self.dim(call)
        space.pin(given[dim], call.node, "is taken apart by unbind")
        return tuple((*given[:dim], *given[dim + 1 :]) for _ in call.shape)

    def value(self, call: Call, known: Knowledge) -> Any:
        value, dim = known.value(call.first), self.dim(call)
        if value is None:
            return None
        if value.shape[dim] == 1:
            return tuple(value.squeeze(dim) for _ in call.shape)
        return value.unbind(dim)


@rule("expand", "expand_as", "broadcast_to")
class Expand(Rule):
    """Repeats axes of size 1; the others pass.

    What says where to look (indices, masks) is the same along a repeated axis: it may be repeated
    less often, with what it is said of.
    """

    moves = True

    def given_sizes(self, call: Call) -> dict[int, int]:
        sizes = () if call.name == "expand_as" else call.rest(1, "size")
        return {i: s for i, s in enumerate(sizes) if isinstance(s, int) and s != -1}

    def sized(self, call: Call) -> bool:
        return True

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        before: tuple[int | None, ...] = shape_of(call.first)
        new = len(call.shape) - len(before)
        given = [None] * new + list(axes(call.first))
        before = (None,) * new + before
        dtype: torch.dtype = call.node.meta["dtype"]
        says_where = not (dtype.is_floating_point or dtype.is_complex)
        for i, size in enumerate(call.shape):
            if size != before[i]:
                given[i] = space.created(size, call.node) if says_where and size > 1 else None
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None:
            return None
        return value.reshape([1] * (len(call.shape) - value.dim()) + list(value.shape))


@rule("flip", "roll", "fliplr", "flipud", "rot90", "tril", "triu")
class Reorder(Rule):
    """Another order along axes, or a part set to 0; a labelled axis may only be turned round."""

    moves = True

    def moved(self, call: Call) -> list[int]:
        """The axes that the function works along."""
        ndim, dims = len(call.shape), call.arg(2, "dims", ())
        if call.name in ("tril", "triu"):
            return [ndim - 2, ndim - 1]
        if call.name == "flip":
            dims = call.rest(1, "dims")
        elif call.name in ("fliplr", "flipud"):
            dims = int(call.name == "fliplr")
        elif call.name == "rot90":
            dims = dims or (0, 1)
        dims = (dims,) if isinstance(dims, int) else dims
        return [normal_axis(d, ndim) for d in dims] or list(range(ndim))

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given = list(axes(call.first))
        for dim in self.moved(call):
            axis = given[dim]
            if call.name.startswith("flip") and axis is not None:
                given[dim] = np.ascontiguousarray(axis[::-1])
            else:
                space.pin(axis, call.node, f"changes places in {call.name}")
                given[dim] = None
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, moved = known.value(call.first), self.moved(call)
        if value is None:
            return None
        if call.name.startswith("flip"):
            return value.flip(moved)
        if any(value.shape[dim] > 1 for dim in moved):
            return None
        return torch.where(value == 0, value, torch.nan) if call.name[:3] == "tri" else value


@rule("repeat", "tile", "repeat_interleave")
class Repeat(Rule):
    """Copies of an axis: of the whole one after another, or of each position."""

    moves = True

    def sized(self, call: Call) -> bool:
        return True

    def copies(self, call: Call) -> list[int]:
        """How many there are of each axis of the input."""
        before = shape_of(call.first)
        new = len(call.shape) - len(before)
        return [t // s if s else 1 for s, t in zip(before, call.shape[new:], strict=True)]

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        given, each = axes(call.first), call.name == "repeat_interleave"
        along = call.arg(2, "dim") is not None or len(given) == 1
        regular = isinstance(call.arg(1, "repeats"), int) and along
        if each and not regular:
            return OPAQUE.labels(call, axes, space)
        new: list[Axis] = [None] * (len(call.shape) - len(given))
        copy = np.repeat if each else np.tile
        pairs = zip(given, self.copies(call), strict=True)
        return (*new, *(None if axis is None else copy(axis, times) for axis, times in pairs))

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        if value is None:
            return None
        for axis, times in enumerate(self.copies(call)):
            if times > 1 and value.shape[axis] > 1:
                if call.name == "repeat_interleave":
                    value = value.repeat_interleave(times, axis)
                else:
                    value = torch.cat([value] * times, axis)
        return value.reshape([1] * (len(call.shape) - value.dim()) + list(value.shape))


@rule("pad")
class Pad(Rule):
    """Adds positions at the ends of axes: constants, or copies of what is there."""

    def widths(self, call: Call) -> dict[int, tuple[int, int]]:
        flat, ndim = call.arg(1, "pad"), len(call.shape)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {ndim - 1 - i: pair for i, pair in enumerate(pairs) if pair != (0, 0)}

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        result = list(axes(call.first))
        for dim, (low, high) in self.widths(call).items():
            axis = result[dim]
            if axis is None:
                continue
            if call.arg(2, "mode", "constant") == "constant" and min(low, high) >= 0:
                fill = [np.zeros(low, np.int64), axis, np.zeros(high, np.int64)]
                result[dim] = np.concatenate(fill)
            else:
                space.pin(axis, call.node, "is padded with its own ends")
                result[dim] = None
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, widths = known.value(call.first), self.widths(call)
        if value is None or not widths:
            return value
        constant, fill = call.arg(2, "mode", "constant") == "constant", call.arg(3, "value") or 0.0
        for dim, width in widths.items():
            if value.shape[dim] == 1 and call.shape[dim] > 1:
                value = torch.where(value == fill, value, torch.nan) if constant else value
            elif constant:
                flat = [0] * (2 * (value.dim() - 1 - dim)) + list(width)
                value = torch.nn.functional.pad(value, flat, value=fill)
            else:
                return None
        return value


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
class Shuffle(Rule):
    """A reshape, a transpose and a reshape.

    ``pixel_shuffle``: (…, C·r², H, W) to (…, C, H·r, W·r); ``pixel_unshuffle``: back;
    ``channel_shuffle``: (N, g·C, …) with the g groups interleaved.
    """

    def sized(self, call: Call) -> bool:
        return True

    def steps(self, call: Call) -> tuple[tuple[int, ...], list[int]]:
        """The shape in the middle, and the order in which its axes come out."""
        before, after = shape_of(call.first), call.shape
        if call.name == "channel_shuffle":
            groups = call.arg(1, "groups")
            middle = (before[0], groups, before[1] // groups, *before[2:])
            return middle, [0, 2, 1, *range(3, len(middle))]
        r: int = call.arg(1, "upscale_factor", call.node.kwargs.get("downscale_factor"))
        lead, n = before[:-3], len(before) - 3
        if call.name == "pixel_shuffle":
            middle = (*lead, after[-3], r, r, before[-2], before[-1])
            return middle, [*range(n), n, n + 3, n + 1, n + 4, n + 2]
        middle = (*lead, before[-3], after[-2], r, after[-1], r)
        return middle, [*range(n), n, n + 2, n + 4, n + 1, n + 3]

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        middle, order = self.steps(call)
        split = list(reshape_axes(axes(call.first), shape_of(call.first), middle, call, space))
        if call.name == "pixel_shuffle":
            for inside in (-4, -3):  # the r · r positions become places in the picture
                space.pin(split[inside], call.node, "is a place inside a pixel")
                split[inside] = None
        if call.name == "channel_shuffle":
            space.pin(split[1], call.node, "is one of a fixed number of groups")
        moved = tuple(split[i] for i in order)
        return reshape_axes(moved, [middle[i] for i in order], call.shape, call, space)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, (middle, order) = known.value(call.first), self.steps(call)
        if value is None:
            return None
        moved = reshape_compact(value, shape_of(call.first), middle).permute(order)
        return reshape_compact(moved, tuple(middle[i] for i in order), call.shape)


@rule("pack_padded_sequence", "pad_packed_sequence")
class Pack(Rule):
    """Sequences of several lengths, (steps, batch, …), as one list, (steps · batch, …), and back.

    Gives the lengths, too. The features pass; the steps and the batch stay.
    """

    def leading(self, call: Call) -> int:
        """How many leading axes of the input are steps and places in the batch."""
        return 2 if call.name == "pack_padded_sequence" else 1

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> tuple[Axes, ...]:
        given, leading = axes(call.first), self.leading(call)
        for axis in given[:leading]:
            space.pin(axis, call.node, f"is a step, or a place in the batch, of {call.name}")
        return (*[None] * (3 - leading), *given[leading:]), (None,)

    def value(self, call: Call, known: Knowledge) -> Any:
        value, leading = known.value(call.first), self.leading(call)
        if value is None or any(s > 1 for s in value.shape[:leading]):
            return None
        value = value.reshape([1] * (3 - leading) + list(value.shape[leading:]))
        if leading == 1:  # what pads is another constant
            value = torch.where(value == call.arg(3, "padding_value"), value, torch.nan)
        return value, None
