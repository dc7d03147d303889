"""Runs a pruner in processes that are killed at random moments: kill_at_random.py DIR KILLS.

Prints how often, and fails where a run that was killed ends with another state than a whole one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from compress import IterativePruner, LotteryTicketPruner

MODES = ("masks", "speedup", "lottery")


def prune(state: Path, mode: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    config_list = [{"sparsity": 0.7, "op_names": ["0"]}]
    kind = LotteryTicketPruner if mode == "lottery" else IterativePruner
    pruner = kind(
        model, config_list, optimizer, "l1", total_iteration=4, state=state,
        speedup=mode == "speedup", dummy_input=torch.rand(2, 1, 4, 4),
    )  # fmt: skip
    for _ in pruner.rounds():
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 1, 4, 4)).square().mean().backward()
            optimizer.step()


def start(state: Path, mode: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            prune(state, mode)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return child


def finish(child: int) -> bool:
    """Whether it came to its end; False: it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def main(folder: Path, mode: str, kills: int) -> None:
    prune(folder / "whole", mode)  # here, so that the children find everything imported
    begun = time.monotonic()
    assert finish(start(folder / "run0", mode))
    duration = time.monotonic() - begun
    moments = random.Random(0)
    killed, runs = 0, 1
    while killed < kills:
        child = start(folder / f"run{runs}", mode)
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if finish(child):
            assert same(folder / "whole", folder / f"run{runs}"), f"run {runs} differs"
            runs += 1
        else:
            killed += 1
    assert finish(start(folder / f"run{runs}", mode))
    assert same(folder / "whole", folder / f"run{runs}"), f"run {runs} differs"
    assert sorted(os.listdir(folder)) == sorted(["whole", *(f"run{i}" for i in range(runs + 1))])
    sys.stdout.write(f"{mode}: killed {killed} times\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no other threads
    for mode in MODES:
        own = Path(sys.argv[1]) / mode
        own.mkdir()
        main(own, mode, int(sys.argv[2]))
