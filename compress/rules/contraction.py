"""Functions that sum over an axis of their input with weights: convolutions and linear layers.

The input's channels end here: each is read where some weight that matters is not zero. The output's
channels begin here, with the labels of the weight's output axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, EqualParts, Field, LabelSpace
from compress.graph.shapes import along, per_position
from compress.rules.elementwise import LARGEST_VALUE
from compress.rules.registry import Call, Read, Rule, Units, Value, each_axis, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.decide import Decision
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

AxesOf = Callable[[Any], Axes]


class Geometry(NamedTuple):
    """Where a contraction's channels lie.

    ``channel`` is the input's and the output's channel axis (negative); ``weight_in`` and
    ``weight_out`` are the axes of the weight; ``at_border`` is true where a constant channel gives
    another sum at the border than inside (zero padding). ``slid`` are the input's axes (negative)
    along which an output position sees other input positions than its own.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    groups: int
    channel: int
    weight_in: int
    weight_out: int
    at_border: bool
    slid: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        return shape_of(self.x)[self.channel]


class Contraction(Rule):
    """What all of them share; a subclass reads the geometry off the call."""

    def geometry(self, call: Call) -> Geometry:
        raise NotImplementedError

    def makes(self, call: Call) -> list[Units]:
        g = self.geometry(call)
        return [Units(g.weight, g.weight_out, g.channel, g.x)]

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        g = self.geometry(call)
        if g.weight_in == 0:  # each input position is multiplied with all of the weight's row
            return [[*each_axis(g.x), (g.weight, g.weight_out)]]
        return [[*each_axis(call.node), (g.weight, g.weight_in)]]

    # -- labels ----------------------------------------------------------------------------

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        g, node = self.geometry(call), call.node
        x, weight = list(axes(g.x)), list(axes(g.weight))
        for i, axis in enumerate(weight):
            if i not in (g.weight_in, g.weight_out):
                space.pin(axis, node, "is the extent of a kernel")
        for i, axis in enumerate(x):
            if i - len(x) in g.slid:
                space.pin(axis, node, f"is a place that {call.name} slides over")
                x[i] = None
        if g.groups == 1:
            space.tie(x[g.channel], weight[g.weight_in], node, f"feeds {call.name} as a fixed size")
            out = weight[g.weight_out]
        else:
            out = self._grouped(g, x[g.channel], weight, node, space)
        if g.bias is not None:
            out = space.tie(out, axes(g.bias)[-1], node, "has a fixed bias")
        x[g.channel] = out
        return tuple(x)

    def _grouped(
        self, g: Geometry, inputs: Any, weight: list[Any], node: fx.Node, space: LabelSpace
    ) -> Any:
        """Each group has inputs and outputs of its own; only their counts must agree."""
        whole, part = 0, 1  # (out, in / groups, …); transposed: (in, out / groups, …)
        shape = shape_of(g.weight)
        depthwise = shape[:2] == (g.groups, 1) and shape_of(g.x)[g.channel] == g.groups
        free = inputs is not None and weight[whole] is not None
        if not free or (g.weight.op != "get_attr" and not depthwise):
            for axis in (inputs, weight[whole], weight[part]):
                reason = "goes with a fixed size into a grouped convolution"
                space.pin(axis, node, reason, meets=inputs is None)
            return None
        space.pin(weight[part], node, "is an axis inside the groups")
        if g.weight_in == whole:
            space.tie(inputs, weight[whole], node, node.meta["name"])
            near, far = inputs, space.fresh(g.groups * shape[part])
        else:
            near, far = weight[whole], inputs
        if depthwise:
            space.tie(near, far, node, node.meta["name"])
            return near if g.weight_in else far
        parts_near, parts_far = near.reshape(g.groups, -1), far.reshape(g.groups, -1)
        cross = np.repeat(parts_far, parts_near.shape[1], 0)
        cross = cross.reshape(*cross.shape, *[1] * (len(shape) - 2))
        path = str(g.weight.target)
        first = space.fields.setdefault(path, Field(cross, part))
        space.field_uses[path] = space.field_uses.get(path, 0) + 1
        space.tie(first.labels.reshape(-1), cross.reshape(-1), node, node.meta["name"])
        space.equal_parts.append(EqualParts(parts_near, node, partners=parts_far))
        space.equal_parts.append(EqualParts(parts_far, node, partners=parts_near))
        return near if g.weight_in else far

    # -- values ----------------------------------------------------------------------------

    def matrix(self, g: Geometry, known: Knowledge) -> np.ndarray:
        """Bool (out, in / groups): whether any weight there is not zero."""
        return _oriented(known.pattern(g.weight), g)

    def sums(self, g: Geometry, known: Knowledge, inputs: np.ndarray | None = None) -> np.ndarray:
        """Float64 (out, in / groups), or some inputs' columns: weights summed over the kernel."""
        positions = None if inputs is None else np.flatnonzero(inputs)
        total = known.leaf(g.weight, g.weight_in, positions)
        if total.dim() > 2:
            total = total.flatten(2).sum(2, dtype=torch.float64)
        return _oriented(total.double().cpu().numpy(), g)

    def constants(self, g: Geometry, known: Knowledge) -> np.ndarray | None:
        """Float64 (in,): the constant that each input channel is; NaN where it is none."""
        value = known.value(g.x)
        if value is None:
            return None
        vector = per_position(value, g.channel, g.channels).numpy()
        return None if np.isnan(vector).all() else vector

    def value(self, call: Call, known: Knowledge) -> Value:
        g = self.geometry(call)
        if g.groups == 1 and not g.slid and _varies_by_place(g, known):
            return self._value_by_place(g, known)
        matrix, constants = self.matrix(g, known), self.constants(g, known)
        rows = busy = matrix.any(1)  # rows with any weight: the others give their bias
        if constants is not None:
            unknown = np.isnan(constants) | (g.at_border & (constants != 0))
            rows = _by_group(matrix, unknown, g.groups).any(1)
        if rows.all():
            return None
        result = np.where(rows, np.nan, 0.0)
        if constants is not None and not g.at_border and (busy & ~rows).any():
            filled = np.where(np.isnan(constants), 0.0, constants)
            result += _by_group(self.sums(g, known), filled, g.groups).sum(1)
        if g.bias is not None:
            bias = known.value(g.bias)
            if bias is None:
                return None
            result += bias.numpy()
        return along(torch.from_numpy(result), g.channel, len(call.shape))

    def _value_by_place(self, g: Geometry, known: Knowledge) -> Value:
        """The same at each place, where the channels go through the weights place by place."""
        value, bias = known.value(g.x), None if g.bias is None else known.value(g.bias)
        if value is None or (g.bias is not None and bias is None):
            return None
        inputs = value.movedim(g.channel, -1)
        inputs = inputs.expand(*inputs.shape[:-1], g.channels)
        matrix = torch.from_numpy(self.matrix(g, known)).double()
        unknown = (inputs.isnan().double() @ matrix.T) > 0
        if bool(unknown.all()):
            return None
        result = inputs.nan_to_num(0.0) @ torch.from_numpy(self.sums(g, known)).T
        result = result if bias is None else result + bias
        return torch.where(unknown, torch.nan, result).movedim(-1, g.channel)

    # -- reading ---------------------------------------------------------------------------

    def live(self, call: Call, decision: Decision) -> np.ndarray | None:
        return decision.live(call.node, self.geometry(call).channel)

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        g = self.geometry(call)
        labels = known.axis(g.x, g.channel)
        if labels is None:
            return
        assert live is not None
        read = _columns_read(self.matrix(g, known), live, g.groups)
        constants = self.constants(g, known)
        if constants is None:
            yield Read(labels, read)
            return
        nonzero = ~np.isnan(constants) & (constants != 0)
        unmoved = nonzero & read & (not self.folds(call, g, known))
        stays = np.isnan(constants) | (unmoved & (not self.carries(g, known)))
        yield Read(labels, read & stays, constants, unmoved & ~stays)

    def folds(self, call: Call, g: Geometry, known: Knowledge) -> bool:
        """Whether a constant may go into the bias (or, with "drop", nowhere)."""
        if known.constants == "drop":
            return True
        if g.at_border and known.constants == "exact":
            return False
        return known.takes_bias(g.weight, g.bias, call.module)

    def carries(self, g: Geometry, known: Knowledge) -> bool:
        """Whether one channel may carry the constants of others: the weight is used only here."""
        return (
            g.groups == 1
            and known.constants == "exact"
            and g.weight.op == "get_attr"
            and known.uses(g.weight) == 1
        )

    # -- rewriting -------------------------------------------------------------------------

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        g, known = self.geometry(call), plan.knowledge
        if g.groups > 1:
            self._set_groups(call, g, plan)
        labels, constants = known.axis(g.x, g.channel), self.constants(g, known)
        if labels is None or constants is None or known.constants == "drop":
            return
        gone = ~plan.kept(labels) & ~np.isnan(constants) & (constants != 0)
        if not self.folds(call, g, known):
            # Rows that came back later compute something that nobody reads.
            wanted = [read.carried for read in plan.decision.reads[call.node]]
            gone &= wanted[0] if wanted and wanted[0] is not None else False
        if not gone.any():
            return
        if self.folds(call, g, known):
            shift = self._shift(g, known, constants, gone)
            plan.add_to_bias(call, g.weight, g.bias, g.weight_out, shift)
        else:
            plan.carry(call, g.weight, g.weight_in, labels, constants, gone)

    def _shift(
        self, g: Geometry, known: Knowledge, constants: np.ndarray, gone: np.ndarray
    ) -> np.ndarray:
        """What the removed constants add to each output: float64 (out,)."""
        if g.groups == 1:
            return np.asarray(self.sums(g, known, gone) @ constants[gone])
        filled = np.where(gone, constants, 0.0)
        return np.asarray(_by_group(self.sums(g, known), filled, g.groups).sum(1))

    def _set_groups(self, call: Call, g: Geometry, plan: PlanBuilder) -> None:
        """A group is left when any of its inputs or outputs is."""
        alive = np.zeros(g.groups, bool)
        for node, axis in ((g.x, g.channel), (call.node, g.channel)):
            labels = plan.knowledge.axis(node, axis)
            if labels is None:
                return
            alive |= plan.kept(labels).reshape(g.groups, -1).any(1)
        plan.set_number(call, "groups", g.groups, int(alive.sum()), counted=True)


