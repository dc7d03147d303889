"""Statistics over a labelled axis: sums and norms of it, means, LayerNorm, RMSNorm.

A position that is known to be 0 adds nothing to a sum, so it may go. Where the sum is divided by
the number of positions, the small model would divide by another one: LayerNorm becomes a
`CountedLayerNorm`; a mean of squares (RMSNorm) is off by the factor N / n, which the epsilon and
the weight that follow take up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from compress.graph.labels import Axes, LabelSpace
from compress.graph.trace import is_output
from compress.modules import CountedLayerNorm
from compress.rules.attention import zero_positions
from compress.rules.elementwise import IDENTITY, PRODUCTS, QUOTIENTS
from compress.rules.reduction import Reduction
from compress.rules.registry import Call, Read, Rule, Value, rule

if TYPE_CHECKING:
    from compress.speedup.decide import Decision
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

AxesOf = Callable[[Any], Axes]


def _nonzero_reads(node: fx.Node, axis: int, known: Knowledge) -> Iterator[Read]:
    labels = known.axis(node, axis)
    if labels is not None:
        yield Read(labels, ~zero_positions(known, node, axis))


# -- means ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rescaling:
    """What takes up a factor f on a mean: numbers added to it on the way, and at last a weight.

    ``added``: (the module's attribute, its call, its value, the power of f that it takes). The
    weight w enters as w + ``shift`` and must be multiplied by f to the ``power``.
    """

    added: tuple[tuple[str, Call, float, float], ...]
    weight: fx.Node
    shift: float
    power: float


_MOVED = frozenset("view reshape unsqueeze squeeze expand getitem permute transpose".split())
_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "square": 2.0, "reciprocal": -1.0}


def find_rescaling(call: Call) -> Rescaling | None:
    """Follow a mean to the weight that can take up a factor on it; None where there is none.

    Nothing on the way is an output of the model. Each step is the only reader of the one before,
    and a power, a product with something that does not depend on the mean, or a sum with a number
    that is an attribute of its module.
    """
    node, power = call.node, 1.0
    added: list[tuple[str, Call, float, float]] = []
    while len(node.users) == 1 and not is_output(node):
        (user,) = node.users
        step = Call(user, call.modules)
        weight = _weight_beside(step, node) if step.name in PRODUCTS else None
        if weight is not None:
            return Rescaling(tuple(added), *weight, -power)
        if step.name == "add":
            number = _number_beside(step, node)
            name = None if number is None else _attribute_with(step, number)
            if number is None or name is None:
                return None
            added.append((name, step, number, power))
        else:
            after = _power_after(step, node, power)
            if after is None:
                return None
            power = after
        node = user
    return None


def _power_after(step: Call, node: fx.Node, power: float) -> float | None:
    """The power of the factor that a step's result is off by; None: it is off in another way.

    In a product or quotient the node is there once, and the other operand was not made from it:
    every step so far has one reader.
    """
    if step.name in _POWERS:
        return power * _POWERS[step.name]
    if step.name == "pow":
        exponent = step.arg(1, "exponent")
        return power * exponent if isinstance(exponent, (int, float)) else None
    if step.name in PRODUCTS | QUOTIENTS | {"rdiv"}:
        if step.node.kwargs or sum(a is node for a in step.node.args[:2]) != 1:
            return None
        divided = (step.node.args[0] is node) != (step.name == "rdiv")
        return power if step.name in PRODUCTS or divided else -power
    return power if step.name in IDENTITY else None


def _number_beside(step: Call, node: fx.Node) -> float | None:
    others = [a for a in step.node.args[:2] if a is not node]
    if len(others) != 1 or step.node.kwargs or not isinstance(others[0], (int, float)):
        return None
    return float(others[0])


def _attribute_with(step: Call, number: float) -> str | None:
    """The module's attribute that holds a number, if just one does."""
    names = [
        k for k, v in vars(step.owner).items() if type(v) in (int, float) and v == number and v != 0
    ]
    return names[0] if len(names) == 1 else None


def _weight_beside(step: Call, node: fx.Node) -> tuple[fx.Node, float] | None:
    """The parameter (and a number added to it) that a product multiplies the node with."""
    others = [a for a in step.node.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    other, shift = others[0], 0.0
    while other.op == "call_function" and len(other.users) == 1:
        made = Call(other, step.modules)
        if made.name == "add" and shift == 0.0:
            number = _number_beside(made, made.inputs[0]) if len(made.inputs) == 1 else None
            if number is None:
                return None
            shift = float(number)
        elif made.name not in IDENTITY and made.name not in _MOVED:
            return None
        other = made.first if made.inputs else other
        if not isinstance(other, fx.Node):
            return None
    alone = other.op == "get_attr" and other.meta["name"] == "parameter" and len(other.users) == 1
    return (other, shift) if alone else None


@rule("mean")
class Mean(Reduction):
    """A mean over a labelled axis stays right up to a factor that the weight after it takes up."""

    def _over(self, call: Call, axes: AxesOf) -> int | None:
        """The one labelled axis that the mean is over, where a rescaling is possible."""
        if len(call.inputs) != 1:
            return None
        labelled = [d for d in self.dims(call) if axes(call.first)[d] is not None]
        alone = len(labelled) == 1 and len(self.dims(call)) == 1
        return labelled[0] if alone and find_rescaling(call) is not None else None

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        over = self._over(call, axes)
        if over is None:
            return super().labels(call, axes, space)
        given = [None if i == over else axis for i, axis in enumerate(axes(call.first))]
        return self._drop(given, (over,), len(call.shape))

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if find_rescaling(call) is None:
            yield from super().reads(call, known, live)
            return
        for dim in self.dims(call):
            yield from _nonzero_reads(call.first, dim, known)

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        for dim in self.dims(call):
            labels = plan.knowledge.axis(call.first, dim)
            if labels is not None and not plan.kept(labels).all():
                found = find_rescaling(call)  # None where the speedup need not be exact
                if found is not None:
                    rescale(plan, found, len(labels) / int(plan.kept(labels).sum()))


def rescale(plan: PlanBuilder, found: Rescaling, factor: float) -> None:
    """Let numbers and a weight take up ``factor`` on a mean."""
    for name, step, number, power in found.added:
        plan.set_number(step, name, number, number * factor**power)
    plan.scale(str(found.weight.target), factor**found.power, found.shift)


# -- norms ---------------------------------------------------------------------------------


class NormOverFeatures(Rule):
    """Statistics over the last axis, then a weight (and bias) for each feature."""

    def vectors(self, call: Call) -> list[fx.Node]:
        given = [call.arg(2, "weight")]
        if call.name == "layer_norm":
            given.append(call.arg(3, "bias"))
        return [node for node in given if node is not None]

    def sized(self, call: Call) -> bool:
        """Torch's own modules, and those that become ours, have their sizes set."""
        return call.modules is None or not (self.can_shrink(call) and self.is_plain(call))

    def is_plain(self, call: Call) -> bool:
        """Whether the module's code is torch's, or will be ours."""
        return True

    def can_shrink(self, call: Call) -> bool:
        """Whether the call could be made to divide by the number of features of before."""
        raise NotImplementedError

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        result, rank = list(axes(call.first)), len(call.arg(1, "normalized_shape"))
        if rank > 1 or not self.can_shrink(call):
            for i in range(len(result) - rank, len(result)):
                space.pin(result[i], call.node, f"is what {call.name} takes its statistics over")
                result[i] = None
            for node in call.inputs[1:]:
                space.pin_all(axes(node), call.node, f"belongs to a {call.name} of fixed size")
            return tuple(result)
        for node in self.vectors(call):
            fixed = f"meets a fixed {call.name}"
            result[-1] = space.tie(result[-1], axes(node)[0], call.node, fixed)
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        """The bias where the weight is 0, and where what it scales is 0: see `_centred_zeros`."""
        rank = len(call.arg(1, "normalized_shape"))
        weight, bias = (
            torch.tensor(default).double() if node is None else known.value(node)
            for node, default in ((call.arg(2, "weight"), 1.0), (self._bias(call), 0.0))
        )
        if bias is None:
            return None
        zero = torch.zeros([1] * len(call.shape), dtype=torch.bool)
        if weight is not None:
            zero = zero | (weight == 0)
        value = known.value(call.first)
        if value is not None and value.is_floating_point():
            zero = zero | self._centred_zeros(value, tuple(range(-rank, 0)))
        return torch.where(zero, bias, torch.nan) if bool(zero.any()) else None

    def _bias(self, call: Call) -> fx.Node | None:
        return None if call.name == "rms_norm" else call.arg(3, "bias")

    def _centred_zeros(self, value: torch.Tensor, lane: tuple[int, ...]) -> torch.Tensor:
        """Bool, broadcasts to a known input: where it and what the norm takes off it are 0."""
        raise NotImplementedError

    def live(self, call: Call, decision: Decision) -> np.ndarray | None:
        return np.atleast_1d(decision.live(call.node, -1).any())

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        if live is not None and live.any() and len(call.arg(1, "normalized_shape")) == 1:
            yield from _nonzero_reads(call.first, len(call.shape) - 1, known)

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        labels = plan.knowledge.axis(call.first, len(call.shape) - 1)
        if labels is None or plan.kept(labels).all():
            return
        left = int(plan.kept(labels).sum())
        shape = getattr(call.owner, "normalized_shape", None)
        if shape is not None and tuple(shape) == (len(labels),):
            plan.set_number(call, "normalized_shape", shape, type(shape)([left]))
        self.count(call, plan, len(labels), left)

    def count(self, call: Call, plan: PlanBuilder, before: int, left: int) -> None:
        """Let the call divide by ``before``, though ``left`` features are left."""
        raise NotImplementedError


@rule("layer_norm")
class LayerNorm(NormOverFeatures):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016), in a LayerNorm module."""

    def can_shrink(self, call: Call) -> bool:
        return self.channels_first(call) is not None

    def channels_first(self, call: Call) -> bool | None:
        """Where the features lie in the module's input; None: the module does something else."""
        owner = call.owner
        if isinstance(owner, CountedLayerNorm):
            return owner.channels_first
        if not isinstance(owner, nn.LayerNorm) or not self._owns_its_weights(call, owner):
            return None
        if type(owner).forward is nn.LayerNorm.forward:
            return False
        inside = [n for n in (call.first, *call.node.users) if n.meta["module"] == call.module]
        if not inside:
            return False
        rank = len(call.shape)
        orders = [tuple(Call(n).rest(1, "dims")) for n in inside if n.meta["name"] == "permute"]
        there = (0, *range(2, rank), 1)
        back = (0, rank - 1, *range(1, rank - 1))
        return True if orders == [there, back] and len(inside) == 2 else None

    def _centred_zeros(self, value: torch.Tensor, lane: tuple[int, ...]) -> torch.Tensor:
        return torch.eq(value, 0).all(dim=lane, keepdim=True)  # other constants leave rounding

    def _owns_its_weights(self, call: Call, owner: nn.LayerNorm) -> bool:
        prefix = f"{call.module}." if call.module else ""
        own = [f"{prefix}{name}" for name, p in owner.named_parameters(recurse=False)]
        return [str(node.target) for node in self.vectors(call)] == own

    def count(self, call: Call, plan: PlanBuilder, before: int, left: int) -> None:
        owner, channels_first = call.owner, self.channels_first(call)
        if not isinstance(owner, CountedLayerNorm):
            options = {"count": before, "channels_first": channels_first}
            plan.replace(call, "CountedLayerNorm", options)


@rule("rms_norm")
class RMSNorm(NormOverFeatures):
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019).

    Σx²/N + eps = n/N (Σx²/n + eps N/n): the factor goes into the weight and the epsilon.
    """

    def can_shrink(self, call: Call) -> bool:
        weight = call.arg(2, "weight")
        alone = isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1
        return alone and self._epsilon(call) is not None

    def is_plain(self, call: Call) -> bool:
        return type(call.owner) is nn.RMSNorm

    def _centred_zeros(self, value: torch.Tensor, lane: tuple[int, ...]) -> torch.Tensor:
        return torch.eq(value, 0)

    def _epsilon(self, call: Call) -> str | None:
        """The module's attribute that holds the epsilon."""
        eps = call.arg(3, "eps")
        if eps is None:
            return "eps" if getattr(call.owner, "eps", 0.0) is None else None
        return _attribute_with(call, eps)

    def count(self, call: Call, plan: PlanBuilder, before: int, left: int) -> None:
        eps, name = call.arg(3, "eps"), self._epsilon(call)
        assert name is not None, "labels() pinned the others"
        number = torch.finfo(call.node.meta["dtype"]).eps if eps is None else eps
        plan.set_number(call, name, eps, number * before / left)
        plan.scale(str(call.arg(2, "weight").target), (before / left) ** 0.5)
