"""Compare what two models compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress.errors import VerificationError
from compress.graph.jumps import Jump, Jumps, Settled, largest_error, rounding_of
from compress.graph.run import (
    as_arguments,
    does_not_run,
    evaluating,
    results,
    rng_kept,
    state_kept,
)
from compress.speedup.plan import Plan
from compress.speedup.surgery import apply_plan, masked

T = TypeVar("T")
IN_FLOAT64 = 1e-6  # relative differences that are rounding, in a model that enlarges it


@dataclass(frozen=True)
class Computed:
    """What a model made of an input: its output tensors, and the jumps of the run."""

    outputs: list[torch.Tensor]
    jumps: list[Jump]


def run(model: nn.Module, dummy_input: Any, mode: Jumps | Settled) -> list[torch.Tensor]:
    """All its results in eval mode, with a fixed seed; mode and random state as before."""
    args, kwargs = as_arguments(dummy_input)
    with torch.no_grad(), state_kept(model, values=True), evaluating(model), rng_kept(), mode:
        torch.manual_seed(0)
        return [t.clone() for t in results(model, model(*args, **kwargs))]


def compute(model: nn.Module, dummy_input: Any) -> Computed:
    """Run a model for others to be compared with."""
    jumps = Jumps()
    return Computed(run(model, dummy_input, jumps), jumps.calls)


def error_of(
    model: nn.Module, dummy_input: Any, expected: Computed, tolerance: float | None
) -> float:
    """How far a model is off, relative to the largest entry: its outputs, and what jumps are of.

    Rounding may flip a jump (which boxes are left, which class is the largest); where what it is
    of agrees to ``tolerance`` (None: what rounding explains), it is taken from the other model.
    """
    settled = Settled(expected.jumps, tolerance)
    got = run(model, dummy_input, settled)
    return max(largest_error(expected.outputs, got), settled.error)


class Verifier:
    """Holds a model, while it is being cut, against what it computed masked.

    Made before the cut: it runs the masked model. ``masks`` are by parameter path. With ``exact``
    false the two may differ, and the error is measured as if all jumps were the same.
    """

    def __init__(
        self, model: nn.Module, dummy_input: Any, masks: Mapping[str, torch.Tensor], exact: bool
    ) -> None:
        self.model = model
        self.dummy_input = dummy_input
        self.masks = masks
        self.tolerance = None if exact else float("inf")
        try:
            with masked(model, masks):
                self.expected = compute(model, dummy_input)
        except Exception as error:  # meta tensors have no values that could be wrong
            raise does_not_run(model, dummy_input, error) from error

    def compare(self) -> tuple[float, str]:
        """The small model's relative error, and what is wrong with it ("": nothing)."""
        try:
            off = error_of(self.model, self.dummy_input, self.expected, self.tolerance)
        except Exception as error:
            return float("inf"), f"does not run ({type(error).__name__}: {error})"
        if off <= rounding_of(self.expected.outputs):
            return off, ""
        return off, f"differs from the masked one by {off:.1e} of its largest output"

    def accept_or_raise(
        self, undo: Callable[[], None], plan: Plan, problem: str
    ) -> tuple[Callable[[], None], float]:
        """Accept a difference that is rounding only, which float64 shows; else raise.

        A deep model with unlucky weights enlarges the rounding of each sum. The cut is undone and
        made again for it; returns how to undo it now, and the relative error in float64.
        """
        undo()
        exact, error = in_float64(self.model, self.dummy_input, self.masks, compute), None
        if exact is not None:
            settled = partial(error_of, expected=exact, tolerance=IN_FLOAT64)
            error = in_float64(self.model, self.dummy_input, self.masks, settled, plan)
        undo = apply_plan(self.model, plan, self.masks)
        if error is not None and error <= IN_FLOAT64:
            return undo, error
        undo()
        raise VerificationError(
            f"the small model {problem}. The model is as it was. Does it draw random numbers in "
            "eval mode, or change its own state? If not, please report it. verify=False skips this "
            "check."
        )


def in_float64(
    model: nn.Module,
    dummy_input: Any,
    masks: Mapping[str, torch.Tensor],
    run: Callable[[nn.Module, Any], T],
    plan: Plan | None = None,
) -> T | None:
    """What ``run`` gives for a float64 copy under masks; None where it does not run in float64.

    With ``plan`` the copy is cut: what the plan adds to parameters is not rounded to their dtype.
    """
    try:
        copy = deepcopy(model).double()
        apply_plan(copy, plan or Plan(), masks)
        return run(copy, tree_map_only(torch.Tensor, _double, dummy_input))
    except Exception:
        return None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
