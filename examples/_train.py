"""What the examples share: options, a small residual network, loaders, training, accuracy."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from _data import Images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.models.resnet import BasicBlock, ResNet

from compress import Evaluator
from compress.measure import Table, compare, table
from compress.training import fine_tune

QUICK = 128  # images, sentences, …: enough to see that an example runs


def parser(
    description: str | None, epochs: int, fine_tuning: int | None = None
) -> argparse.ArgumentParser:
    """The options that all examples have; ``description`` is an example's docstring."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--epochs", type=int, default=epochs, help="to train for")
    if fine_tuning is not None:
        found.add_argument(
            "--fine-tuning-epochs", type=int, default=fine_tuning, help="after the pruning"
        )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--quick", action="store_true", help="little data: does it run?")
    return found


def resnet8(channels: int = 1, classes: int = 10) -> nn.Module:
    """torchvision's ResNet with three stages of one block, for images of 8×8: 1.2 M parameters."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, classes)
    return model


def loaders(data: Images, quick: bool = False) -> tuple[DataLoader, DataLoader]:
    """Batches to train with, of the first images only if it shall be quick, and to test with."""
    part = Subset(data.train, range(min(QUICK, len(data.train)))) if quick else data.train
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
    """Train in place by one learning-rate cycle up to ``lr``, and print a line per epoch.

    With SGD, or with ``optimizer``, whose own learning rate is the highest of the cycle then.
    ``before_step`` is called between each backward pass and the optimizer's step: for what changes
    gradients.
    """
    device = next(model.parameters()).device
    if optimizer is None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    highest, steps = optimizer.param_groups[0]["lr"], max(1, epochs * len(train))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps)
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
            cycle.step()
        print(
            f"{name:12}  epoch {epoch}/{epochs}  loss {loss.item():.3f}  "
            f"test accuracy {accuracy(model, test):.2%}  {time.monotonic() - start:5.1f} s",
            flush=True,
        )
    return model


def train_with(evaluator: Evaluator, model: nn.Module, epochs: int) -> None:
    """Train in place by one cycle of the learning rate, up to that of the evaluator's optimizer."""

    def cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        highest = optimizer.param_groups[0]["lr"]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=epochs + 1)

    fine_tune(model, evaluator, epochs, schedule=cycle)


@torch.no_grad()
def accuracy(model: nn.Module, test: DataLoader) -> float:
    device = next((each.device for each in model.parameters()), None)  # other runtimes have none
    training = model.training
    model.eval()
    right = [model(x.to(device)).argmax(1).cpu() == labels for x, labels in test]
    model.train(training)
    return torch.cat(right).float().mean().item()


def comparison(
    models: Mapping[str, nn.Module],
    example: object,
    score: Callable[[nn.Module], float],
    column: str = "accuracy",
    form: str = ".2%",
) -> Table:
    """How good the models are, how large and how fast, side by side."""
    torch.set_num_threads(1)  # latencies on shared cores are steadiest so
    scores = {name: format(score(model), form) for name, model in models.items()}
    return table(compare(models, example), {column: scores})
