"""int8: onnxruntime's post-training quantisation of an ONNX file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compress.errors import ExportError
from compress.export.onnx_file import OnnxModel, require_onnx
from compress.files import write_atomically
from compress.graph.run import as_arguments


def quantize_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    calibration: Iterable[Any] | None = None,
    *,
    per_channel: bool = True,
    **options: Any,
) -> None:
    """Write an ONNX file with int8 weights of an ONNX file with floats.

    With ``calibration`` static: activations are int8, too, in ranges that the calibration inputs
    had; for convolutions. Without dynamic: each run finds its own ranges; for matrix products and
    LSTMs. The result is another function, near the first one: measure how good it is.

    Args:
        source: what `to_onnx` wrote.
        target: the file to write, whole or not at all; may be ``source``.
        calibration: a few dozen inputs or batches, each as ``dummy_input`` of `to_onnx`.
        per_channel: a scale for each channel of a weight, instead of one for each weight.
        options: more for onnxruntime's ``quantize_static`` or ``quantize_dynamic``, such as
            ``nodes_to_exclude=[...]`` or ``reduce_range=True`` (for CPUs without VNNI).

    Errors: ``ExportError`` where packages are missing, ``calibration`` is empty or onnxruntime
    cannot do it; ``OSError`` where the file cannot be written.
    """
    require_onnx("quantize_onnx", ("onnx", "onnxruntime"))
    from onnxruntime.quantization import (
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = None if calibration is None else _reader(OnnxModel(source), calibration)

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"  # norms are folded into convolutions
            quant_pre_process(os.fspath(source), prepared, skip_symbolic_shape=True)
            if reader is not None:
                wanted = {"weight_type": QuantType.QInt8, "per_channel": per_channel} | options
                quantize_static(prepared, temporary, reader, **wanted)
            else:
                # onnxruntime's convolutions with ranges of the run take no signed weights.
                wanted = {"weight_type": QuantType.QUInt8, "per_channel": per_channel} | options
                quantize_dynamic(prepared, temporary, **wanted)

    try:
        write_atomically(target, write)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"{source}: onnxruntime cannot quantise it: {type(error).__name__}: {error}"
        ) from error


def _reader(model: OnnxModel, calibration: Iterable[Any]) -> Any:
    """The inputs in turn, as onnxruntime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    def feeds() -> Iterator[dict[str, Any]]:
        for one in calibration:
            yield model.feeds(*as_arguments(one))

    inputs = feeds()
    first = next(inputs, None)
    if first is None:
        raise ExportError("quantize_onnx: calibration is empty; pass at least one input")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.first = first

        def get_next(self) -> dict[str, Any] | None:
            found, self.first = self.first, None
            return next(inputs, None) if found is None else found

    return Reader()