def _varies_by_place(g: Geometry, known: Knowledge) -> bool:
    """Whether what is known of the input is not the same along another axis that has labels."""
    value = known.value(g.x)
    if value is None or value.numel() == value.shape[g.channel] or value.numel() > LARGEST_VALUE:
        return False
    places = (i for i in range(value.dim()) if i - value.dim() != g.channel)
    return any(value.shape[i] > 1 and known.axis(g.x, i) is not None for i in places)


def _oriented(stored: np.ndarray, g: Geometry) -> np.ndarray:
    """A weight's first two axes as (out, in / groups)."""
    if g.weight_in != 0:
        return stored
    inputs, out = stored.shape
    parts: np.ndarray = stored.reshape(g.groups, inputs // g.groups, out)
    return np.reshape(parts.transpose(0, 2, 1), (g.groups * out, -1))


def _by_group(matrix: np.ndarray, inputs: np.ndarray, groups: int) -> np.ndarray:
    """``matrix`` (out, in / groups) times, position by position, the inputs (in,) of its group."""
    parts: np.ndarray = matrix.reshape(groups, -1, matrix.shape[1]) * inputs.reshape(groups, 1, -1)
    return parts.reshape(matrix.shape)


def _columns_read(matrix: np.ndarray, live: np.ndarray, groups: int) -> np.ndarray:
    """Bool (in,): the inputs that some live row reads."""
    if groups == 1:
        return np.asarray(np.any(matrix if live.all() else matrix[live], axis=0))
    parts: np.ndarray = matrix.reshape(groups, -1, matrix.shape[1]) & live.reshape(groups, -1, 1)
    return parts.any(1).reshape(-1)


def _each(number: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """An option of a convolution for each axis of its kernel."""
    given = (number,) if isinstance(number, int) else tuple(number)
    return given if len(given) == len(kernel) else given * len(kernel)


def _slid(
    kernel: Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> tuple[int, ...]:
    """The axes of places (negative) but those that an extent, a step of 1 leaves as they are."""
    each = zip(kernel, _each(stride, kernel), _each(padding, kernel), strict=True)
    return tuple(i - len(kernel) for i, option in enumerate(each) if option != (1, 1, 0))


@rule("conv1d", "conv2d", "conv3d")
class Convolution(Contraction):
    """weight: (out, in / groups, k…)."""

    slides = True

    def geometry(self, call: Call) -> Geometry:
        x, weight, padding = call.arg(0, "input"), call.arg(1, "weight"), call.arg(4, "padding", 0)
        kernel = shape_of(weight)[2:]
        if isinstance(padding, str):
            padding = tuple(int(padding == "same" and k > 1) for k in kernel)
        return Geometry(
            x, weight, call.arg(2, "bias"), call.arg(6, "groups", 1), channel=-len(kernel) - 1,
            weight_in=1, weight_out=0, at_border=any(_each(padding, kernel)),
            slid=_slid(kernel, call.arg(3, "stride", 1), padding),
        )  # fmt: skip


_ADDED = ((4, "padding"), (5, "output_padding"))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
class TransposedConvolution(Contraction):
    """weight: (in, out / groups, k…). Its taps overlap unevenly: every place is a border."""

    slides = True

    def geometry(self, call: Call) -> Geometry:
        x, weight = call.arg(0, "input"), call.arg(1, "weight")
        kernel = shape_of(weight)[2:]
        added = zip(*(_each(call.arg(*arg, 0), kernel) for arg in _ADDED), strict=True)
        return Geometry(
            x, weight, call.arg(2, "bias"), call.arg(6, "groups", 1), channel=-len(kernel) - 1,
            weight_in=0, weight_out=1, at_border=True,
            slid=_slid(kernel, call.arg(3, "stride", 1), tuple(map(any, added))),
        )  # fmt: skip


@rule("linear")
class Linear(Contraction):
    """weight: (out, in)."""

    def geometry(self, call: Call) -> Geometry:
        return Geometry(
            call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias"), 1,
            channel=-1, weight_in=1, weight_out=0, at_border=False,
        )  # fmt: skip


@rule("bilinear")
class Bilinear(Rule):
    """x1 · weight · x2 + bias; weight: (out, in1, in2)."""

    def sides(self, call: Call) -> list[tuple[fx.Node, int]]:
        """Each input with its axis of the weight."""
        return [(call.arg(0, "input1"), 1), (call.arg(1, "input2"), 2)]

    def makes(self, call: Call) -> list[Units]:
        return [Units(call.arg(2, "weight"), 0, -1, call.arg(0, "input1"))]

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        inputs = [(call.arg(2, "weight"), axis) for _, axis in self.sides(call)]
        return [[*each_axis(call.node), *inputs]]

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        weight, bias, lead = axes(call.arg(2, "weight")), call.arg(3, "bias"), []
        for node, axis in self.sides(call):
            space.tie(axes(node)[-1], weight[axis], call.node, "feeds bilinear as a fixed size")
            lead.append(axes(node)[:-1])
        out = weight[0]
        if bias is not None:
            out = space.tie(out, axes(bias)[0], call.node, "has a fixed bias")
        reason = "meets a fixed size in bilinear"
        return (*(space.tie(a, b, call.node, reason) for a, b in zip(*lead, strict=True)), out)

    def busy(self, call: Call, known: Knowledge) -> np.ndarray:
        """Bool (out, in1, in2): whether a product counts; an input that is 0 adds nothing."""
        found: np.ndarray = (known.leaf(call.arg(2, "weight")) != 0).cpu().numpy()
        for node, axis in self.sides(call):
            value = known.value(node)
            if value is not None:
                zero = per_position(value, -1, shape_of(node)[-1]).numpy() == 0
                found = found & ~(zero[None, :, None] if axis == 1 else zero[None, None, :])
        return found

    def value(self, call: Call, known: Knowledge) -> Value:
        rows: np.ndarray = np.any(self.busy(call, known), axis=(1, 2))
        bias = call.arg(3, "bias")
        known_bias = torch.zeros(len(rows)) if bias is None else known.value(bias)
        if rows.all() or known_bias is None:
            return None
        result = torch.where(torch.from_numpy(rows), torch.nan, known_bias.double())
        return along(result, -1, len(call.shape))

    def live(self, call: Call, decision: Decision) -> np.ndarray:
        return decision.live(call.node, -1)

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        assert live is not None
        busy = self.busy(call, known)[live].any(0)
        for node, axis in self.sides(call):
            labels = known.axis(node, -1)
            if labels is not None:
                yield Read(labels, busy.any(2 - axis))
