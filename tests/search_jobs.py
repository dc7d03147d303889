"""What searches in tests are made of, at the top level of a module, so that workers can load it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

INPUTS = torch.linspace(-1, 1, 12 * 36).reshape(12, 1, 6, 6).sin()
CONFIG = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


def pool(workers: int, trains: bool = False) -> ProcessPoolExecutor:
    """Forks begin at once, but none may train whose parent has, nor any where that uses cuda."""
    clean = trains or torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if clean else "fork")
    if clean:
        context.set_forkserver_preload(["compress.search", "torch"])
    return ProcessPoolExecutor(workers, mp_context=context)


def network() -> nn.Sequential:
    """Two convolutions of unlike worth, and BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


WANTED = network()(INPUTS).detach()


def evaluate(model: nn.Module) -> float:
    """Minus the error beside the dense network."""
    return -(model(INPUTS) - WANTED).square().mean().item()


def tune(model: nn.Module, draw: Callable[[], float] = random.random) -> None:
    """Trains a little, and draws of torch, numpy and Python."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01 * draw())
    for _ in range(2):
        noise = torch.rand(INPUTS.shape) + float(np.random.rand())
        optimizer.zero_grad()
        (model(INPUTS + 0.1 * noise) - WANTED).square().mean().backward()
        optimizer.step()


def tune_without_python(model: nn.Module) -> None:
    """Without Python's random numbers, of which the threads of a cluster's worker draw, too."""
    tune(model, np.random.rand)


def channels(model: nn.Module) -> int:
    return next(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


class KillsWorkers:
    """Scores, but kills its process at the first candidate that it meets, ``times`` times.

    Not in the process that made it, and not with the dense model.
    """

    def __init__(self, folder: Path, times: int, how: str = "exit") -> None:
        self.folder, self.times, self.how, self.parent = folder, times, how, os.getpid()

    def __call__(self, model: nn.Module) -> float:
        if os.getpid() != self.parent and channels(model) < 8:
            for number in range(self.times):
                try:
                    (self.folder / f"{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                if self.how == "exit":
                    os._exit(1)
                os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(model)


def fails(model: nn.Module) -> float:
    if channels(model) < 8:
        raise RuntimeError("no such luck")
    return evaluate(model)


class Sleeps:
    """Leaves a file with the number of its process, and stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: nn.Module) -> float:
        if channels(model) < 8:
            (self.folder / str(os.getpid())).touch()
            time.sleep(60)
        return evaluate(model)
