"""The zoo's results as a table: what one model's record says, and all of them together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

EXACT = {torch.float32: 1e-5, torch.float64: 1e-9}

Record = dict[str, Any]

COLUMNS = (
    *("model", "ended", "error", "M parameters", "left", "s", "forward s", "train"),
    *("coupled: error", "left", "s", "peak MB", "masks s", "masked units gone"),
    *("Torch-Pruning s", "times faster"),
)


def exact(found: Record) -> bool:
    return "error" in found and error_of(found) is not None


def error_of(found: Record) -> float | None:
    """The error where it is small enough to be rounding."""
    error, rounding = found.get("error"), found.get("rounding")
    if isinstance(error, float) and isinstance(rounding, float) and error <= 3 * rounding:
        return error
    for key, dtype in (("error", torch.float32), ("error64", torch.float64)):
        error = found.get(key)
        if isinstance(error, float) and error <= EXACT[dtype]:
            return error
    return None


def shrunk(found: Record) -> bool:
    return bool(found.get("left", 1.0) < 1.0)


def ended(record: Record, mode: str) -> bool:
    return "units" in record.get(mode, {})


def error_cell(found: Record) -> str:
    if "error" not in found:
        return "–"
    cells = []
    for key in ("error", "error64"):
        if key in found:
            value = found[key]
            cells.append(f"{value:.0e}" if isinstance(value, float) else str(value)[:60])
    text = ", float64: ".join(cells)
    if isinstance(found.get("rounding"), float):
        text += f" (a last bit in the weights: {found['rounding']:.0e})"
    if found.get("blind"):
        text += f" ({found['blind']})"
    return text if exact(found) else f"**{text}**"


def row(name: str, record: Record) -> list[str]:
    normal, coupled = record.get("normal", {}), record.get("dependency_aware", {})
    masked, _, gone = coupled.get("units", (0, 0, 0))
    train = normal.get("trains")
    before = record.get("trains_before")
    same = "yes" if train is True else "–" if train is None else f"**{train}**"
    refused = any("refused" in found for found in (normal, coupled))
    fine = "**check refuses**" if refused else "yes"
    return [
        name,
        fine if "failed" not in record else f"**{record['stage']}: {record['failed'][:80]}**",
        error_cell(normal),
        f"{record.get('parameters', 0) / 1e6:.2f}",
        percent(normal.get("left")),
        seconds(normal.get("s")),
        seconds(record.get("forward_s")),
        same if before is True else f"not before either ({str(before)[:40]})",
        error_cell(coupled),
        percent(coupled.get("left")),
        seconds(coupled.get("s")),
        "–" if "peak_mb" not in coupled else f"{coupled['peak_mb']:.0f}",
        seconds(coupled.get("masks_s")),
        f"{gone} of {masked}" if masked else "**0**",
        *peer_cells(record),
    ]


def peer_cells(record: Record) -> tuple[str, str]:
    peer, times = record.get("peer"), times_faster(record)
    if peer is None:
        return "–", "–"
    if times is None:
        return str(peer.get("failed", "–"))[:50], "–"
    return f"{peer['s']:.2g}", f"{times:.1f}" if times >= 1 else f"**{times:.1f}**"


def times_faster(record: Record) -> float | None:
    """Torch-Pruning's seconds over ours; None where one of them has no result."""
    peer, ours = record.get("peer", {}), record.get("dependency_aware", {}).get("s")
    return None if ours is None or "failed" in peer or "s" not in peer else peer["s"] / ours


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}" if value < 1 else f"**{value:.0%}**"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value < 10 else f"**{value:.0f}**"


def summary(records: Mapping[str, Record], groups: Mapping[str, str]) -> list[str]:
    lines = []
    for group in dict.fromkeys(groups[name] for name in records):
        mine = [r for name, r in records.items() if groups[name] == group]
        for mode in ("normal", "dependency_aware"):
            found = [r.get(mode, {}) for r in mine]
            done = sum(ended(r, mode) for r in mine)
            lines.append(
                f"- {group}, {mode}: of {len(mine)}, {done} ended, {sum(map(exact, found))} exact, "
                f"{sum(map(shrunk, found))} shrunk, "
                f"{sum(f.get('trains') is True for f in found)} train after"
            )
        ratios = [times for r in mine if (times := times_faster(r)) is not None]
        if ratios:
            lines.append(
                f"- {group}, Torch-Pruning: {len(ratios)} of {len(mine)} run; compress is "
                f"{statistics.geometric_mean(ratios):.1f} times faster in the geometric mean, "
                f"{min(ratios):.1f} times on the worst for us"
            )
    return lines


def markdown(records: Mapping[str, Record], groups: Mapping[str, str]) -> str:
    rule = ["---"] + ["---:"] * (len(COLUMNS) - 1)
    rows = [row(name, record) for name, record in records.items()]
    cells = [[cell.replace("|", "/") for cell in each] for each in (COLUMNS, rule, *rows)]
    lines = [f"| {' | '.join(each)} |" for each in cells]
    return "\n".join([*summary(records, groups), "", *lines, ""])


def brief(name: str, record: Record) -> str:
    return " | ".join(row(name, record))


def keep(records: Record, groups: Mapping[str, str], path: Path) -> None:
    """Add to what earlier runs found, as JSON and as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    merged = {**before, **records}
    merged = {name: merged[name] for name in groups if name in merged}
    lines = (f"{json.dumps(name)}: {json.dumps(merged[name])}" for name in merged)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line for each model
    path.with_suffix(".md").write_text(markdown(merged, groups))
