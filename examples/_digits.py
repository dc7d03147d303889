"""What the examples on 8×8 digits share that train with an Evaluator."""

from __future__ import annotations

from typing import Any

import torch
from _data import digits
from _train import QUICK, accuracy, train_with
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress import Evaluator


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
    """An `Evaluator` to train with, and the accuracy on the test images.

    ``images`` and ``labels`` are those to train with, ``sample`` is one image, on the device.
    """

    def __init__(self, quick: bool, device: str) -> None:
        data = digits(size=8)
        self.images, self.labels = (
            each[:QUICK] if quick else each
            for each in data.train.tensors  # type: ignore[attr-defined]
        )
        self.sample = self.images[:1].to(device)
        train = TensorDataset(self.images, self.labels)
        self.loader = DataLoader(train, batch_size=64, shuffle=True)
        self.test = DataLoader(data.test, batch_size=256)
        self.evaluator = Evaluator(self.loader, F.cross_entropy, sgd)

    def accuracy(self, model: nn.Module) -> float:
        """The fraction of the test images that ``model`` tells right."""
        return accuracy(model, self.test)

    def fit(self, model: nn.Module, epochs: int, evaluator: Evaluator | None = None) -> None:
        """Train with this evaluator, or with another."""
        train_with(self.evaluator if evaluator is None else evaluator, model, epochs)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
