"""What schedules gain and what they cost: three measurements.

    python benchmarks/schedules.py                    # all, about a quarter of an hour
    python benchmarks/schedules.py --only overhead

  sparse    AGP beside a small dense network with as many parameters as AGP leaves (Zhu & Gupta
            2017, section 4): digits, 10 seeds, the same epochs, paired by seed
  rounds    channels gone in rounds with distillation, beside all at once and plain fine-tuning, to
            the same channels in each layer and so the same FLOPs, with as many epochs after
  overhead  a training step of ResNet-18, batch 64, with masks on all its weights, beside one
            without; and the time of one change of the masks

Accuracies are of the 360 digits that no training sees, after the last epoch: nothing is chosen by
them.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from parts import Part, paired, run, table
from torch import Tensor, nn
from torch.nn import functional as F

from compress import AGPPruner, Evaluator, IterativePruner
from compress.measure import summarize
from compress.training import Distillation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _data import digits

BATCH = 64


class Digits(nn.Module):
    """conv-norm-relu three times, pooled, and a linear layer; ``width`` need not be whole."""

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = (1, *(max(1, round(share * width)) for share in (1, 2, 2)))
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class Data:
    """The digits in memory, in batches of a random order of their own."""

    def __init__(self, seed: int) -> None:
        loaded = digits(size=8)
        self.images, self.labels = loaded.train.tensors  # type: ignore[attr-defined]
        self.test = loaded.test.tensors  # type: ignore[attr-defined]
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.labels), generator=self.generator)
        return ((self.images[part], self.labels[part]) for part in order.split(BATCH))

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / BATCH)

    def accuracy(self, model: nn.Module) -> float:
        """The fraction of the test images that are told right."""
        images, labels = self.test
        model.eval()
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).float().mean())


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    *,
    rate: float = 0.1,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    each: Callable[[int], None] = lambda epoch: None,
) -> None:
    """SGD with momentum under a cosine schedule; ``each`` is called before every epoch."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    loss = loss or Evaluator(criterion=F.cross_entropy).loss
    for epoch in range(epochs):
        each(epoch)
        model.train()
        for batch in data:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        scheduler.step()


# --- large and sparse beside small and dense


def left(model: nn.Module, masks: Any = None) -> int:
    """Parameters that are not masked."""
    gone = sum(int((~mask).sum()) for mask in masks.flat().values()) if masks else 0
    return sum(parameter.numel() for parameter in model.parameters()) - gone


def width_for(parameters: int) -> float:
    """The width of the smallest dense network that has at least so many parameters."""
    return next(w / 50 for w in range(25, 5000) if left(Digits(w / 50)) >= parameters)


