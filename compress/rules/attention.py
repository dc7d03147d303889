"""Products of activations: matmul, einsum, scaled dot-product attention; and embeddings.

Axes that pass are tied (the heads of q, k, v), an axis that is summed over is read by both sides:
a position may go where either side is known to be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import per_position
from compress.rules.contraction import Contraction, Geometry
from compress.rules.elementwise import is_held
from compress.rules.movement import Permute
from compress.rules.registry import (
    OPAQUE,
    Call,
    Read,
    Rule,
    Units,
    Value,
    each_axis,
    rule,
    rule_for,
    shape_of,
)

if TYPE_CHECKING:
    from compress.speedup.decide import Decision
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

AxesOf = Callable[[Any], Axes]


def tie_broadcast(nodes: list[tuple[fx.Node, Axes]], call: Call, space: LabelSpace) -> Axes:
    """Tie the leading axes of several tensors, aligned from the right; size 1 repeats.

    Each item holds a node and the axes of it that lead (all but the last two).
    """
    rank = max(len(axes) for _, axes in nodes)
    result: list[Axis] = [None] * rank
    for offset in range(1, rank + 1):
        present = [
            axes[-offset]
            for node, axes in nodes
            if offset <= len(axes) and shape_of(node)[len(axes) - offset] > 1
        ]
        joined = present[0] if present else None
        for axis in present[1:]:
            joined = space.tie(joined, axis, call.node, f"meets a fixed size in {call.name}")
        result[-offset] = joined
    return tuple(result)


def zero_positions(known: Knowledge, node: fx.Node, axis: int) -> np.ndarray:
    """Bool, one per position of an axis: whether the tensor is known to be 0 there."""
    value = known.value(node)
    size = shape_of(node)[axis]
    if value is None or not value.is_floating_point():
        return np.zeros(size, bool)
    return np.asarray((per_position(value, axis, size) == 0).numpy())


def turned_back(node: fx.Node) -> tuple[fx.Node, bool]:
    """The matrix that a node is the transpose of, for one reader, and true; else itself."""
    if node.op == "call_function" and len(shape_of(node)) == 2 and len(node.users) == 1:
        call = Call(node)
        if isinstance(rule_for(call.name), Permute) and Permute().order(call) == (1, 0):
            return call.first, True
    return node, False


@rule("matmul", "bmm", "mm", "addmm", "baddbmm")
class MatMul(Contraction):
    """A product with a parameter, or of two activations.

    The parameter may be (in, out), or ``x @ weight.T`` with one of (out, in).
    """

    def operands(self, call: Call) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        if call.name in ("addmm", "baddbmm"):
            names = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
            return call.arg(1, names[0]), call.arg(2, names[1]), call.arg(0, "input")
        second = call.arg(1, "other", call.node.kwargs.get("mat2"))
        return call.first, second, None

    def has_weight(self, call: Call) -> bool:
        x, other, bias = self.operands(call)
        simple = call.name in ("matmul", "bmm", "mm") or (
            len(call.node.args) + len(call.node.kwargs) == 3
        )
        plain_bias = bias is None or len(shape_of(bias)) == 1
        weight, _ = turned_back(other)
        matrix = weight.op == "get_attr" and len(shape_of(other)) == 2
        return matrix and len(shape_of(x)) > 1 and simple and plain_bias

    def geometry(self, call: Call) -> Geometry:
        x, other, bias = self.operands(call)
        weight, turned = turned_back(other)
        inputs, out = (1, 0) if turned else (0, 1)
        return Geometry(
            x, weight, bias, 1,
            channel=-1, weight_in=inputs, weight_out=out, at_border=False,
        )  # fmt: skip

    def makes(self, call: Call) -> list[Units]:
        return super().makes(call) if self.has_weight(call) else []

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        if self.has_weight(call):
            return super().labels(call, axes, space)
        a, b, bias = self.operands(call)
        if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
            return OPAQUE.labels(call, axes, space)
        space.tie(axes(a)[-1], axes(b)[-2], call.node, f"is summed over in {call.name}")
        lead: Axes = ()
        if len(call.shape) > 2:
            lead = tie_broadcast([(a, axes(a)[:-2]), (b, axes(b)[:-2])], call, space)
        product = [*lead, axes(a)[-2], axes(b)[-1]]
        if bias is None:
            return tuple(product)
        for i in range(-len(shape_of(bias)), 0):
            if shape_of(bias)[i] > 1:
                reason = f"is added in {call.name}"
                product[i] = space.tie(product[i], axes(bias)[i], call.node, reason)
        return tuple(product)

    def value(self, call: Call, known: Knowledge) -> Value:
        if self.has_weight(call):
            return super().value(call, known)
        a, b, bias = self.operands(call)
        if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
            return None
        zero = torch.zeros((), dtype=torch.bool)
        for node, summed in ((a, -1), (b, -2)):
            value = known.value(node)
            if value is not None and value.is_floating_point():
                zero = zero | (value == 0).all(summed, keepdim=True)
        if bias is not None:
            added = known.value(bias)
            zero = zero & (torch.tensor(False) if added is None else added == 0)
        if not bool(zero.any()):
            return None
        return torch.where(zero, 0.0, torch.nan).double()

    def live(self, call: Call, decision: Decision) -> np.ndarray | None:
        return super().live(call, decision) if self.has_weight(call) else None

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if self.has_weight(call):
            yield from super().reads(call, known, live)
        for sides in self.summed(call):
            yield from summed_reads(known, sides)

    def summed(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        a, b, _ = self.operands(call)
        odd = len(shape_of(a)) < 2 or len(shape_of(b)) < 2
        return [] if odd or self.has_weight(call) else [[(a, -1), (b, -2)]]

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        return super().products(call) if self.has_weight(call) else Rule.products(self, call)

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        if self.has_weight(call):
            super().rewrite(call, plan)


@rule("grouped_mm", "grouped_mm_fallback")
class GroupedMatMul(Contraction):
    """(rows, in) by (groups, in, out): each row by the matrix of its group (mixtures of experts).

    The groups' rows end at ``offs``. A unit is the same position of all groups.
    """

    def geometry(self, call: Call) -> Geometry:
        weight = call.arg(1, "mat2", call.node.kwargs.get("weight"))
        return Geometry(
            call.first, weight, None, 1, channel=-1, weight_in=1, weight_out=2, at_border=False
        )

    def in_groups(self, call: Call) -> bool:
        """Whether it is of these shapes, and adds nothing."""
        ranks = [len(shape_of(node)) for node in (call.first, self.geometry(call).weight)]
        return ranks == [2, 3] and len(call.inputs) == 3

    def makes(self, call: Call) -> list[Units]:
        """None that a config_list could select: a parameter of its own module, not of a layer's."""
        return []

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        if not self.in_groups(call):
            return OPAQUE.labels(call, axes, space)
        g = self.geometry(call)
        space.pin(axes(g.weight)[0], call.node, "is a group with rows of its own")
        for node in set(call.inputs) - {g.weight}:
            space.pin(axes(node)[0], call.node, "says which rows are a group's")
        return None, super().labels(call, axes, space)[-1]

    def matrix(self, g: Geometry, known: Knowledge) -> np.ndarray:
        """Bool (out, in): whether the weight of any group is not zero there."""
        leaf, order = behind_views(g.weight)
        return known.used(leaf, (order[g.weight_out], order[g.weight_in]))

    def value(self, call: Call, known: Knowledge) -> Value:
        """Constants go into other sums in each group, so that only zeros are known."""
        if not self.in_groups(call):
            return None
        g = self.geometry(call)
        fed = ~zero_positions(known, g.x, g.channel)
        busy = (self.matrix(g, known) & fed).any(1)
        if busy.all():
            return None
        return torch.from_numpy(np.where(busy, np.nan, 0.0))[None]

    def constants(self, g: Geometry, known: Knowledge) -> np.ndarray | None:
        zero = zero_positions(known, g.x, g.channel)
        return np.where(zero, 0.0, np.nan) if zero.any() else None

    def live(self, call: Call, decision: Decision) -> np.ndarray | None:
        return super().live(call, decision) if self.in_groups(call) else None

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if self.in_groups(call):
            yield from super().reads(call, known, live)

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        return super().products(call) if self.in_groups(call) else Rule.products(self, call)

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        """There are no constants to move."""


