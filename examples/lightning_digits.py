"""Prune a LightningModule: its own data, loss, optimizer and Trainer do the work.

    pip install compress-torch[lightning,demo]
    python examples/lightning_digits.py
    python examples/lightning_digits.py --pruner slim

`taylor` only measures: with the module's loss, on its batches. `slim` trains before it prunes, in
the Trainer's loop. They print, each in half a minute on one core::

    dense          1,226,442 parameters    97.78% right
    masked         1,226,442 parameters     9.72% right
    small            201,425 parameters     9.72% right
    fine-tuned       201,425 parameters    97.78% right

    dense          1,226,442 parameters    97.78% right
    masked         1,226,442 parameters    18.89% right
    small            201,425 parameters    18.89% right
    fine-tuned       201,425 parameters   100.00% right
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as lightning
import torch
from _data import digits
from _train import accuracy, loaders, parser, resnet8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from compress import ModelSpeedup, SlimPruner, TaylorFOWeightFilterPruner
from compress.adapters import LightningEvaluator


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet8()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, nesterov=True)


class Digits(lightning.LightningDataModule):
    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.train, self.test = loaders(digits(size=8), quick)

    def train_dataloader(self) -> DataLoader:
        return self.train


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    module, data = Classifier(), Digits(args.quick)
    example = torch.zeros(1, 1, 8, 8)

    trainer(args, args.epochs).fit(module, datamodule=data)
    report("dense", module, data)

    options = {"mode": "dependency_aware", "dummy_input": example}
    if args.pruner == "taylor":  # measures
        config_list = [{"sparsity": 0.6, "op_types": ["Conv2d"]}]
        evaluator = LightningEvaluator(module, data)
        pruner = TaylorFOWeightFilterPruner(module, config_list, evaluator, **options)
    else:  # trains, in the Trainer's loop
        config_list = [{"sparsity": 0.6, "op_types": ["BatchNorm2d"]}]
        evaluator = LightningEvaluator(module, data, trainer=trainer(args, 1))
        pruner = SlimPruner(
            module, config_list, evaluator, training_epochs=args.epochs, scale=1e-2, **options
        )
    module, masks = pruner.compress()
    report("masked", module, data)

    module = ModelSpeedup(module, example, masks).speedup_model()
    report("small", module, data)

    trainer(args, args.fine_tuning_epochs).fit(module, datamodule=data)
    report("fine-tuned", module, data)


def trainer(args: argparse.Namespace, epochs: int) -> lightning.Trainer:
    """Between two trainings the module is on the CPU, where the Trainer leaves it."""
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if args.device.startswith("cuda") else args.device,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def report(name: str, module: Classifier, data: Digits) -> None:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    right = accuracy(module, data.test)
    module.train()  # a Trainer goes on in the mode that it finds
    print(f"{name:12}{parameters:>12,} parameters{right:>10.2%} right", flush=True)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=4, fine_tuning=2)
    options.add_argument("--pruner", choices=["taylor", "slim"], default="taylor")
    return options.parse_args()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    main()