def sparse(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for sparsity in (0.8, 0.9, 0.95):
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            large, data = Digits(args.width), Data(seed)
            config = [
                {"total_sparsity": sparsity, "end_epoch": args.epochs * 2 // 3,
                 "op_types": ["Conv2d", "Linear"]},
            ]  # fmt: skip
            pruner = AGPPruner(large, config, pruning_params={"mode": "global"})
            train(large, data, args.epochs, each=pruner.update_epoch)
            kept = left(large, pruner.masks)
            torch.manual_seed(seed)
            small, own = Digits(width_for(kept)), Data(seed)
            train(small, own, args.epochs)
            row = {
                "sparsity": sparsity, "seed": seed, "large_sparse": data.accuracy(large),
                "small_dense": own.accuracy(small), "parameters_sparse": kept,
                "parameters_dense": left(small),
            }  # fmt: skip
            found.append(row)
            print(row, flush=True)
    return found


# --- rounds with distillation beside all at once


def rounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    x = torch.rand(1, 1, 8, 8)
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        dense, data = Digits(args.width), Data(seed)
        train(dense, data, args.epochs)
        row: dict[str, Any] = {"seed": seed, "dense": data.accuracy(dense)}
        row["dense_mult_adds"] = summarize(dense, x).mult_adds
        for name, count in (("one_shot", 1), ("rounds", args.rounds)):
            torch.manual_seed(seed)
            model, own = copy.deepcopy(dense), Data(seed)
            plain = Evaluator(criterion=F.cross_entropy)
            loss = plain.loss if count == 1 else Distillation(dense, plain)
            pruner = IterativePruner(
                model, [{"sparsity": args.channels, "op_types": ["Conv2d"]}], None, "l1",
                total_iteration=count, speedup=True, dummy_input=x,
                pruning_params={"mode": "dependency_aware"},
            )  # fmt: skip
            for number in pruner.rounds():
                # Little between the rounds, what is left of the epochs after the last.
                short = args.epochs // 10
                epochs = short if number < count else args.epochs - short * (count - 1)
                train(model, own, epochs, rate=0.05, loss=loss)
            row[name], row[f"{name}_mult_adds"] = own.accuracy(model), summarize(model, x).mult_adds
        found.append(row)
        print(row, flush=True)
    return found


# --- what masks cost


def overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU seconds of a training step for each size of the images."""
    found = []
    for size in args.sizes:
        found.append(_overhead(size, args.steps))
        print(found[-1], flush=True)
    return found


def _overhead(size: int, steps: int) -> dict[str, Any]:
    """The two models by turns, so that what else runs meets them alike."""
    torch.manual_seed(0)
    x, labels = torch.rand(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    models, steppers = {}, {}
    for name in ("plain", "masked"):
        torch.manual_seed(0)
        models[name] = torchvision.models.resnet18(num_classes=10)
        steppers[name] = _stepper(models[name], x, labels)
    entry = {"initial_sparsity": 0.5, "final_sparsity": 0.9, "end_epoch": 9}
    pruner = AGPPruner(models["masked"], [{**entry, "op_types": ["default"]}])
    changes = [_seconds(lambda epoch=epoch: pruner.update_epoch(epoch)) for epoch in range(4)]
    seconds: dict[str, list[float]] = {"plain": [], "masked": []}
    for turn in range(steps + 1):
        for name in ("plain", "masked") if turn % 2 else ("masked", "plain"):
            taken = _seconds(steppers[name])
            if turn:  # the first warms up
                seconds[name].append(taken)
    return {"image": size, "change_s": changes, **{f"{n}_s": s for n, s in seconds.items()}}


def _stepper(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def _seconds(call: Callable[[], None]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


# --- the tables


def sparse_table(raw: list[dict[str, Any]]) -> list[str]:
    rows = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in raw):
        found = [row for row in raw if row["sparsity"] == sparsity]
        keys = ("large_sparse", "small_dense", "parameters_sparse", "parameters_dense")
        means = [statistics.mean(row[key] for row in found) for key in keys]
        difference = paired([row["large_sparse"] - row["small_dense"] for row in found])
        rows.append(
            f"{sparsity:.0%} | {means[2]:,.0f} | {means[3]:,.0f} | {means[0]:.2%} | "
            f"{means[1]:.2%} | {difference}"
        )
    columns = "sparsity | parameters left | of the dense | sparse | dense | points | sparse wins"
    return ["## Large and sparse (AGP) beside small and dense", "", *table(columns, rows)]


def rounds_table(raw: list[dict[str, Any]]) -> list[str]:
    shares = [
        statistics.mean(row[f"{name}_mult_adds"] / row["dense_mult_adds"] for row in raw)
        for name in ("one_shot", "rounds")
    ]
    means = [statistics.mean(row[name] for row in raw) for name in ("dense", "one_shot", "rounds")]
    cells = [*(f"{mean:.2%}" for mean in means), f"{shares[0]:.1%}, {shares[1]:.1%}"]
    cells.append(paired([row["rounds"] - row["one_shot"] for row in raw]))
    columns = "dense | one-shot | rounds | mult-adds left | points | rounds win"
    heading = "## Rounds with distillation beside all at once"
    return [heading, "", *table(columns, [" | ".join(cells)])]


def overhead_table(raw: list[dict[str, Any]]) -> list[str]:
    rows = []
    for found in raw:
        plain, masked = (statistics.median(found[f"{name}_s"]) for name in ("plain", "masked"))
        change = statistics.median(found["change_s"])
        share = (masked - plain + change / 100) / plain
        rows.append(
            f"{found['image']}×{found['image']} | {plain:.3f} | {masked:.3f} | "
            f"{masked / plain - 1:+.1%} | {change:.2f} | {share:+.1%}"
        )
    columns = "images | plain s | masked s | masks | one change s | with a change in 100 steps"
    heading = "## What masks cost: a step of ResNet-18, batch 64, all weights masked, CPU seconds"
    return [heading, "", *table(columns, rows)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=16, help="of the large network")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--channels", type=float, default=0.75, help="fraction that goes")
    parser.add_argument("--steps", type=int, default=3, help="timed training steps")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224], help="of images")
    parser.add_argument("--quick", action="store_true", help="one seed: does it work?")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    args = arguments()
    if args.quick:
        args.seeds, args.epochs, args.steps, args.sizes, args.width = 2, 2, 1, [32], 4
        args.rounds = 2
    run("Schedules", "schedules", PARTS, args)


PARTS = {
    "sparse": Part(sparse, sparse_table),
    "rounds": Part(rounds, rounds_table),
    "overhead": Part(overhead, overhead_table),
}

if __name__ == "__main__":
    main()
