"""Accuracy after pruning and fine-tuning: every pruner, beside Torch-Pruning, over many seeds.

    python benchmarks/accuracy.py                       # make accuracy
    python benchmarks/accuracy.py --pruners L1 Taylor --seeds 20 --jobs 4
    python benchmarks/accuracy.py --report              # only the tables and the plot, again

Each seed has its own split of scikit-learn's digits, its own weights and one dense training; all
methods start from that, and are fine-tuned alike. What was measured is in the JSON file as soon as
it is, and is not measured again: a run that was stopped goes on where it was. ``accuracy_methods``
says what is compared, ``accuracy_report`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import torch
from accuracy_methods import Method, Record, Settings, Trial, all_methods
from accuracy_report import write_report
from provenance import commit, machine

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch-pruning", "torch", "scikit-learn", "numpy")
QUICK = Settings(widths=(10, 20, 40), dense_epochs=1, batch=64, batches_measured=2)

Cell = tuple[str, float]  # a method's name, and the sparsity of its row


class Results:
    """What was measured so far, in memory and in a file."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.made = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "versions": {package: version(package) for package in PACKAGES},
            "machine": machine(),
        }
        self.records: dict[tuple[int, str, float], Record] = {}
        self.different: list[str] = []  # what of the file's is not as it is now
        self._lock = Lock()
        if path.exists():
            self._read()

    def _read(self) -> None:
        stored = json.loads(self.path.read_text())
        for record in stored.pop("records"):
            self.records[record["seed"], record["method"], record["sparsity"]] = record
        self.different = [k for k in ("settings", "versions") if stored[k] != self.made[k]]
        self.made = stored

    def add(self, record: Record) -> None:
        with self._lock:
            self.records[record["seed"], record["method"], record["sparsity"]] = record
            self._write()

    def _write(self) -> None:
        """As a whole, and then in the place of the old one: a stop in between loses nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(self.made, indent=1)[:-2]
        rows = ",\n".join(json.dumps(self.records[key]) for key in sorted(self.records))
        new = self.path.with_suffix(".new")
        new.write_text(f'{head},\n "records": [\n{rows}\n]}}\n')
        new.replace(self.path)


def cells(methods: Iterable[Method], sparsities: Iterable[float]) -> list[Cell]:
    """Every method at every sparsity; the dense model once."""
    return [
        (method.name, sparsity)
        for sparsity in (0.0, *sparsities)
        for method in methods
        if (method.criterion == "Dense") == (sparsity == 0.0)
    ]


def child(seed: int) -> None:
    """Measure the cells that are named on stdin, for one seed; a line of JSON for each."""
    torch.set_num_threads(1)
    wanted = json.load(sys.stdin)
    widths = tuple(wanted["settings"].pop("widths"))
    trial = Trial(Settings(widths=widths, **wanted["settings"]), seed)
    methods = {method.name: method for method in all_methods()}
    for name, sparsity in wanted["cells"]:
        print(json.dumps(trial.run(methods[name], sparsity)), flush=True)


def measure(seed: int, wanted: list[Cell], results: Results) -> str:
    """Measure one seed in a process of its own; the last line of its error, if it failed."""
    command = [sys.executable, __file__, "--child", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process:  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            json.dump({"settings": results.made["settings"], "cells": wanted}, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                record = json.loads(line) | {"commit": commit()}
                results.add(record)
                print(brief(record), flush=True)
        errors.seek(0)
        lines = errors.read().strip().splitlines() or ["no message"]
        return f"seed {seed}: {lines[-1]}" if process.returncode else ""


def measure_missing(args: argparse.Namespace, results: Results) -> list[str]:
    """Measure what was asked for and is not in the results; what failed, a line for each seed."""
    if results.different:
        sys.exit(
            f"{args.json}: its {' and '.join(results.different)} are not those of this run, "
            "which cannot be compared; remove it, or give another file with --json"
        )
    asked = cells(chosen(args.pruners), args.sparsities)
    wanted = {
        seed: [cell for cell in asked if (seed, *cell) not in results.records]
        for seed in range(args.seeds)
    }
    seeds = [seed for seed, some in wanted.items() if some]
    with ThreadPoolExecutor(args.jobs) as pool:
        ended = pool.map(lambda seed: measure(seed, wanted[seed], results), seeds)
        return [failure for failure in ended if failure]


def brief(record: Record) -> str:
    return (
        f"seed {record['seed']:2}  {record['sparsity']:4.0%}  {record['accuracy']:7.2%}  "
        f"{record['mult_adds'] / 1e3:6.0f}k  {record['method']}"
    )


def chosen(names: list[str] | None) -> list[Method]:
    methods = all_methods()
    known = list(dict.fromkeys(method.criterion for method in methods))
    if unknown := sorted(set(names or ()) - set(known)):
        sys.exit(f"no such pruner: {', '.join(unknown)}; there are {', '.join(known)}")
    return [method for method in methods if names is None or method.criterion in names]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    parser.add_argument("--pruners", nargs="+", metavar="NAME", help="criteria and baselines")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.85])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help="raw results; .md and .png lie beside it")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json is None:
        args.json = RESULTS / ("accuracy_quick.json" if args.quick else "accuracy.json")
    return args


def main() -> None:
    args = arguments()
    if args.child is not None:
        child(args.child)
        return
    results = Results(args.json, QUICK if args.quick else Settings())
    failures = [] if args.report else measure_missing(args, results)
    if not results.records:
        sys.exit("\n".join(failures) or f"{args.json}: nothing has been measured")
    write_report(results.made, list(results.records.values()), args.json)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
