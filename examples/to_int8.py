"""The whole road to int8: train, prune, shrink, fine-tune, export, quantise.

    pip install compress-torch[int8,demo]
    python examples/to_int8.py

The second command prints, among others, in a minute on one core::

    dense         epoch 5/5  loss 0.003  test accuracy 98.33%   20.5 s
    1,226,442 -> 308,074 parameters (25.1% left), largest difference to the masked model 1.1e-07
    fine-tuned    epoch 3/3  loss 0.071  test accuracy 97.50%    4.2 s
    float.onnx: 1.27 MB, opset 20, any batch size
                               accuracy   size MB   latency ms (p10–p90)
     ────────────────────────────────────────────────────────────────────
      dense                      98.33%      4.92      4.18 (1.64–15.04)
      pruned                     97.50%      1.24      0.67 (0.54–12.98)
      ONNX                       97.50%      1.27       0.07 (0.06–0.15)
      ONNX int8, dynamic         97.50%      0.34       0.16 (0.15–0.50)
      ONNX int8, static          97.50%      0.36       0.12 (0.11–0.39)
      torchao int8, compiled     97.50%      0.32       0.62 (0.38–9.07)
    latency: median of 50 passes, batch 1, cpu, 1 thread

A network as small as this one is no faster in int8: the conversions cost what the products save.
Without torchao its row is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from _data import digits
from _train import accuracy, fit, loaders, parser, resnet8
from torch import nn

from compress import L1FilterPruner, ModelSpeedup
from compress.export import OnnxModel, Runtime, quantize_onnx, to_exported, to_onnx
from compress.measure import Latency, Table, latencies, model_size_mb


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = digits(size=8)
    train, test = loaders(data, args.quick)
    example = data.test[0][0].unsqueeze(0).to(args.device)

    model = fit("dense", resnet8().to(args.device), train, test, args.epochs)
    models = {"dense": copy.deepcopy(model)}
    config_list = [{"sparsity": args.sparsity, "op_types": ["Conv2d"]}]
    coupled = {"mode": "dependency_aware", "dummy_input": example}
    model, masks = L1FilterPruner(model, config_list, **coupled).compress()
    speedup = ModelSpeedup(model, example, masks)
    small = speedup.speedup_model()
    print(speedup.report.summary())
    fit("fine-tuned", small, train, test, args.fine_tuning_epochs, lr=0.02)
    example, models["dense"] = example.cpu(), models["dense"].cpu()  # where int8 is run
    models["pruned"] = small.cpu().eval()
    sizes = {name: model_size_mb(each) for name, each in models.items()}
    accuracies = {name: accuracy(each, test) for name, each in models.items()}

    # A few batches of what it was trained on show which range the activations have.
    calibration = [images for images, _ in train][: args.calibration_batches]
    with tempfile.TemporaryDirectory() as folder:
        for name, file in onnx_files(small, example, calibration, Path(folder)).items():
            models[name] = OnnxModel(file)
            sizes[name] = file.stat().st_size / 1e6
            accuracies[name] = accuracy(models[name], test)
    if importlib.util.find_spec("torchao") is None:
        print("torchao int8: not measured, torchao is not installed")
    elif not args.without_torchao:
        quantised = torchao_int8(small, example, calibration)
        name = "torchao int8, compiled"
        sizes[name] = used_mb(quantised)
        accuracies[name] = accuracy(Runtime(quantised.__call__), test)
        # Its int8 kernels come with torch.compile, where that may fold constants.
        torch._inductor.config.freezing = True
        models[name] = Runtime(torch.compile(quantised).__call__)

    print(table(accuracies, sizes, latencies(models, example)))


def onnx_files(
    model: nn.Module, example: torch.Tensor, calibration: list[Any], folder: Path
) -> dict[str, Path]:
    """Float, dynamic int8 (ranges of each run), static int8 (ranges of the calibration)."""
    names = {"ONNX": "float", "ONNX int8, dynamic": "dynamic", "ONNX int8, static": "static"}
    files = {name: folder / f"{file}.onnx" for name, file in names.items()}
    source, dynamic, static = files.values()
    print(to_onnx(model, example, source))
    quantize_onnx(source, dynamic)
    quantize_onnx(source, static, calibration)
    return files


def torchao_int8(model: nn.Module, example: torch.Tensor, calibration: list[Any]) -> nn.Module:
    """Post-training quantisation of the exported program, for the x86 kernels of torch.compile."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    # Its patterns are found in what strict tracing writes: modules that are used twice by name.
    program = to_exported(model, example, strict=True).module()
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for images in calibration:
            prepared(images)
    return convert_pt2e(prepared)


def used_mb(model: nn.Module) -> float:
    """Of the tensors that the graph reads: the float weights are still there beside the int8."""
    used = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if name in used) / 1e6


def table(
    accuracies: dict[str, float], sizes: dict[str, float], times: dict[str, Latency]
) -> Table:
    rows = [
        (name, f"{accuracies[name]:.2%}", f"{sizes[name]:.2f}", str(each))
        for name, each in times.items()
    ]
    columns = ("", "accuracy", "size MB", "latency ms (p10–p90)")
    return Table(columns, tuple(rows), times["dense"].conditions)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=5, fine_tuning=3)
    options.add_argument("--sparsity", type=float, default=0.5, help="of the filters of each layer")
    options.add_argument("--calibration-batches", type=int, default=8)
    options.add_argument("--without-torchao", action="store_true")
    return options.parse_args()


if __name__ == "__main__":
    main()
