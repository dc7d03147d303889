"""The jumps of a run: results that rounding can flip, and how a second run takes them over.

A comparison, a rank, a rounded number or the boxes that non-maximum suppression leaves may change
where their input changes in its last bit, and all that comes after with them: other boxes, another
number of them, another path through the code. Of two runs that agree up to rounding, the second is
given the jumps of the first, so that everything between them can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from compress.graph.watch import METADATA, SIZES, function_name, tensors_in

# Of float tensors they make float tensors, with jumps all the same.
_STEPS = frozenset("floor ceil round trunc frac sign sgn heaviside floor_divide remainder".split())
_ROUNDING = {
    torch.float64: 1e-8,
    torch.complex128: 1e-8,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_NOISE = {torch.float64: 1e-11, torch.complex128: 1e-11, torch.float32: 1e-6}


@dataclass(frozen=True, slots=True)
class Jump:
    """One call: its name, the tensors and numbers that it was given, and all that it returned."""

    name: str
    inputs: list[torch.Tensor]
    numbers: list[float]
    result: Any


class Jumps(TorchFunctionMode):
    """Keep the jumps of the run under this mode, in ``calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Jump] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        jump = _jump(func, args, kwargs or {}, result)
        if jump is not None:
            self.calls.append(replace(jump, inputs=_own(jump.inputs), result=_own(result)))
        return result


class Settled(TorchFunctionMode):
    """Give a run the jumps of an earlier one, as long as their inputs agree.

    A jump whose inputs differ by more than ``tolerance`` (relative to the largest entry; None:
    what rounding explains), or have other sizes, or come with other numbers, is the run's own.
    ``error`` is the largest difference that was settled.
    """

    def __init__(self, jumps: Iterable[Jump], tolerance: float | None = None) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.error = 0.0
        self._ahead = iter(jumps)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        jump = _jump(func, args, kwargs or {}, result)
        if jump is None:
            return result
        before = next(self._ahead, None)
        if before is None or before.name != jump.name:  # another path: nothing to compare with
            self._ahead = iter(())
            return result
        error, allowed = largest_error(before.inputs, jump.inputs), self.tolerance
        if allowed is None:
            allowed = rounding_of(before.inputs)
        if error > allowed or error == float("inf") or before.numbers != jump.numbers:
            return result
        self.error = max(self.error, error)
        return _own(before.result)


def _jump(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> Jump | None:
    """The call as a jump, if it makes anything but floating point tensors of such tensors."""
    name = function_name(func)
    if isinstance(result, torch.Tensor) and _is_float(result) and name not in _STEPS:
        return None  # nearly all calls
    leaves = tree_leaves(result)
    if name in METADATA or name in SIZES or not all(map(_is_data, leaves)):
        return None
    if name not in _STEPS and all(isinstance(v, torch.Tensor) and _is_float(v) for v in leaves):
        return None
    inputs = list(tensors_in((args, kwargs)))
    if not any(map(_is_float, inputs)):
        return None
    numbers = [v for v in tree_leaves((args, kwargs)) if isinstance(v, (int, float))]
    return Jump(name, inputs, numbers, result)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_data(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, bool, int, float, complex))


def _own(value: Any) -> Any:
    """A copy of all tensors: later calls may write on them."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)


# -- how far two runs are apart ------------------------------------------------------------


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """max |expected - got| / max |expected|; inf where shapes, or NaNs and infinities, differ.

    Two tensors that hold nothing but rounding noise, where a norm blows up what should be 0, are
    the same.
    """
    difference, scale = _difference(expected, got)
    if max(difference, scale) <= _NOISE.get(expected.dtype, 0.0):
        return 0.0
    return difference / scale if scale > 0 else difference


def absolute_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """max |expected - got|; inf where shapes, or NaNs and infinities, differ."""
    return _difference(expected, got)[0]


def _difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the largest finite value that was expected."""
    if expected.shape != got.shape:
        return float("inf"), 0.0
    if expected.numel() == 0:
        return 0.0, 0.0
    if not _is_float(expected):
        return (0.0 if torch.equal(expected, got) else float("inf")), 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, got = expected.to(wide), got.to(wide)
    finite = torch.isfinite(expected)
    same = torch.where(finite, got, expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf"), 0.0
    scale = float(torch.where(finite, expected, 0).abs().max())
    return float(torch.where(finite, (expected - same), 0).abs().max()), scale


def largest_error(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """The largest relative error over all tensors."""
    if len(expected) != len(got):
        return float("inf")
    return max(map(relative_error, expected, got), default=0.0)


def rounding_of(tensors: list[torch.Tensor]) -> float:
    """The largest relative error that rounding explains in any of several tensors."""
    return max(map(rounding, tensors), default=0.0)


def rounding(tensor: torch.Tensor) -> float:
    """The largest relative error that rounding explains."""
    return _ROUNDING.get(tensor.dtype, 0.0)
