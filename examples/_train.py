"""What the examples share: a small residual network, loaders, a training loop, accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from _data import Images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.models.resnet import BasicBlock, ResNet


def resnet8(channels: int = 1, classes: int = 10) -> nn.Module:
    """torchvision's ResNet with three stages of one block, for images of 8×8: 1.2 M parameters."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, classes)
    return model


def loaders(data: Images, images: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Batches to train with, of the first ``images`` if that is given, and to test with."""
    part = data.train if images is None else Subset(data.train, range(images))
    batch = min(64, len(part))
    return (
        DataLoader(part, batch_size=batch, shuffle=True, drop_last=True),
        DataLoader(data.test, batch_size=256),
    )


def fit(
    name: str,
    model: nn.Module,
    train: DataLoader,
    test: DataLoader,
    epochs: int,
    *,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[], None] | None = None,
) -> nn.Module:
    """Train in place and print a line per epoch.

    SGD with one learning-rate cycle up to ``lr``, or ``optimizer`` as it is. ``before_step`` is
    called between each backward pass and the optimizer's step: for what changes gradients.
    """
    device = next(model.parameters()).device
    cycle = None
    if optimizer is None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = max(1, epochs * len(train))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    start = time.monotonic()
    for epoch in range(1, epochs + 1):
        model.train()
        for inputs, labels in train:
            loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            if before_step is not None:
                before_step()
            optimizer.step()
            if cycle is not None:
                cycle.step()
        print(
            f"{name:12}  epoch {epoch}/{epochs}  loss {loss.item():.3f}  "
            f"test accuracy {accuracy(model, test):.2%}  {time.monotonic() - start:5.1f} s",
            flush=True,
        )
    return model


@torch.no_grad()
def accuracy(model: nn.Module, test: DataLoader) -> float:
    device = next((each.device for each in model.parameters()), None)  # other runtimes have none
    model.eval()
    right = [model(x.to(device)).argmax(1).cpu() == labels for x, labels in test]
    return torch.cat(right).float().mean().item()
