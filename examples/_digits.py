"""What the examples on digits share: a small network, batches, accuracy and training."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _data import digits
from torch import Tensor, nn
from torch.nn import functional as F

from compress import Evaluator
from compress.training import fine_tune


class DigitNet(nn.Module):
    """Three convolutions with norms, a residual stream of 16 channels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Digits:
    """The digits at 8×8: an `Evaluator` to train with, and the accuracy on the test images."""

    def __init__(self, quick: bool) -> None:
        data = digits(size=8)
        images, labels = data.train.tensors  # type: ignore[attr-defined]
        train = torch.utils.data.TensorDataset(images[:256] if quick else images,
                                               labels[:256] if quick else labels)  # fmt: skip
        self.test = data.test.tensors  # type: ignore[attr-defined]
        self.sample = images[:1]
        self.loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
        self.evaluator = Evaluator(self.loader, F.cross_entropy, sgd)

    def accuracy(self, model: nn.Module) -> float:
        """The fraction of the test images that ``model`` tells right."""
        training = model.training
        images, labels = self.test
        with torch.no_grad():
            right = model.eval()(images).argmax(1) == labels
        model.train(training)
        return float(right.float().mean())

    def fit(self, model: nn.Module, epochs: int, evaluator: Evaluator | None = None) -> None:
        """Train under a cosine schedule that begins anew."""
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        used = self.evaluator if evaluator is None else evaluator
        fine_tune(model, used, epochs, schedule=lambda optimizer: cosine(optimizer, epochs))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def parser(description: str | None, epochs: int) -> argparse.ArgumentParser:
    """The options that all have."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--epochs", type=int, default=epochs)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--quick", action="store_true", help="256 images: does it work?")
    return found
