"""The model as `torch.export` and `torch.compile` have it."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only

from compress.errors import ExportError
from compress.export.parity import BATCH_SIZES, Runtime, outputs_of, parity, raise_unless_same
from compress.files import write_atomically
from compress.graph.run import as_arguments, does_not_run, rng_kept
from compress.masks import remove_masks
from compress.speedup.compare import batch_size_of


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with the masks written into its parameters and taken off."""
    if not isinstance(model, nn.Module):
        raise ExportError(f"got a {type(model).__name__}; expected a torch.nn.Module")
    copy = deepcopy(model)
    remove_masks(copy)
    return copy.eval()


def to_exported(
    model: nn.Module,
    dummy_input: Any,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    tolerance: float | None = None,
    strict: bool = False,
) -> torch.export.ExportedProgram:
    """Export a plain copy of a model by `torch.export`, and hold it against the model.

    Args:
        model: masked or not; it is not touched.
        dummy_input: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's
            device.
        dynamic_batch: any batch size can be run: axis 0 of all input tensors whose size there is
            that of the first one.
        check: compare the outputs, on the input and on drawn ones.
        batch_sizes: of the drawn inputs; with ``dynamic_batch=False`` it is the input's.
        tolerance: the relative error to allow; None: what rounding explains in the outputs' dtype.
        strict: trace by dynamo instead of by running the Python code.

    Errors: ``TraceError`` where the model does not run on ``dummy_input``; ``ExportError`` where
    torch cannot export it, or what it made computes something else.
    """
    program = export_program(plain_copy(model), dummy_input, dynamic_batch, strict)
    if check:
        sizes = batch_sizes if dynamic_batch else ()
        runtime = Runtime(program.module().__call__)
        found = parity(runtime, model, dummy_input, batch_sizes=sizes, tolerance=tolerance)
        raise_unless_same(found, model, "a torch.export program")
    return program


def save_exported(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a program as a .pt2 file, which `torch.export.load` reads: whole, or not at all.

    Raises ``OSError`` where it cannot be written.
    """
    content = io.BytesIO()  # torch looks at the suffix of a file's name, and a temporary one's
    torch.export.save(program, content)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))


def export_program(
    plain: nn.Module, dummy_input: Any, dynamic_batch: bool, strict: bool = False
) -> torch.export.ExportedProgram:
    """`torch.export.export`, with one symbol for the batch; its errors say what to try."""
    try:
        outputs_of(plain, dummy_input)
    except Exception as error:
        raise does_not_run(plain, dummy_input, error) from error
    example = _at_least_two(dummy_input) if dynamic_batch else dummy_input
    args, kwargs = as_arguments(example)
    shapes = batch_axes(example) if dynamic_batch else None
    try:
        # It warns of torch's own modules, too; what they are worth, the comparison tells.
        with rng_kept(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except Exception as error:
        advice = "\ndynamic_batch=False exports it for the batch size of dummy_input"
        raise ExportError(
            f"{type(plain).__name__} cannot be exported by torch.export"
            f"{' for any batch size' if dynamic_batch else ''}: {type(error).__name__}: {error}"
            f"{advice if dynamic_batch else ''}"
        ) from error


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """A plain copy of a model in eval mode, under `torch.compile` with these options.

    It is compiled in its first call, and again for sizes that are new.
    """
    return cast(nn.Module, torch.compile(plain_copy(model), **options))


def _at_least_two(dummy_input: Any) -> Any:
    """A batch of one twice over: `torch.export` takes a size of 1 for a constant."""
    if batch_size_of(dummy_input) != 1:
        return dummy_input

    def twice(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor

    return tree_map_only(torch.Tensor, twice, dummy_input)


def batch_axes(dummy_input: Any) -> Any:
    """For each tensor of the batch ``{0: batch}``, in the structure of the arguments."""
    args, kwargs = as_arguments(dummy_input)
    size, batch = batch_size_of(dummy_input), torch.export.Dim("batch")

    def axes(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return {0: batch} if batched else None

    return tree_map(axes, kwargs or args)
