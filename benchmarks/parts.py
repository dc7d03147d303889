"""Benchmarks in parts: each is measured by itself, kept in one JSON file, shown in one page."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import commit, machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """``measure(args)`` gives rows of JSON values; ``show(rows)`` the lines of their table."""

    measure: Callable[[argparse.Namespace], list[dict[str, Any]]]
    show: Callable[[list[dict[str, Any]]], list[str]]


def paired(differences: list[float]) -> str:
    """Mean difference in points of accuracy with its 95 % interval (Student's t), and who wins."""
    mean, n = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    t = {10: 2.262, 5: 2.776, 3: 4.303, 2: 12.706}.get(n, 1.96)
    wins = sum(d > 0 for d in differences)
    ties = sum(d == 0 for d in differences)
    return f"{100 * mean:+.2f} ± {100 * t * error:.2f} | {wins} of {n}, {ties} ties"


def table(columns: str, rows: list[str]) -> list[str]:
    names = [name.strip() for name in columns.split("|")]
    rule = " | ".join(["---", *["---:"] * (len(names) - 1)])
    return [f"| {columns} |", f"| {rule} |", *(f"| {row} |" for row in rows), ""]


def markdown(title: str, parts: Mapping[str, Part], raw: Mapping[str, Any]) -> str:
    """The parts that were measured, each with its conditions."""
    lines = [f"# {title}", ""]
    for name, part in parts.items():
        if name in raw:
            found = raw[name]["conditions"]
            lines += part.show(raw[name]["rows"])
            versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
            lines += [f"One thread of {found['machine']}; {versions}; {found['date']}; with "
                      f"{found['arguments']}.", ""]  # fmt: skip
    lines += ["± is the 95 % interval of the mean paired difference, in points of accuracy."]
    return "\n".join([*lines, ""])


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    versions = {"compress": commit()} | {p: version(p) for p in ("torch", "torchvision")}
    return {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("only", "quick")},
        "machine": machine(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def run(title: str, name: str, parts: Mapping[str, Part], args: argparse.Namespace) -> None:
    """Measure the parts ``args.only``; print them and, unless ``args.quick``, keep them."""
    path = RESULTS / f"{name}.json"
    given = conditions(args)  # of the commit before the results change it
    for part in args.only:
        rows = parts[part].measure(args)
        # Read again, since another process may have measured another part meanwhile.
        raw = json.loads(path.read_text()) if path.exists() and not args.quick else {}
        raw[part] = {"conditions": given, "rows": rows}
        print("\n" + markdown(title, parts, raw))
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(raw, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(title, parts, raw))
