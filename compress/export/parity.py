"""Whether a runtime computes what the model does, on inputs like the one that was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compress.errors import ExportError
from compress.graph.jumps import absolute_error, relative_error, rounding_of
from compress.graph.run import as_arguments, does_not_run, evaluating, rng_kept, state_kept
from compress.graph.watch import tensors_in
from compress.speedup.compare import Comparison, Verification, batch_size_of, drawn_input

BATCH_SIZES = (1, 3)


class Runtime(nn.Module):
    """Anything that is called as a model is, as a module: it can be compared and timed as one.

    ``call`` is no submodule: what `torch.export` made refuses ``train()`` and ``eval()``.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        vars(self)["call"] = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["call"](*args, **kwargs)


def outputs_of(model: nn.Module, one: Any) -> list[torch.Tensor]:
    """All output tensors in eval mode; mode, buffers and random state as before."""
    args, kwargs = as_arguments(one)
    with torch.no_grad(), state_kept(model, values=True), evaluating(model), rng_kept():
        torch.manual_seed(0)
        return [tensor.clone() for tensor in tensors_in(model(*args, **kwargs))]


def parity(
    runtime: nn.Module,
    model: nn.Module,
    dummy_input: Any,
    *,
    batch_sizes: Sequence[int] = (),
    tolerance: float | None = None,
    seed: int = 0,
) -> Verification:
    """Hold a runtime against the model on the given input and one drawn for each batch size.

    Where they differ, the run's ``problem`` names the output. A runtime cannot be made to round as
    torch does, so a choice that rounding may flip (which boxes are left) counts as it comes.

    Errors: ``TraceError`` where the model does not run on ``dummy_input``.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        tolerance = rounding_of(outputs_of(model, dummy_input)) if tolerance is None else tolerance
    except Exception as error:
        raise does_not_run(model, dummy_input, error) from error
    runs = [_compared(runtime, model, dummy_input, tolerance, drawn=False)]
    for size in batch_sizes or (batch_size_of(dummy_input),):
        drawn = drawn_input(dummy_input, size, generator)
        runs.append(_compared(runtime, model, drawn, tolerance, drawn=True))
    worst = max(run.relative_error for run in runs)
    return Verification(
        same=worst <= tolerance,
        absolute_error=max(run.absolute_error for run in runs),
        relative_error=worst,
        tolerance=tolerance,
        runs=tuple(runs),
    )


def raise_unless_same(found: Verification, model: nn.Module, what: str) -> None:
    """Raise ``ExportError`` where ``what`` was made of the model does not compute the same."""
    if not found:
        raise ExportError(
            f"{type(model).__name__} as {what} does not compute what the model does: {found}\n"
            "If that much is to be expected of it, pass a larger tolerance; check=False does not "
            "compare"
        )


def _compared(
    runtime: nn.Module, model: nn.Module, one: Any, tolerance: float, drawn: bool
) -> Comparison:
    size = batch_size_of(one)
    try:
        expected = outputs_of(model, one)
    except Exception as error:  # the given input ran: this batch size is none of the model's
        problem = f"skipped, the model does not run ({type(error).__name__}: {error})"
        return Comparison(size, drawn, 0.0, 0.0, problem, skipped=True)
    infinite = float("inf")
    try:
        got = outputs_of(runtime, one)
    except Exception as error:
        problem = f"does not run ({type(error).__name__}: {error})"
        return Comparison(size, drawn, infinite, infinite, problem)
    if len(got) != len(expected):
        problem = f"got {len(got)} output tensors, expected {len(expected)}"
        return Comparison(size, drawn, infinite, infinite, problem)
    relative = list(map(relative_error, expected, got))
    absolute = list(map(absolute_error, expected, got))
    problems = [
        f"output {index} of {len(got)} differs by {off:.1e}: got {_shape(b)}, expected {_shape(a)}"
        for index, (off, a, b) in enumerate(zip(relative, expected, got, strict=True))
        if not off <= tolerance
    ]
    largest, most = max(relative, default=0.0), max(absolute, default=0.0)
    return Comparison(size, drawn, most, largest, "; ".join(problems))


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
