"""The whole road on real images: train, mask, shrink, fine-tune, and compare.

    pip install compress-torch[demo]
    python examples/digits_resnet18.py
    python examples/digits_resnet18.py --data cifar10 --data-dir ~/data --epochs 30 --device cuda

The last row of the table is the question to ask of every pruned model: would the small network,
trained from scratch for as many epochs in total, have done as well? The first command prints, in
two minutes on one core::

    dense         epoch 6/6  loss 0.001  test accuracy 97.78%   54.9 s
    fine-tuned    epoch 3/3  loss 0.008  test accuracy 98.06%    9.6 s
    from scratch  epoch 9/9  loss 0.001  test accuracy 99.17%   28.1 s
                     accuracy     parameters       mult-adds   size MB   latency ms (p10–p90)
     ─────────────────────────────────────────────────────────────────────────────────────────
      dense            97.78%        11.17 M        138.57 M     44.73    13.51 (12.93–15.64)
      masked            9.72%        11.17 M        138.57 M     44.73    21.77 (20.58–27.66)
      small             9.72%   1.80 M (16%)   22.66 M (16%)      7.23       2.75 (2.63–3.18)
      fine-tuned       98.06%   1.80 M (16%)   22.66 M (16%)      7.23       2.79 (2.67–3.04)
      from scratch     99.17%   1.80 M (16%)   22.66 M (16%)      7.23       2.84 (2.69–3.42)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import argparse
import copy

import torch
import torchvision
from _data import Images, cifar10, digits, image_folder
from _train import accuracy, comparison, fit, loaders, parser
from torch import nn

from compress import L1FilterPruner, ModelSpeedup


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = images(args)
    train, test = loaders(data, args.quick)
    example = data.test[0][0].unsqueeze(0).to(args.device)
    fine_tuning = (args.epochs + 1) // 2

    model = resnet18(example.shape[1], data.classes).to(args.device)
    fit("dense", model, train, test, args.epochs, lr=0.05)
    models = {"dense": copy.deepcopy(model)}

    config_list = [
        {"sparsity_per_layer": args.sparsity, "op_types": ["Conv2d", "Linear"]},
        {"exclude": True, "op_names": ["fc"]},
    ]
    pruner = L1FilterPruner(model, config_list, mode="dependency_aware", dummy_input=example)
    model, masks = pruner.compress()
    models["masked"] = copy.deepcopy(model)

    small = ModelSpeedup(model, example, masks).speedup_model()
    models["small"] = copy.deepcopy(small)

    models["fine-tuned"] = fit("fine-tuned", small, train, test, fine_tuning, lr=0.02)

    scratch = reinitialised(small)
    epochs = args.epochs + fine_tuning
    models["from scratch"] = fit("from scratch", scratch, train, test, epochs, lr=0.05)

    print(comparison(models, example, lambda each: accuracy(each, test)))


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 for small images: the first convolution neither strides nor pools."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def reinitialised(model: nn.Module) -> nn.Module:
    """A copy of the same widths with new weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def images(args: argparse.Namespace) -> Images:
    if args.data == "digits":
        return digits()
    return {"cifar10": cifar10, "folder": image_folder}[args.data](args.data_dir)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=6)
    options.add_argument("--data", choices=["digits", "cifar10", "folder"], default="digits")
    options.add_argument("--data-dir", default="data", help="where cifar10 or folder data lies")
    options.add_argument("--sparsity", type=float, default=0.6, help="of filters in each layer")
    return options.parse_args()


if __name__ == "__main__":
    main()
