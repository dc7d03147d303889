"""What ``compress export`` writes: a file of another runtime, and how far off it is."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import ConfigError, ExportError
from compress.evaluator import Evaluator
from compress.export import OnnxModel, Runtime, quantize_onnx, save_exported, to_exported, to_onnx
from compress.export.onnx_file import ONNX_PACKAGES, require_onnx
from compress.export.parity import parity
from compress.export.runtimes import RUNTIMES

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}


@dataclass(frozen=True)
class Exported:
    """The files that were written, how far off they are, and the first one as ``runtime``."""

    format: str
    runtime_name: str
    files: tuple[Path, ...]
    relative_error: float
    absolute_error: float
    runtime: nn.Module

    @property
    def megabytes(self) -> float:
        """Of all files, 10**6 bytes."""
        return sum(file.stat().st_size for file in self.files) / 1e6


def check_options(target: Path, int8: bool, runtimes: list[str]) -> None:
    """Raise for what cannot be written or timed, before anything is loaded."""
    if unknown := [name for name in runtimes if name not in RUNTIMES]:
        raise ConfigError(
            f"--runtimes: got {', '.join(unknown)}; expected some of {', '.join(RUNTIMES)}"
        )
    if target.suffix not in FORMATS:
        raise ConfigError(f"--to: got {target}; expected a file .onnx, or .pt2 for torch.export")
    if int8 and target.suffix != ".onnx":
        raise ConfigError(f"--int8: it is for ONNX, got --to {target}; expected a file .onnx")
    if target.suffix == ".onnx":
        require_onnx(f"--to {target}", ONNX_PACKAGES)


def write_float(model: nn.Module, dummy_input: Any, target: Path, dynamic_batch: bool) -> Exported:
    """ONNX or torch.export, by the suffix of ``target``; held against the model before it is there.

    Raises:
        ExportError: it cannot be exported, or computes something else.
    """
    if target.suffix == ".onnx":
        report = to_onnx(model, dummy_input, target, dynamic_batch=dynamic_batch)
        found = report.parity
        assert found is not None
        errors = found.relative_error, found.absolute_error
        return Exported("ONNX", "onnxruntime", report.files, *errors, OnnxModel(target))
    program = to_exported(model, dummy_input, dynamic_batch=dynamic_batch)
    save_exported(program, target)
    runtime = Runtime(torch.export.load(target).module().__call__)
    found = parity(runtime, model, dummy_input)
    errors = found.relative_error, found.absolute_error
    return Exported("torch.export", "torch.export", (target,), *errors, runtime)


def write_int8(
    model: nn.Module,
    dummy_input: Any,
    target: Path,
    dynamic_batch: bool,
    calibration: list[Any] | None,
) -> Exported:
    """ONNX with int8 weights: static with calibration inputs, dynamic without.

    It computes something near the model; how near is told.

    Raises:
        ExportError: the model cannot be exported or quantised.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        to_onnx(model, dummy_input, source, dynamic_batch=dynamic_batch)
        quantize_onnx(source, target, calibration)
    runtime = OnnxModel(target)
    found = parity(runtime, model, dummy_input)
    kind = "dynamic" if calibration is None else f"static, {len(calibration)} calibration batches"
    errors = found.relative_error, found.absolute_error
    return Exported(f"int8 ONNX ({kind})", "int8 onnxruntime", (target,), *errors, runtime)


def calibration_inputs(
    model: nn.Module, evaluator: Evaluator | None, dummy_input: Any, batches: int
) -> list[Any] | None:
    """What the evaluator calls the model with in its first batches, each as ``dummy_input`` is.

    None where it has no data.

    Raises:
        ExportError: it calls the model in another way than ``dummy_input`` says.
    """
    if evaluator is None or evaluator.lacks(model):
        return None
    found: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_like(dummy_input, module, args, kwargs))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        evaluator.measure(model, batches, lambda: None, progress=False)
    finally:
        handle.remove()
    return found


def _like(dummy_input: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments, those that ``dummy_input`` has, in its form; labels are left out."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if isinstance(dummy_input, Mapping):
        if missing := [name for name in dummy_input if name not in bound.arguments]:
            raise ExportError(
                f"evaluator: it calls the model without {', '.join(missing)}, which dummy_input "
                "has; give dummy_input the arguments that the evaluator's batches have"
            )
        return {name: bound.arguments[name] for name in dummy_input}
    wanted = len(dummy_input) if isinstance(dummy_input, tuple) else 1
    if len(bound.args) < wanted:
        raise ExportError(
            f"evaluator: it calls the model with {len(bound.args)} arguments by position and "
            f"{list(bound.kwargs)} by name, dummy_input has {wanted}; give dummy_input by name"
        )
    return bound.args[:wanted] if isinstance(dummy_input, tuple) else bound.args[0]