def behind_views(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """What a node is with other axes first, and which of its axes each axis of the node is."""
    order = tuple(range(len(shape_of(node))))
    while node.op == "call_function" and isinstance(found := rule_for(node.meta["name"]), Permute):
        inner = found.order(Call(node))
        order = tuple(inner[axis] for axis in order)
        node = Call(node).first
    return node, order


def summed_reads(known: Knowledge, sides: list[tuple[fx.Node, int]]) -> Iterator[Read]:
    """The reads of an axis that a product of several tensors sums over."""
    needed = np.logical_and.reduce([~zero_positions(known, node, axis) for node, axis in sides])
    for node, axis in sides:
        labels = known.axis(node, axis)
        if labels is not None:
            yield Read(labels, needed)


@rule("scaled_dot_product_attention")
class Attention(Rule):
    """softmax(q kᵀ · scale + mask) v: (…, heads, n, d), (…, heads, m, d), (…, heads, m, d_v)."""

    def operands(self, call: Call) -> list[fx.Node]:
        return [call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")]

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        q, k, v = self.operands(call)
        dims = space.tie(axes(q)[-1], axes(k)[-1], call.node, "is summed over in attention")
        if self.counts_dims(call):
            space.pin(dims, call.node, "sets the scale of attention by its number")
        for node in (k, v):
            space.pin(axes(node)[-2], call.node, "is a place that attention looks at")
        mask = call.arg(3, "attn_mask")
        lead = [(node, axes(node)[:-2]) for node in (q, k, v)]
        if call.node.kwargs.get("enable_gqa"):
            lead = [lead[0], *(self._repeated(each, lead[0], space, call) for each in lead[1:])]
        if mask is not None:
            space.pin_all(axes(mask)[-2:], call.node, "is a place that attention looks at")
            lead.append((mask, axes(mask)[:-2]))
        return (*tie_broadcast(lead, call, space), axes(q)[-2], axes(v)[-1])

    def counts_dims(self, call: Call) -> bool:
        """Whether the scale is that of so many dims: by default, or as the code computes it."""
        scale = call.arg(6, "scale")
        if scale is None:
            return True
        usual = isinstance(scale, float) and math.isclose(scale, shape_of(call.first)[-1] ** -0.5)
        return usual and call.modules is not None and not is_held(call.owner, scale)

    def _repeated(
        self, each: tuple[fx.Node, Axes], query: tuple[fx.Node, Axes], space: LabelSpace, call: Call
    ) -> tuple[fx.Node, Axes]:
        """Heads of k and v, each as often as query heads share it."""
        node, axes = each
        times = shape_of(query[0])[-3] // shape_of(node)[-3]
        heads = axes[-1]
        if heads is None and times > 1 and query[1][-1] is not None:
            space.pin(query[1][-1], call.node, "shares fixed key heads")
        return node, (*axes[:-1], None if heads is None else np.repeat(heads, times))

    def value(self, call: Call, known: Knowledge) -> Value:
        # The weights of each row sum up to 1: what is the same at all places comes out as it is.
        q, _, v = self.operands(call)
        value = known.value(v)
        if value is None:
            return None
        first = value[..., :1, :]
        value = torch.where((value == first).all(-2, keepdim=True), first, torch.nan)
        if call.node.kwargs.get("enable_gqa") and value.shape[-3] > 1:
            value = value.repeat_interleave(shape_of(q)[-3] // shape_of(v)[-3], -3)
        masked = call.arg(3, "attn_mask") is not None  # a row that is all masked gives 0, or NaN
        return torch.where(value == 0, value, torch.nan) if masked else value

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        for sides in self.summed(call):
            yield from summed_reads(known, sides)

    def summed(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        q, k, _ = self.operands(call)
        return [[(q, -1), (k, -1)]]

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        q, k, _ = self.operands(call)  # q kᵀ, and its product with v
        return [[*each_axis(node), (k, -2)] for node in (q, call.node)]


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of each operand and of the output, with letters for ``...`` and what is implied."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if not arrow:  # the letters that are there once, in order
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(once)
    free = "".join(c for c in ascii_letters if c not in left)
    hidden = [rank - len(x) + 3 for x, rank in zip(letters, ranks, strict=False) if "..." in x]
    width = max(hidden, default=0)
    for i, names in enumerate(letters):
        if "..." in names:
            own = ranks[i] - len(names) + 3
            letters[i] = names.replace("...", free[width - own : width])
    return letters, out.replace("...", free[:width])


@rule("einsum")
class Einsum(Rule):
    """Letters that come out pass, the others are summed over."""

    def parts(self, call: Call) -> tuple[list[str], str, list[fx.Node]] | None:
        """Letters of each operand, of the output, and the operands; None: too unusual."""
        equation = call.arg(0, "equation")
        given = call.node.args[1:]
        operands = (
            list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        )
        if not isinstance(equation, str):
            return None
        ranks = [len(shape_of(node)) for node in operands if isinstance(node, fx.Node)]
        letters, out = spelled_out(equation, ranks)
        if len(letters) != len(operands) or any(len(set(x)) != len(x) for x in (*letters, out)):
            return None
        return letters, out, list(operands)

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        parts = self.parts(call)
        if parts is None:
            return OPAQUE.labels(call, axes, space)
        letters, out, operands = parts
        found: dict[str, Axis] = {}
        for names, node in zip(letters, operands, strict=True):
            for name, axis, size in zip(names, axes(node), shape_of(node), strict=True):
                if size == 1:
                    continue
                reason = f"is axis {name} of an einsum with a fixed size"
                found[name] = (
                    space.tie(found[name], axis, call.node, reason) if name in found else axis
                )
        return tuple(found.get(name) for name in out)

    def value(self, call: Call, known: Knowledge) -> Value:
        parts = self.parts(call)
        if parts is None:
            return None
        letters, out, operands = parts
        zero = torch.zeros((), dtype=torch.bool)
        for names, node in zip(letters, operands, strict=True):
            value = known.value(node)
            if value is None or not value.is_floating_point():
                continue
            passing = [names.index(name) for name in out if name in names]
            summed = [i for i in range(len(names)) if i not in passing]
            moved = (value == 0).permute([*passing, *summed])
            shape = [value.shape[names.index(name)] if name in names else 1 for name in out]
            zero = zero | (moved.flatten(len(passing)).all(-1) if summed else moved).reshape(shape)
        return torch.where(zero, 0.0, torch.nan).double() if bool(zero.any()) else None

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        for sides in self.summed(call):
            yield from summed_reads(known, sides)

    def summed(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        parts = self.parts(call)
        if parts is None:
            return []
        letters, out, operands = parts
        return [
            [
                (node, names.index(name) - len(names))
                for names, node in zip(letters, operands, strict=True)
                if name in names
            ]
            for name in sorted({n for names in letters for n in names} - set(out))
        ]


@rule("embedding", "embedding_bag")
class Embedding(Rule):
    """Rows of a table (entries, features) by number: the features pass, the entries stay.

    A bag is the sum, mean or maximum of several rows.
    """

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        table = call.arg(1, "weight")
        for node in call.inputs:
            if node is not table:
                space.pin_all(axes(node), call.node, "looks up an embedding")
        space.pin(axes(table)[0], call.node, "is an entry of an embedding")
        if call.arg(3, "max_norm") is not None:
            space.pin(axes(table)[1], call.node, "is renormalised by an embedding")
            return (None,) * len(call.shape)
        return (*[None] * (len(call.shape) - 1), axes(table)[1])

    def value(self, call: Call, known: Knowledge) -> Value:
        table = call.arg(1, "weight")
        if table.op != "get_attr":
            return None
        used = torch.from_numpy(known.pattern(table).any(0))
        shape = [1] * (len(call.shape) - 1) + [-1]
        return (
            None if bool(used.all()) else torch.where(used, torch.nan, 0.0).double().reshape(shape)
        )

    def makes(self, call: Call) -> list[Units]:
        return [Units(call.arg(1, "weight"), 1, -1, call.arg(0, "input"))]
