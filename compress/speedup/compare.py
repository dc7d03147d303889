"""`compress.verify`: hold a small model against the masked one, and find where they part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress.errors import SpeedupError
from compress.graph.jumps import (
    Settled,
    absolute_error,
    largest_error,
    relative_error,
    rounding_of,
)
from compress.graph.run import does_not_run
from compress.graph.watch import tensors_in
from compress.speedup.verify import IN_FLOAT64, compute, error_of, in_float64, run

_SAMPLED = 256  # places of a channel that are looked at to tell which one it is


@dataclass(frozen=True)
class Comparison:
    """One input: the largest difference of the outputs, absolute and relative to their scale.

    ``drawn``: made by `verify`, not given. ``problem``: why there is nothing to compare (the masked
    model does not run: ``skipped``), or why the difference is infinite.
    """

    batch_size: int | None
    drawn: bool
    absolute_error: float
    relative_error: float
    problem: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class LayerDifference:
    """The first layer, in the order of the run, whose output differs: ``call`` counts from 0."""

    layer: str
    kind: str
    call: int
    relative_error: float

    def __str__(self) -> str:
        again = f", call {self.call}" if self.call else ""
        return f"{self.layer or 'the model itself'} ({self.kind}{again}), {self.relative_error:.1e}"


@dataclass(frozen=True)
class Verification:
    """Whether two models compute the same; prints as a verdict, and is true if they do.

    ``relative_error`` is max |small - masked| / max |masked| of an output, ``absolute_error`` the
    numerator, both the largest of all ``runs``. ``error_in_float64``: what is left of a difference
    beyond ``tolerance`` in float64 (None: not needed, or no float64). ``begins``: where it begins.
    """

    same: bool
    absolute_error: float
    relative_error: float
    tolerance: float
    runs: tuple[Comparison, ...]
    begins: LayerDifference | None = None
    error_in_float64: float | None = None

    def __bool__(self) -> bool:
        return self.same

    def __str__(self) -> str:
        done = [run for run in self.runs if not run.skipped]
        sizes = sorted({run.batch_size for run in done if run.batch_size is not None})
        lines = [
            f"{'the same' if self.same else 'NOT the same'}: largest difference "
            f"{self.relative_error:.1e} of the output's scale, {self.absolute_error:.1e} absolute "
            f"({self.tolerance:.0e} allowed)",
            f"compared on {len(done)} inputs, batch sizes {', '.join(map(str, sizes)) or 'none'}",
        ]
        if self.error_in_float64 is not None:
            lines.append(f"in float64 the difference is {self.error_in_float64:.1e} of the scale")
        if self.begins is not None:
            lines.append(f"it begins in {self.begins}")
        lines += [f"batch size {run.batch_size}: {run.problem}" for run in self.runs if run.problem]
        return "\n".join(lines)


def verify(
    small: nn.Module,
    masked: nn.Module,
    inputs: Any,
    *,
    samples: int = 2,
    batch_sizes: Sequence[int] = (),
    tolerance: float | None = None,
    seed: int = 0,
) -> Verification:
    """Compare what a small model computes with what the masked (or any other) one does.

    Both run in eval mode; modes, random state and buffers are as before. Where they differ, layers
    of the same path are compared in the order of the run; the channels of a layer that lost some
    are matched by what they compute.

    Args:
        small: the small model.
        masked: the model with its masks on, or a plain one.
        inputs: an input as `ModelSpeedup` takes it (a tensor, a tuple of arguments, a dict of
            keyword arguments), or a list of several.
        samples: how many more inputs to draw of each given one, for each batch size: floats with
            its mean and deviation, integers (tokens) from among its values.
        batch_sizes: the batch sizes of drawn inputs, the first axis; none: the given one's.
        tolerance: the relative error to allow; None: what rounding explains in the outputs' dtype.
        seed: of the drawn inputs.

    Errors: ``TraceError`` where the masked model does not run on a given input, ``SpeedupError``
    for arguments of the wrong kind.
    """
    given = _checked(small, masked, inputs, samples, batch_sizes)
    generator = torch.Generator().manual_seed(seed)
    runs: list[tuple[Comparison, Any]] = []
    for one in given:
        runs.append((_compared(small, masked, one, drawn=False), one))
        for size in batch_sizes or (batch_size_of(one),):
            for _ in range(samples):
                drawn = drawn_input(one, size, generator)
                runs.append((_compared(small, masked, drawn, drawn=True), drawn))
    worst, its_input = max(runs, key=lambda run: run[0].relative_error)
    if tolerance is None:
        tolerance = rounding_of(compute(masked, given[0]).outputs)
    same, exactly, begins = worst.relative_error <= tolerance, None, None
    if not same:
        exactly = _in_float64(small, masked, its_input)
        same = exactly is not None and exactly <= IN_FLOAT64
        begins = None if same else _first_difference(small, masked, its_input)
    return Verification(
        same=same,
        absolute_error=max(run.absolute_error for run, _ in runs),
        relative_error=worst.relative_error,
        tolerance=tolerance,
        runs=tuple(run for run, _ in runs),
        begins=begins,
        error_in_float64=exactly,
    )


def _checked(
    small: Any, masked: Any, inputs: Any, samples: int, batch_sizes: Sequence[int]
) -> list[Any]:
    for name, model in (("small", small), ("masked", masked)):
        if not isinstance(model, nn.Module):
            raise SpeedupError(f"{name} is a {type(model).__name__}; pass a torch.nn.Module")
    if type(samples) is not int or samples < 0:
        raise SpeedupError(f"samples is {samples!r}; pass a whole number from 0")
    if any(type(size) is not int or size < 1 for size in batch_sizes):
        raise SpeedupError(f"batch_sizes is {batch_sizes!r}; pass whole numbers from 1")
    given = inputs if isinstance(inputs, list) else [inputs]
    if not given:
        raise SpeedupError("inputs is an empty list; pass at least one input to compare on")
    return given


# -- inputs --------------------------------------------------------------------------------


def batch_size_of(one: Any) -> int | None:
    first = next(tensors_in(one), None)
    return None if first is None or first.dim() == 0 else first.shape[0]


def drawn_input(one: Any, batch_size: int | None, generator: torch.Generator) -> Any:
    """Another input of the same kind: floats like the given ones, integers from among them."""
    before = batch_size_of(one)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        if shape and shape[0] == before and batch_size is not None:
            shape[0] = batch_size
        if not tensor.is_floating_point():
            if tensor.numel() == 0 or tensor.is_complex():
                return tensor
            chosen = torch.randint(tensor.numel(), shape, generator=generator)
            return tensor.flatten()[chosen.to(tensor.device)]
        values = tensor.double()
        spread = float(values.std()) if tensor.numel() > 1 else 1.0
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        made = made * (spread or 1.0) + (float(values.mean()) if tensor.numel() else 0.0)
        return made.to(tensor.device, tensor.dtype)

    return tree_map_only(torch.Tensor, draw, one)


# -- comparing -----------------------------------------------------------------------------


def _compared(small: nn.Module, masked: nn.Module, one: Any, drawn: bool) -> Comparison:
    size = batch_size_of(one)
    try:
        expected = compute(masked, one)
    except Exception as error:
        if not drawn:
            raise does_not_run(masked, one, error) from error
        problem = f"skipped, the masked model does not run ({type(error).__name__}: {error})"
        return Comparison(size, drawn, 0.0, 0.0, problem, skipped=True)
    try:
        # What rounding may flip (which boxes are left) is taken from the masked model.
        settled = Settled(expected.jumps)
        got = run(small, one, settled)
    except Exception as error:
        problem = f"the small model does not run ({type(error).__name__}: {error})"
        return Comparison(size, drawn, float("inf"), float("inf"), problem)
    relative = max(largest_error(expected.outputs, got), settled.error)
    absolute = float("inf")
    if relative < float("inf"):
        absolute = max(map(absolute_error, expected.outputs, got), default=0.0)
    return Comparison(size, drawn, absolute, relative)


def _in_float64(small: nn.Module, masked: nn.Module, one: Any) -> float | None:
    expected = in_float64(masked, one, {}, compute)
    if expected is None:
        return None
    return in_float64(small, one, {}, partial(error_of, expected=expected, tolerance=IN_FLOAT64))


# -- where a difference begins -------------------------------------------------------------


def _first_difference(small: nn.Module, masked: nn.Module, one: Any) -> LayerDifference | None:
    """The first layer whose output differs beyond rounding; None where no layer can be compared."""
    paths = dict(small.named_modules()).keys() & dict(masked.named_modules()).keys()
    expected: dict[tuple[str, int], list[torch.Tensor]] = {}
    found: list[LayerDifference] = []

    def keep(path: str, call: int, module: nn.Module, got: list[torch.Tensor]) -> None:
        expected[path, call] = [t.clone() for t in got]

    def compare(path: str, call: int, module: nn.Module, got: list[torch.Tensor]) -> None:
        wanted = expected.get((path, call), [])
        if found or len(wanted) != len(got):
            return
        errors = [_error_of_kept(a, b) for a, b in zip(wanted, got, strict=True)]
        off = max((e for e in errors if e is not None), default=0.0)
        if off > rounding_of(wanted):
            found.append(LayerDifference(path, type(module).__name__, call, off))

    for model, look in ((masked, keep), (small, compare)):
        with _watching(model, paths, look):
            try:
                compute(model, one)
            except Exception:
                break  # up to where it got, all was the same
    return found[0] if found else None


@contextmanager
def _watching(model: nn.Module, paths: Any, look: Any) -> Iterator[None]:
    """Call ``look(path, call, module, output tensors)`` after each module, the innermost first."""
    calls: dict[str, int] = {}
    handles = []

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls[path] = calls.get(path, -1) + 1
            look(path, calls[path], module, list(tensors_in(output)))

        return after

    try:
        for path, module in model.named_modules():
            if path in paths and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(hook(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _error_of_kept(expected: torch.Tensor, got: torch.Tensor) -> float | None:
    """The relative error; where channels were removed, that of the others (None: cannot tell)."""
    if expected.shape == got.shape:
        return relative_error(expected, got)
    if expected.dim() != got.dim() or not expected.is_floating_point():
        return None
    sizes = zip(expected.shape, got.shape, strict=True)
    fewer = [axis for axis, (before, after) in enumerate(sizes) if before != after]
    if len(fewer) != 1 or got.shape[fewer[0]] > expected.shape[fewer[0]]:
        return None
    kept = torch.from_numpy(_matched(expected, got, fewer[0])).to(expected.device)
    return relative_error(expected.index_select(fewer[0], kept), got)


def _matched(expected: torch.Tensor, got: torch.Tensor, axis: int) -> np.ndarray:
    """For each position of ``got`` along an axis, the one of ``expected`` that it is, in order.

    The increasing assignment with the smallest sum of the largest differences, by dynamic
    programming over the two axes.
    """
    cost = torch.cdist(_rows(got, axis), _rows(expected, axis), p=float("inf")).cpu().numpy()
    rows, columns = cost.shape
    best = np.full((rows + 1, columns + 1), np.inf)
    best[0] = 0.0
    for row in range(rows):
        best[row + 1, 1:] = np.minimum.accumulate(best[row, :-1] + cost[row])
    kept = np.zeros(rows, np.int64)
    column = columns
    for row in range(rows, 0, -1):
        while column > row and best[row, column - 1] <= best[row, column]:
            column -= 1
        column -= 1
        kept[row - 1] = column
    return kept


def _rows(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Float64 (positions, some places)."""
    rows = tensor.detach().movedim(axis, 0).flatten(1).double().nan_to_num()
    step = -(-rows.shape[1] // _SAMPLED)
    return rows[:, :: max(step, 1)]
