"""Compare what two models compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress.errors import VerificationError
from compress.graph.run import as_arguments, does_not_run, evaluating, rng_kept, state_kept
from compress.graph.trace import tensors_in
from compress.speedup.plan import Plan
from compress.speedup.surgery import apply_plan

# Largest difference, relative to the largest output, that rounding explains.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.complex128: 1e-8,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def outputs_of(model: nn.Module, dummy_input: Any) -> list[torch.Tensor]:
    """All output tensors in eval mode, with a fixed seed; mode and random state as before."""
    args, kwargs = as_arguments(dummy_input)
    with torch.no_grad(), state_kept(model, values=True), evaluating(model), rng_kept():
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(model(*args, **kwargs))]


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """max |expected - got| / max |expected|; inf where shapes, or NaNs and infinities, differ."""
    difference, scale = _difference(expected, got)
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
    if not (expected.is_floating_point() or expected.is_complex()):
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
    """The largest relative error over all outputs."""
    if len(expected) != len(got):
        return float("inf")
    return max(map(relative_error, expected, got), default=0.0)


def tolerance_for(tensors: list[torch.Tensor]) -> float:
    return max((TOLERANCE.get(t.dtype, 0.0) for t in tensors), default=0.0)


class Verifier:
    """Holds a model, while it is being cut, against what it computed masked.

    Made before the cut: it runs the masked model. ``masks`` are by parameter path.
    """

    def __init__(
        self, model: nn.Module, dummy_input: Any, masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.model = model
        self.dummy_input = dummy_input
        self.masks = masks
        undo = apply_plan(model, Plan(), masks)
        try:
            self.expected = outputs_of(model, dummy_input)
        except Exception as error:  # meta tensors have no values that could be wrong
            raise does_not_run(model, dummy_input, error) from error
        finally:
            undo()

    def compare(self) -> tuple[float, str]:
        """The small model's relative error, and what is wrong with it ("": nothing)."""
        try:
            got = outputs_of(self.model, self.dummy_input)
        except Exception as error:
            return float("inf"), f"does not run ({type(error).__name__}: {error})"
        off, allowed = largest_error(self.expected, got), tolerance_for(self.expected)
        if off <= allowed:
            return off, ""
        return off, f"differs from the masked one by {off:.1e} of its largest output"

    def accept_or_raise(
        self, undo: Callable[[], None], plan: Plan, off: float, problem: str
    ) -> tuple[Callable[[], None], float]:
        """Accept a difference that is rounding only, which float64 shows; else raise.

        A deep model with unlucky weights enlarges the rounding of each sum. The cut is undone and
        made again for it; returns how to undo it now, and the relative error in float64.
        """
        undo()
        exact = None
        if off != float("inf"):
            exact = outputs_in_float64(self.model, self.dummy_input, self.masks)
        undo = apply_plan(self.model, plan, self.masks)
        if exact is not None:
            small = outputs_in_float64(self.model, self.dummy_input)
            exactly = float("inf") if small is None else largest_error(exact, small)
            if exactly <= 1e-6:
                return undo, exactly
        undo()
        raise VerificationError(
            f"the small model {problem}. The model is as it was. Does it draw random numbers in "
            "eval mode, or change its own state? If not, please report it. verify=False skips this "
            "check."
        )


def outputs_in_float64(
    model: nn.Module, dummy_input: Any, masks: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> list[torch.Tensor] | None:
    """The outputs of a float64 copy under masks; None where the model does not run in float64."""
    try:
        copy = deepcopy(model).double()
        apply_plan(copy, Plan(), masks)
        return outputs_of(copy, tree_map_only(torch.Tensor, _double, dummy_input))
    except Exception:
        return None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
