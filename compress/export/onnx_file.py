"""ONNX: a file that onnxruntime was seen to compute the same from."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument, OutputKind

from compress.errors import ExportError
from compress.export.exported import batch_axes, export_program, plain_copy
from compress.export.parity import BATCH_SIZES, parity, raise_unless_same
from compress.files import write_atomically
from compress.graph.watch import tensors_in
from compress.speedup.compare import Verification

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in torch's messages
# A protobuf message holds less than 2 GiB; what is not weights has some of it.
ONE_FILE_BYTES = 2**31 - 2**26


@dataclass(frozen=True)
class OnnxReport:
    """What `to_onnx` wrote: the files, MB (10**6 bytes) of all, how they compare to the model."""

    files: tuple[Path, ...]
    megabytes: float
    opset: int
    dynamic_batch: bool
    parity: Verification | None

    def __str__(self) -> str:
        size = "any batch size" if self.dynamic_batch else "one batch size"
        names = " and ".join(path.name for path in self.files)
        seen = "not compared" if self.parity is None else f"in onnxruntime {self.parity}"
        return f"{names}: {self.megabytes:.2f} MB, opset {self.opset}, {size}\n{seen}"


def to_onnx(
    model: nn.Module,
    dummy_input: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    tolerance: float | None = None,
    opset_version: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxReport:
    """Write a plain copy of a model as ONNX, and hold it in onnxruntime against the model.

    The file appears whole, and after the check. Weights are in it where they fit (2 GiB), else in
    a second file beside it, whose name begins with the first one's.

    Args:
        model: masked or not, on any device; it is not touched.
        dummy_input, dynamic_batch, batch_sizes, tolerance: as for `to_exported`.
        path: of the .onnx file.
        check: compare the outputs in onnxruntime (CPU), on the input and on drawn ones.
        opset_version: of ONNX; torch's choice by default.
        input_names, output_names: names in the file; those of the forward's arguments by default.

    Errors: ``TraceError`` where the model does not run on ``dummy_input``; ``ExportError`` where
    packages are missing, torch cannot export the model, or onnxruntime computes something else:
    there is no new file then. ``OSError`` where it cannot be written.
    """
    require_onnx("to_onnx", ONNX_PACKAGES if check else ONNX_PACKAGES[:2])
    target = Path(path)
    names = {"input_names": input_names, "output_names": output_names}
    program = onnx_program(model, dummy_input, dynamic_batch, opset_version=opset_version, **names)
    found: list[Verification] = []

    def accept(temporary: Path) -> None:
        if check:
            sizes = batch_sizes if dynamic_batch else ()
            runtime = _loaded(temporary, target)
            seen = parity(runtime, model, dummy_input, batch_sizes=sizes, tolerance=tolerance)
            raise_unless_same(seen, model, "ONNX in onnxruntime")
            found.append(seen)

    files = _write(program.model, target, accept)
    return OnnxReport(
        files=files,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        opset=program.model.opset_imports[""],
        dynamic_batch=dynamic_batch,
        parity=found[0] if found else None,
    )


class OnnxModel(nn.Module):
    """An ONNX file as a module: called with tensors, returns the output tensor, or a list of them.

    It computes on the CPU, on as many threads as torch has when it is made. Keyword arguments go by
    the file's names of inputs, all others in order.

    Raises ``ExportError`` where onnxruntime is missing or does not take the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        require_onnx("OnnxModel", ("onnxruntime",))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: they are raised, too
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ExportError(f"{path}: onnxruntime does not take this file: {error}") from error
        self.input_names = [each.name for each in self.session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | list[torch.Tensor]:
        device = next(tensors_in((args, kwargs)), torch.empty(0)).device
        arrays = self.session.run(None, self.feeds(args, kwargs))
        outputs = [torch.from_numpy(np.asarray(each)).to(device) for each in arrays]
        return outputs[0] if len(outputs) == 1 else outputs

    def feeds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What onnxruntime takes for a call: arrays by the file's names of inputs."""
        named = {name: value for name, value in kwargs.items() if name in self.input_names}
        rest = [value for name, value in kwargs.items() if name not in named]
        tensors = list(tensors_in((args, rest)))
        unnamed = [name for name in self.input_names if name not in named]
        if len(tensors) != len(unnamed):
            raise ExportError(
                f"the ONNX file has the inputs {self.input_names}; got {len(tensors)} tensors for "
                f"{unnamed}"
            )
        feeds = named | dict(zip(unnamed, tensors, strict=True))
        return {name: value.detach().cpu().numpy() for name, value in feeds.items()}


def require_onnx(what: str, packages: Sequence[str]) -> None:
    """Raise where a package of the extra ``onnx`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{what} needs {' and '.join(missing)}, not installed here: "
            "pip install compress-torch[onnx]"
        )
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise ExportError(f"{what} needs torch 2.6 or newer, this is {torch.__version__}")


def onnx_program(model: nn.Module, dummy_input: Any, dynamic_batch: bool, **options: Any) -> Any:
    """The ``torch.onnx.ONNXProgram`` of a plain copy of a model."""
    program = export_program(plain_copy(model), dummy_input, dynamic_batch)
    _check_outputs(program, type(model).__name__)
    if dynamic_batch:  # once more: torch takes the axis' name from here
        options["dynamic_shapes"] = batch_axes(dummy_input)
    try:
        # What it warns of are its own parts, and that it uses them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(program, dynamo=True, verbose=False, **options)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX by torch {torch.__version__}: "
            f"{type(error).__name__}: {COLOURS.sub('', str(error))}"
        ) from error


def _loaded(temporary: Path, target: Path) -> OnnxModel:
    """The file under its temporary name; errors have the name that the caller knows."""
    try:
        return OnnxModel(temporary)
    except ExportError as error:
        raise ExportError(str(error).replace(str(temporary), str(target))) from error


def _check_outputs(program: torch.export.ExportedProgram, name: str) -> None:
    """Raise for a number or a string among the outputs, which ONNX does not have; None is none."""
    specs = program.graph_signature.output_specs
    outputs = [spec.arg for spec in specs if spec.kind == OutputKind.USER_OUTPUT]
    problems = [
        f"output {index} of {len(outputs)} is {arg.value!r}"
        for index, arg in enumerate(outputs)
        if isinstance(arg, ConstantArgument) and arg.value is not None
    ]
    if problems:
        raise ExportError(
            f"{name} cannot be written as ONNX, which has tensors only: {', '.join(problems)}; "
            "return a tensor, or leave it out"
        )


def _write(model: Any, target: Path, accept: Callable[[Path], None]) -> tuple[Path, ...]:
    """Save an ONNX model, whole or not at all; ``accept`` may raise before it takes its place."""
    import onnx_ir

    values = model.graph.initializers.values()
    large = sum(each.const_value.nbytes for each in values) > ONE_FILE_BYTES
    # A file of the same name stays valid until the new one takes its place: the weights of each
    # have a name of their own.
    weights = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data") if large else None
    before = _weights_of(target)

    def write(temporary: Path) -> None:
        onnx_ir.save(model, temporary, external_data=weights.name if weights else None)
        accept(temporary)

    try:
        write_atomically(target, write)
    except BaseException:
        if weights is not None:
            weights.unlink(missing_ok=True)
        raise
    for old in before:
        old.unlink(missing_ok=True)
    return (target, weights) if weights else (target,)


def _weights_of(target: Path) -> list[Path]:
    """The files of weights that `_write` made beside a file of this name."""
    if not target.parent.is_dir():
        return []
    made = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    return [path for path in target.parent.iterdir() if made.fullmatch(path.name)]
