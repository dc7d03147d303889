"""Runs a search in processes that are killed at random moments: kill_search.py DIR KILLS.

Prints how often, and fails where a search that was killed ends with other candidates, another
result or other masks than a whole one, or evaluates again what was done.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kill_at_random import finish
from search_jobs import CONFIG, evaluate, network, tune

from compress import Masks
from compress.search import SimulatedAnnealingPruner
from compress.search.journal import NAME


def search(folder: Path, trains: bool = True) -> None:
    _, masks = SimulatedAnnealingPruner(
        network(), CONFIG, evaluate, fine_tuner=tune if trains else None, cool_down_rate=0.7,
        candidates=3, experiment_data_dir=folder,
    ).compress()  # fmt: skip
    masks.save(folder / "masks.safetensors")


def start(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            search(folder)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return child


def outcome(folder: Path) -> list[Any]:
    """All that a search leaves but the times."""
    with open(folder / "search_history.csv", newline="") as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    masks = Masks.load(folder / "masks.safetensors").flat()
    return [
        rows,
        json.loads((folder / "search_result.json").read_text()),
        {name: mask.tolist() for name, mask in masks.items()},
    ]


def done(folder: Path) -> int:
    path = folder / NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(folder: Path, kills: int) -> None:
    # Here, so that the children find everything imported; only they may train, being forks.
    search(folder / "untrained", trains=False)
    assert finish(start(folder / "whole"))
    wanted, lines = outcome(folder / "whole"), done(folder / "whole")
    begun = time.monotonic()
    assert finish(start(folder / "run0"))
    duration = time.monotonic() - begun
    moments = random.Random(0)
    killed, runs, before = 0, 1, 0
    while killed < kills:
        child = start(folder / f"run{runs}")
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if finish(child):
            assert outcome(folder / f"run{runs}") == wanted, f"run {runs} differs"
            assert done(folder / f"run{runs}") == lines, f"run {runs} did something twice"
            runs, before = runs + 1, 0
        else:
            killed += 1
            assert done(folder / f"run{runs}") >= before, f"run {runs} lost something"
            before = done(folder / f"run{runs}")
    assert finish(start(folder / f"run{runs}"))
    assert outcome(folder / f"run{runs}") == wanted, f"run {runs} differs"
    sys.stdout.write(f"killed {killed} times, in {runs} searches\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no other threads
    main(Path(sys.argv[1]), int(sys.argv[2]))
