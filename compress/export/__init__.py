"""Hand a model on to other runtimes: ONNX, torch.export, torch.compile, int8.

What is exported is a plain copy in eval mode: masks are written in as zeros. Each export is run on
drawn inputs, of several batch sizes, and held against the model before it is handed out.
"""

from compress.export.exported import compiled, save_exported, to_exported
from compress.export.int8 import quantize_onnx
from compress.export.onnx_file import OnnxModel, OnnxReport, to_onnx
from compress.export.parity import Runtime
from compress.export.runtimes import RuntimeComparison, compare_runtimes

__all__ = [
    "OnnxModel",
    "OnnxReport",
    "Runtime",
    "RuntimeComparison",
    "compare_runtimes",
    "compiled",
    "quantize_onnx",
    "save_exported",
    "to_exported",
    "to_onnx",
]
