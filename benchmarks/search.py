"""What searches find, whether a latency is met, and what a search costs by itself.

    python benchmarks/search.py                    # all, about half an hour
    python benchmarks/search.py --only planted --seeds 3

  planted   digits, a network in which three of six layers have four times the filters that they
            need: each search beside the same sparsity everywhere, at equal FLOPs, without any
            training after; 10 seeds, paired
  latency   ResNet-18 and MobileNetV2 on digits of 32×32: half the measured time on this CPU, and
            beside it the same sparsity everywhere that is as fast; both fine-tuned alike
  overhead  the part of a search's time that is not the user's training and evaluating

A search sees a part of the training images for its evaluations; accuracies in the tables are of
test images that it never sees.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import torch
from parts import paired, table
from torch import Tensor, nn
from torch.nn import functional as F

from compress import (
    AMCPruner,
    L1FilterPruner,
    ModelSpeedup,
    NetAdaptPruner,
    OptunaPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
)
from compress.measure import summarize
from compress.search import SearchPruner

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _data import digits

BATCH = 64
NEEDED = (6, 8, 8, 8, 8, 8)
WIDENED = {1: 32, 4: 32, 5: 32}  # by layer: the filters that it has in the end


class Data:
    """Digits: images to train with, images that a search evaluates with, and test images."""

    def __init__(self, seed: int, size: int = 8, channels: int = 1) -> None:
        found = digits(size)
        images, labels = found.train.tensors  # type: ignore[attr-defined]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images, labels = images[order].expand(-1, channels, -1, -1), labels[order]
        self.train, self.search = (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
        images, labels = found.test.tensors  # type: ignore[attr-defined]
        self.test = images.expand(-1, channels, -1, -1), labels

    def fit(self, model: nn.Module, epochs: int, rate: float) -> None:
        """Adam, with the rate going down to 0 along a cosine."""
        images, labels = self.train
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            schedule.step()
        model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Of a model in eval mode."""
    model.eval()
    with torch.no_grad():
        parts = [model(some).argmax(1) for some in images.split(256)]
    return float((torch.cat(parts) == labels).float().mean())


