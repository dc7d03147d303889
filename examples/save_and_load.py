"""Prune twice, save the small model, and load it in a program that knows only its class.

    pip install compress-torch[demo]
    python examples/save_and_load.py
    python examples/save_and_load.py --file small.safetensors

The first command prints, in half a minute on one core::

    dense         epoch 5/5  loss 0.003  test accuracy 98.33%   18.1 s
    pruned 1      epoch 2/2  loss 0.061  test accuracy 97.22%    2.6 s
    pruned 2      epoch 2/2  loss 0.115  test accuracy 96.67%    1.4 s

    saved 165,220 of 1,226,442 parameters: 0.69 MB
    loaded: test accuracy 96.67%, bit for bit the same: True
    made of a ResNet by 2 speedups; it says: 96.67%
    plain safetensors, too: conv1.weight (24, 1, 3, 3)
    a wrong class: …/small.safetensors does not fit the ResNet that was built (it is of a ResNet):
      fc.weight: it is of shape (7, 256), expected (10, 256)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _data import digits
from _train import accuracy, fit, loaders, parser, resnet8
from safetensors.torch import load_file

import compress
from compress import L1FilterPruner, ModelSpeedup
from compress.checkpoint import read_recipe
from compress.errors import CheckpointError


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    train, test = loaders(digits(size=8), args.quick)
    example = torch.zeros(1, 1, 8, 8, device=args.device)
    config_list = [{"sparsity": args.sparsity, "op_types": ["Conv2d"]}]

    model = fit("dense", resnet8().to(args.device), train, test, args.epochs)
    for number in (1, 2):  # what is gone from the first time stays gone
        coupled = {"mode": "dependency_aware", "dummy_input": example}
        model, masks = L1FilterPruner(model, config_list, **coupled).compress()
        model = ModelSpeedup(model, example, masks).speedup_model()
        fit(f"pruned {number}", model, train, test, args.fine_tuning_epochs, lr=0.02)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.file or Path(folder) / "small.safetensors")
        found = {"config_list": config_list, "accuracy": accuracy(model, test)}
        compress.save(model, file, provenance=found)
        size, left = file.stat().st_size / 1e6, parameters(model)
        print(f"\nsaved {left:,} of {parameters(resnet8()):,} parameters: {size:.2f} MB")
        show(file, model, test)


def show(file: Path, model: torch.nn.Module, test: torch.utils.data.DataLoader) -> None:
    """What another program does with the file, and what it is told of a wrong class."""
    images = next(iter(test))[0].to(next(model.parameters()).device)
    loaded = compress.load(resnet8, file).eval().to(images.device)
    same = torch.equal(loaded(images), model.eval()(images))
    print(f"loaded: test accuracy {accuracy(loaded, test):.2%}, bit for bit the same: {same}")

    recipe = read_recipe(file)
    accurate = f"{recipe.provenance['accuracy']:.2%}"
    print(f"made of a {recipe.model} by {len(recipe.plans)} speedups; it says: {accurate}")
    shape = tuple(load_file(file)["conv1.weight"].shape)
    print(f"plain safetensors, too: conv1.weight {shape}")
    try:
        compress.load(lambda: resnet8(classes=7), file)
    except CheckpointError as error:
        print(f"a wrong class: {str(error).replace(str(file.parent), '…')}")


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=5, fine_tuning=2)
    options.add_argument("--file", help="where to save; a folder for now, by default")
    options.add_argument("--sparsity", type=float, default=0.4, help="of filters, each time")
    return options.parse_args()


if __name__ == "__main__":
    main()
