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
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import torchvision
from parts import Part, paired, run, table
from torch import Tensor, nn
from torch.nn import functional as F

from compress import (
    AMCPruner,
    GlobalPruner,
    L1FilterPruner,
    ModelSpeedup,
    NetAdaptPruner,
    OptunaPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
)
from compress.measure import latencies, summarize
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


# --- a latency


NETWORKS = ("resnet18", "mobilenet_v2")


def search_latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in NETWORKS:
        for seed in range(args.latency_seeds):
            rows.append({"network": name, "seed": seed, **_latency(name, seed, args)})
            print(rows[-1])
    return rows


def _latency(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    data = Data(seed, size=32, channels=3)
    x = data.train[0][:BATCH]
    model = torchvision.models.get_model(name, num_classes=10)
    data.fit(model, args.latency_epochs, 3e-3)
    dense = copy.deepcopy(model)
    begin = time.perf_counter()
    pruner = GlobalPruner(model, dummy_input=x, cost="latency", target=args.target)
    pruner.compress()
    searched = time.perf_counter() - begin
    found = {"found": ModelSpeedup(model, x, progress=False).speedup_model()}
    found["uniform"] = _as_fast(dense, x, args.target)
    times = _times({"dense": dense, **found}, x)
    row: dict[str, Any] = {"dense": _measured(dense, data), "searched_s": searched}
    for key, small in found.items():
        data.fit(small, args.latency_epochs, 1e-3)
        row[key] = _measured(small, data)
    for key, (ms, share) in times.items():
        row[key] |= {"ms": ms, "share": share}
    return row


def _times(models: dict[str, nn.Module], x: Tensor) -> dict[str, tuple[float, float]]:
    """Median milliseconds, and the median over turns of the share of the dense model's time."""
    times = latencies(models, x, repeats=90, in_turn=3)
    turns = {
        name: np.median(np.reshape(each.samples_ms, (-1, 3)), axis=1)
        for name, each in times.items()
    }
    return {
        name: (each.median_ms, float(np.median(turns[name] / turns["dense"])))
        for name, each in times.items()
    }


def _measured(model: nn.Module, data: Data) -> dict[str, Any]:
    summary = summarize(model, data.test[0][:1])
    return {"accuracy": accuracy(model, *data.test), "flops": summary.flops,
            "parameters": summary.parameters_total}  # fmt: skip


def _as_fast(dense: nn.Module, x: Tensor, target: float) -> nn.Module:
    """L1 with the same sparsity everywhere, with which the model meets the target best."""
    low, high = 0.0, 0.95
    best: tuple[float, nn.Module] | None = None
    for _ in range(7):
        share = (low + high) / 2
        small = copy.deepcopy(dense)
        L1FilterPruner(small, _config(share), mode="dependency_aware", dummy_input=x).compress()
        ModelSpeedup(small, x, progress=False).speedup_model()
        _, ratio = _times({"dense": dense, "small": small}, x)["small"]
        if best is None or abs(ratio - target) < best[0]:
            best = abs(ratio - target), small
        low, high = (share, high) if ratio > target else (low, share)
    assert best is not None, "there were tries"
    return best[1]


def latency_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        for key in ("dense", "found", "uniform"):
            means = {
                what: statistics.mean(row[key][what] for row in mine)
                for what in ("accuracy", "flops", "parameters", "ms")
            }
            shares = [row[key]["share"] for row in mine]
            lines.append(
                f"{name}, {key} | {means['ms']:.1f} | {min(shares):.1%} to {max(shares):.1%} | "
                f"{means['flops'] / 1e6:.1f} | {means['parameters'] / 1e6:.2f} | "
                f"{means['accuracy']:.2%}"
            )
        gains = [row["found"]["accuracy"] - row["uniform"]["accuracy"] for row in mine]
        seconds = statistics.mean(row["searched_s"] for row in mine)
        lines.append(f"{name}, found - uniform | search {seconds:.0f} s | | | | {paired(gains)}")
    columns = "model | ms | of dense | MFLOPs of one image | parameters M | accuracy"
    return [
        f"## A latency: batches of {BATCH} on this CPU, one thread",
        "",
        "found: GlobalPruner(cost=latency); uniform: L1, the same sparsity everywhere, as fast.",
        "Measured again after both were found, in turn: the median of the turns' shares, per seed.",
        "",
        *table(columns, lines),
    ]


# --- what a search costs by itself


def search_overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    data = Data(0, size=32, channels=3)
    everything = tuple(torch.cat(parts) for parts in zip(data.train, data.search, strict=True))
    rows = []
    for name in NETWORKS:
        for kind, images, trains, given in (
            (SimulatedAnnealingPruner, data.search, False, {}),
            (SimulatedAnnealingPruner, everything, False, {}),
            (SimulatedAnnealingPruner, data.search, True, {}),
            (NetAdaptPruner, data.search, True, {"sparsity_per_iteration": 0.1}),
        ):
            torch.manual_seed(0)
            model = torchvision.models.get_model(name, num_classes=10)
            user = _User(images, data.train)
            if trains:
                given = {**given, "fine_tuner": user.tune}
            begin = time.perf_counter()
            pruner = kind(model, _config(0.3), evaluator=user.evaluate, cost="flops",
                          dummy_input=data.train[0][:1], progress=False, **given)  # fmt: skip
            pruner.compress()
            whole = time.perf_counter() - begin
            assert pruner.result is not None, "compress() sets it"
            rows.append({"network": name, "search": kind.__name__, "whole_s": whole,
                         "user_s": user.seconds, "trains": trains, "images": len(images[0]),
                         "candidates": len(pruner.result.trials)})  # fmt: skip
            print(rows[-1])
    return rows


class _User:
    """What the user's functions of a search take."""

    def __init__(self, images: Any, train: Any) -> None:
        self.images, self.train, self.seconds = images, train, 0.0

    def evaluate(self, model: nn.Module) -> float:
        begin = time.perf_counter()
        found = accuracy(model, *self.images)
        self.seconds += time.perf_counter() - begin
        return found

    def tune(self, model: nn.Module) -> None:
        """Ten steps."""
        begin = time.perf_counter()
        images, labels = self.train
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        model.train()
        for batch in torch.randperm(len(images))[: 10 * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        self.seconds += time.perf_counter() - begin


def overhead_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{row['search']} | {row['network']} | {row['images']} | "
        f"{'10 steps' if row['trains'] else 'none'} | {row['candidates']} | "
        f"{row['user_s'] / row['candidates']:.2f} | {row['whole_s']:.1f} | "
        f"{row['whole_s'] - row['user_s']:.1f} | {1 - row['user_s'] / row['whole_s']:.1%}"
        for row in rows
    ]
    columns = (
        "search | model | images evaluated | training | candidates | the user's s for each | "
        "seconds | of its own | share"
    )
    return ["## What a search costs besides training and evaluating", "", *table(columns, lines)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15, help="of the planted network")
    parser.add_argument("--share", type=float, default=0.5, help="of its FLOPs that goes")
    parser.add_argument("--target", type=float, default=0.5, help="of the dense latency")
    parser.add_argument("--latency-seeds", type=int, default=3)
    parser.add_argument("--latency-epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one seed: does it work?")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # "masks nothing of fc", the output, for each of thousands of candidates
    warnings.filterwarnings("ignore", message="the pruner masks nothing")
    args = arguments()
    if args.quick:
        args.seeds, args.epochs, args.latency_seeds, args.latency_epochs = 2, 2, 1, 1
    run("Searches", "search", PARTS, args)


PARTS = {
    "planted": Part(search_planted, planted_table),
    "latency": Part(search_latency, latency_table),
    "overhead": Part(search_overhead, overhead_table),
}

if __name__ == "__main__":
    main()