class Plain(nn.Module):
    """Convolution, norm and ReLU, so often as there are widths; pooled twice; a linear layer."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise((1, *widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if number in (1, 3) else x
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def planted(data: Data, epochs: int, seed: int) -> Plain:
    """A trained network, in which some layers have got filters that hardly do anything."""
    torch.manual_seed(seed)
    small = Plain(NEEDED)
    data.fit(small, epochs, 1e-2)
    wide = Plain([WIDENED.get(number, width) for number, width in enumerate(NEEDED)]).eval()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.mul_(0.02)
        mine = dict(small.state_dict())
        for name, value in wide.state_dict().items():
            if value.dim():
                value[tuple(slice(size) for size in mine[name].shape)] = mine[name]
    return wide


Make = Callable[[nn.Module, Data, float, Tensor, int], SearchPruner]
SINGLE = [{"op_types": ["Conv2d"]}]


def _config(share: float) -> list[dict[str, Any]]:
    return [{**SINGLE[0], "sparsity": share}]


def _scored(data: Data) -> Callable[[nn.Module], float]:
    return lambda model: accuracy(model, *data.search)


def _annealing(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return SimulatedAnnealingPruner(
        model, _config(share), _scored(data), cost="flops", dummy_input=x, seed=seed,
        progress=False,
    )  # fmt: skip


def _random(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return OptunaPruner(
        model, _config(share), _scored(data), cost="flops", dummy_input=x, seed=seed,
        progress=False, n_trials=21, sampler=optuna.samplers.RandomSampler(seed=seed),
    )  # fmt: skip


def _tpe(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return OptunaPruner(
        model, _config(share), _scored(data), cost="flops", dummy_input=x, seed=seed,
        progress=False, n_trials=60,
    )  # fmt: skip


def _netadapt(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return NetAdaptPruner(
        model, _config(share), evaluator=_scored(data), cost="flops", dummy_input=x, seed=seed,
        progress=False,
    )  # fmt: skip


def _sensitivity(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return SensitivityPruner(
        model, _config(share), evaluator=_scored(data), cost="flops", dummy_input=x, seed=seed,
        progress=False,
    )  # fmt: skip


def _amc(model: nn.Module, data: Data, share: float, x: Tensor, seed: int) -> SearchPruner:
    return AMCPruner(
        model, SINGLE, _scored(data), flops_ratio=1 - share, dummy_input=x, seed=seed,
        progress=False, warmup=30, train_episode=90,
    )  # fmt: skip


METHODS: dict[str, Make] = {
    "random search": _random,
    "annealing": _annealing,
    "sensitivity": _sensitivity,
    "NetAdapt": _netadapt,
    "Optuna (TPE)": _tpe,
    "AMC": _amc,
}


def search_planted(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for seed in range(args.seeds):
        data = Data(seed)
        model = planted(data, args.epochs, seed)
        x = data.search[0][:1]
        dense = summarize(model, x).flops
        row: dict[str, Any] = {"seed": seed, "dense": accuracy(model, *data.test), "found": {}}
        for name, make in METHODS.items():
            pruned = copy.deepcopy(model)
            pruner = make(pruned, data, args.share, x, seed)
            _, masks = pruner.compress()
            assert pruner.result is not None, "compress() sets it"
            small = ModelSpeedup(pruned, x, masks, progress=False).speedup_model()
            row["found"][name] = {
                "accuracy": accuracy(small, *data.test),
                "flops": summarize(small, x).flops / dense,
                "evaluations": len(pruner.result.trials),
            }
            if name == "annealing":
                row["uniform"] = _uniform(model, x, pruner.result.trials[0].sparsities, data)
        rows.append(row)
        print(seed, {name: round(found["accuracy"], 3) for name, found in row["found"].items()})
    return rows


def _uniform(
    model: nn.Module, x: Tensor, sparsities: dict[str, float], data: Data
) -> dict[str, Any]:
    """The first trial of every search."""
    share = next(iter(sparsities.values()))
    pruned = copy.deepcopy(model)
    L1FilterPruner(pruned, _config(share), mode="dependency_aware", dummy_input=x).compress()
    small = ModelSpeedup(pruned, x, progress=False).speedup_model()
    flops = summarize(small, x).flops / summarize(model, x).flops
    return {"accuracy": accuracy(small, *data.test), "flops": flops}


def planted_table(rows: list[dict[str, Any]]) -> list[str]:
    uniform = [row["uniform"]["accuracy"] for row in rows]
    flops = statistics.mean(row["uniform"]["flops"] for row in rows)
    lines = [f"the same everywhere | | {flops:.1%} | {statistics.mean(uniform):.2%} | | "]
    for name in rows[0]["found"]:
        found = [row["found"][name] for row in rows]
        means = [statistics.mean(each[key] for each in found) for key in ("flops", "accuracy")]
        evaluations = statistics.mean(each["evaluations"] for each in found)
        gains = [each["accuracy"] - base for each, base in zip(found, uniform, strict=True)]
        lines.append(
            f"{name} | {evaluations:.0f} | {means[0]:.1%} | {means[1]:.2%} | {paired(gains)}"
        )
    ahead = [
        row["found"]["annealing"]["accuracy"] - row["found"]["random search"]["accuracy"]
        for row in rows
    ]
    dense = statistics.mean(row["dense"] for row in rows)
    columns = "search | evaluations | FLOPs left | accuracy | points ahead of uniform | wins"
    return [
        "## Planted redundancy, without training after",
        "",
        f"The dense network has {dense:.2%}.",
        "",
        *table(columns, lines),
        f"Annealing beside random search, with as many evaluations: {paired(ahead)}.",
        "",
    ]
