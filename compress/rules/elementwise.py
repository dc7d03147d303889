"""Functions that work position by position: activations, arithmetic, casts, dropout.

Labels: operands that share an axis are tied along it. Values: the function itself is run on what is
known; 0 times unknown is 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from compress.graph.labels import Axes, Axis, EqualParts, LabelSpace
from compress.graph.shapes import normal_axis
from compress.modules import stand_in_state
from compress.rules.registry import OPAQUE, Call, Rule, Value, rule, rule_for, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

# Values of larger operands (weights computed from weights) are not worth knowing.
LARGEST_VALUE = 1 << 22

UNARY = """relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh
sigmoid log_sigmoid tanh softplus softsign tanhshrink softshrink hardshrink threshold exp expm1 exp2
log log1p log2 log10 sqrt rsqrt square abs absolute neg negative positive sign sgn sin cos tan asin
acos atan sinh cosh asinh acosh atanh arctan erf erfc round floor ceil trunc frac reciprocal clamp
clip clamp_min clamp_max pow nan_to_num logit isnan isinf isfinite logical_not bitwise_not invert
sinc float_power rrelu deg2rad rad2deg xlogy i0 erfinv lgamma digamma
conj conj_physical""".split()
BINARY = """add sub rsub subtract mul multiply div divide true_divide rdiv floor_divide rfloordiv
floordiv remainder fmod rpow maximum minimum fmax fmin atan2 where addcmul addcdiv lerp masked_fill
eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor and or
xor iand ior ixor rmod heaviside copysign hypot logaddexp""".split()
IDENTITY = """clone detach to float double half bfloat16 bool int long type_as cuda cpu data
requires_grad dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout
feature_alpha_dropout resolve_conj resolve_neg""".split()

# What is recorded under a name that torch, its functional and ``operator`` do not have.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rsub": lambda a, b: b - a,
    "rdiv": lambda a, b: b / a,
    "rfloordiv": lambda a, b: b // a,
    "rpow": lambda a, b: b**a,
    "rmod": lambda a, b: b % a,
    "and": operator.and_,
    "or": operator.or_,
    "log_sigmoid": F.logsigmoid,
}
PRODUCTS = frozenset("mul multiply".split())
QUOTIENTS = frozenset("div divide true_divide".split())


def tied_axes(
    nodes: list[fx.Node], axes: Callable[[Any], Axes], call: Call, space: LabelSpace
) -> Axes:
    """Axes of the broadcast of several tensors: aligned from the right, tied where both vary."""
    rank = len(call.shape)
    result: list[Axis] = [None] * rank
    for position in range(rank):
        size, offset = call.shape[position], rank - position
        if size == 1:
            continue
        found: list[tuple[fx.Node, Axis]] = []
        for node in nodes:
            shape = shape_of(node)
            if offset <= len(shape) and shape[-offset] == size:
                found.append((node, axes(node)[-offset]))
        if found:
            result[position] = _tie_all(found, call, space)
    return tuple(result)


def _tie_all(found: list[tuple[fx.Node, Axis]], call: Call, space: LabelSpace) -> Axis:
    if any(axis is None for _, axis in found):
        for _, axis in found:
            reason = f"meets a tensor of fixed size in {call.name}"
            space.pin(axis, call.node, reason, meets=True)
        return None
    first = found[0][1]
    for _, axis in found[1:]:
        space.tie(first, axis, call.node, call.name)
    return first


def function_of(call: Call) -> Callable[..., Any]:
    """The out-of-place form of the function that was called."""
    if call.name in _FUNCTIONS:
        return _FUNCTIONS[call.name]
    for home in (torch, F, operator, torch.Tensor):
        found: Callable[..., Any] | None = getattr(home, call.name, None)
        if found is not None:
            return found
    raise AttributeError(call.name)


def run_on_values(call: Call, known: Knowledge) -> Value:
    """Run the function on what is known of its operands, unknown wherever one of them is."""
    operands = {node: known.value(node) for node in call.inputs}
    if all(v is None for v in operands.values()):
        return None
    unknown = torch.zeros((), dtype=torch.bool)
    filled: dict[fx.Node, torch.Tensor] = {}
    for node, value in operands.items():
        if value is None:
            if not (node.meta["dtype"].is_floating_point or node.meta["dtype"] == torch.bool):
                return None
            value = torch.full((1,) * len(shape_of(node)), torch.nan, dtype=torch.float64)
        if value.numel() > LARGEST_VALUE:
            return None
        if value.is_floating_point():
            unknown = unknown | value.isnan()
            value = torch.where(value.isnan(), 0.0, value)
            # Of a condition it is known for some positions: 0, 1 or NaN.
            value = value.bool() if node.meta["dtype"] == torch.bool else value
        filled[node] = value
    args = fx.node.map_arg(call.node.args, lambda n: filled[n])
    kwargs = fx.node.map_arg(call.node.kwargs, lambda n: filled[n])
    kwargs = {k: v for k, v in kwargs.items() if k not in ("inplace", "out", "dtype")}
    result = function_of(call)(*args, **kwargs)
    if result.dtype == torch.bool and bool(unknown.any()):
        result = result.double()
    if not result.is_floating_point():
        return None if bool(unknown.any()) else result
    return _with_unknown(result, unknown)


def _with_unknown(result: torch.Tensor, unknown: torch.Tensor) -> Value:
    result = torch.where(unknown, torch.nan, result)
    return None if bool(result.isnan().all()) else result


@rule(*UNARY, *BINARY)
class Elementwise(Rule):
    """Any function of its operands position by position."""

    positional = True

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        if call.shape and not isinstance(call.shape[0], int):  # where(condition) alone
            return OPAQUE.labels(call, axes, space)
        if call.name in PRODUCTS | QUOTIENTS and isinstance(call.arg(0, "input"), fx.Node):
            _pin_scale(call, axes, space)
        return tied_axes(call.inputs, axes, call, space)

    def value(self, call: Call, known: Knowledge) -> Value:
        result = run_on_values(call, known)
        if call.name in PRODUCTS | QUOTIENTS:
            return _zero_times_unknown(call, known, result)
        return result


def _pin_scale(call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> None:
    """``q * (c // heads) ** -0.5``: a scale that the code computes from the number of head dims.

    It looks like any number; but the features of heads, or what the product of two activations was
    summed over, have just this size, and the module does not hold it as ``self.scale``.
    """
    number = call.arg(1, "other")
    if not isinstance(number, float) or not number > 0 or is_held(call.owner, number):
        return
    source = call.first
    seen = [(source, len(shape_of(source)) - 1)] if shape_of(source) else []
    if source.op == "call_function":
        seen += [
            pair for pairs in rule_for(source.meta["name"]).summed(Call(source)) for pair in pairs
        ]
    for node, axis in seen:
        size, labels = shape_of(node)[axis], axes(node)[axis]
        roots = (size**-0.5, size**0.5)
        if labels is None or not any(math.isclose(number, root) for root in roots):
            continue
        if node is not source or any(np.array_equal(labels, g.columns) for g in space.grids):
            space.pin(labels, call.node, "sets the scale of attention by its number")


def is_held(module: nn.Module, number: float) -> bool:
    """Whether an attribute of a module is this number: it does not change with any size."""
    held = {**vars(module), **stand_in_state(module)}
    return any(isinstance(v, float) and v == number for v in held.values())


def _zero_times_unknown(call: Call, known: Knowledge, result: Value) -> Value:
    """A factor that is 0 makes the product 0 whatever the other is.

    A quotient is 0 only if its divisor is certainly not 0: a number, or something known.
    """
    factors = call.node.args[:2]
    if call.name in QUOTIENTS:
        divisor = call.node.args[1] if len(factors) > 1 else 0
        value = known.value(divisor) if isinstance(divisor, fx.Node) else torch.tensor(divisor)
        certain = value is not None and bool(((value != 0) & ~value.isnan()).all())
        factors = factors[:1] if certain or _bound(divisor) == _POSITIVE else ()
    for factor in factors:
        value = known.value(factor) if isinstance(factor, fx.Node) else None
        if value is None or not bool((value == 0).any()):
            continue
        if result is None:
            result = torch.full((1,) * len(call.shape), torch.nan, dtype=torch.float64)
        result = torch.where(value == 0, 0.0, result)
    return result


_ANY, _NOT_NEGATIVE, _POSITIVE = range(3)
_SQUARES = frozenset("square abs absolute relu relu6 norm linalg_norm vector_norm".split())
_KEEPING = frozenset("sqrt mean sum view reshape unsqueeze squeeze expand clone contiguous".split())


def _bound(operand: Any, depth: int = 8) -> int:
    """What is certain of an operand whatever the input: >= 0, > 0 (a root of squares plus eps)."""
    if isinstance(operand, (int, float)):
        return _POSITIVE if operand > 0 else _NOT_NEGATIVE if operand == 0 else _ANY
    if not isinstance(operand, fx.Node) or operand.op != "call_function" or depth == 0:
        return _ANY
    name, args = operand.meta["name"], (*operand.args, None, None)
    if "max" in operand.kwargs:
        return _ANY
    if name in _SQUARES or (name == "pow" and args[1] in (2, 4)):
        return _NOT_NEGATIVE
    if name in _KEEPING:
        return _bound(args[0], depth - 1)
    if name in ("clamp_min", "maximum") or (name == "clamp" and args[2] is None):
        low = operand.kwargs.get("min", args[1])
        return max(_bound(args[0], depth - 1), _bound(low, depth - 1))
    bounds = [_bound(a, depth - 1) for a in args[:2]]
    if name == "add":
        return max(bounds) if min(bounds) > _ANY else _ANY
    if name in PRODUCTS:
        return _NOT_NEGATIVE if args[0] is args[1] else min(*bounds, _NOT_NEGATIVE)
    return _ANY


@rule(*IDENTITY)
class Identity(Rule):
    """Casts, copies and dropout (whose values are those of eval mode)."""

    positional = True

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        return axes(call.first)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        dtype = call.node.meta["dtype"]
        if value is None or value.is_floating_point() == dtype.is_floating_point:
            return value
        if value.is_floating_point() and (dtype.is_complex or dtype == torch.bool):
            return torch.where(value == 0, value, torch.nan)
        return None if bool(value.isnan().any()) else value.to(call.node.meta["dtype"])


@rule("copy")
class Copy(Rule):
    """``x.copy_(source)``: x keeps its shape, and nothing else."""

    positional = True

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        return tied_axes(call.inputs, axes, call, space)

    def value(self, call: Call, known: Knowledge) -> Value:
        source = call.arg(1, "src", call.node.kwargs.get("other"))
        value = known.value(source)
        floats = all(node.meta["dtype"].is_floating_point for node in (call.first, source))
        if value is None or not floats:
            return None
        return value.reshape([1] * (len(call.shape) - value.dim()) + list(value.shape))


@rule("contiguous")
class Contiguous(Identity):
    """A copy, or its very input where that lies in order already: with one head left, say."""

    vanishes = True


@rule("prelu")
class PReLU(Rule):
    """x where x > 0, else weight * x; one slope, or one for each position of axis 1."""

    positional = True

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        result = list(axes(call.first))
        weight = call.arg(1, "weight")
        if len(result) > 1 and shape_of(weight) == (call.shape[1],):
            result[1] = space.tie(result[1], axes(weight)[0], call.node, "meets a fixed slope")
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        value = known.value(call.first)
        slope = known.value(call.arg(1, "weight"))
        if value is None or slope is None:
            return None
        slope = slope.reshape(1, -1, *[1] * (value.dim() - 2)) if value.dim() > 1 else slope
        return torch.where(value >= 0, value, slope * value)


@rule("glu")
class GatedLinearUnit(Rule):
    """One half of an axis times the sigmoid of the other: both lose the same positions."""

    def sized(self, call: Call) -> bool:
        return True

    def dim(self, call: Call) -> int:
        return normal_axis(call.arg(1, "dim", -1), len(call.shape))

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        given, dim = list(axes(call.first)), self.dim(call)
        axis = given[dim]
        if axis is not None:
            halves = axis.reshape(2, -1)
            space.equal_parts.append(EqualParts(halves, call.node))
            given[dim] = space.tie(halves[0], halves[1], call.node, "glu")
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        value, dim = known.value(call.first), self.dim(call)
        if value is None:
            return None
        a, b = (value, value) if value.shape[dim] == 1 else value.chunk(2, dim)
        return torch.where(a == 0, 0.0, a * b.sigmoid())
