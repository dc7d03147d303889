"""Complex numbers and Fourier transforms. Of a complex tensor, only what is 0 counts as known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from compress.graph.labels import Axes, LabelSpace
from compress.graph.shapes import normal_axis
from compress.rules.elementwise import tied_axes
from compress.rules.registry import Call, Rule, Value, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]


def _zero(value: Value) -> torch.Tensor:
    """Bool: where a value is known to be 0."""
    return torch.tensor(False) if value is None else value == 0


def _zero_or_unknown(zero: torch.Tensor) -> Value:
    return torch.where(zero, 0.0, torch.nan).double() if bool(zero.any()) else None


@rule("complex", "polar", "real", "imag")
class ComplexParts(Rule):
    """A complex tensor of two real ones, or back; ``polar``: of a length and an angle."""

    positional = True

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        return tied_axes(call.inputs, axes, call, space)

    def value(self, call: Call, known: Knowledge) -> Value:
        zero = _zero(known.value(call.first))
        if call.name == "complex":
            zero = zero & _zero(known.value(call.arg(1, "imag")))
        return _zero_or_unknown(zero)


@rule("view_as_real", "view_as_complex")
class ComplexView(Rule):
    """Real and imaginary part as a last axis of size 2, or back."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given = axes(call.first)
        if call.name == "view_as_real":
            return (*given, None)
        space.pin(given[-1], call.node, "is a complex number of two parts")
        return given[:-1]

    def value(self, call: Call, known: Knowledge) -> Value:
        zero = _zero(known.value(call.first))
        if zero.dim() == 0:
            return None
        zero = zero.unsqueeze(-1) if call.name == "view_as_real" else zero.all(-1)
        return _zero_or_unknown(zero)


@rule(*(f"fft_{inverse}{kind}fft{axes}" for inverse in ("", "i") for kind in ("", "r", "h")
        for axes in ("", "2", "n")), "fft_fftshift", "fft_ifftshift")  # fmt: skip
class Fourier(Rule):
    """Transforms along some axes: what is 0 all along them stays 0; the other axes pass."""

    def dims(self, call: Call) -> set[int]:
        ndim, shift = len(call.shape), call.name.endswith("shift")
        default: Any = -1 if call.name.endswith("fft") else (-2, -1)
        default = None if shift or call.name.endswith("n") else default
        dim = call.arg(1 if shift else 2, "dim", default)
        dims = range(ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
        return {normal_axis(d, ndim) for d in dims}

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        given = list(axes(call.first))
        for dim in self.dims(call):
            space.pin(given[dim], call.node, f"is what {call.name} works over")
            given[dim] = None
        return tuple(given)

    def value(self, call: Call, known: Knowledge) -> Value:
        zero = _zero(known.value(call.first))
        if zero.dim() != len(shape_of(call.first)):
            return None
        for dim in self.dims(call):
            zero = zero.all(dim, keepdim=True)
        return _zero_or_unknown(zero)
