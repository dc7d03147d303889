"""What a speedup removed, what stayed, and why: data first, a table on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from compress.speedup.decide import Decision
from compress.speedup.knowledge import any_by_row
from compress.speedup.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """One layer's output units (channels, features).

    ``masked`` units have all their weights masked; ``removed`` are gone; ``kept`` maps the reason
    why a masked unit is still there to how many there are.
    """

    layer: str
    units: int
    masked: int
    removed: int
    kept: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The outcome of a speedup.

    ``parameters_before`` and ``parameters_after`` count elements of parameters.
    ``relative_error`` is max |small - masked| / max |masked| on the dummy input; None: not checked.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    relative_error: float | None
    constants_folded: tuple[str, ...] = ()
    constants_carried: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = Table(title="speedup", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("units", "masked", "removed"):
            table.add_column(name, justify="right")
        table.add_column("masked, but kept: why", overflow="fold")
        for layer in self.layers:
            reasons = "; ".join(f"{count}: it {reason}" for reason, count in layer.kept.items())
            numbers = (str(n) for n in (layer.units, layer.masked, layer.removed))
            table.add_row(layer.layer, *numbers, reasons)
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get() + self.summary()

    def summary(self) -> str:
        """Parameters before and after, and how exact the result is, in one line."""
        left = self.parameters_after / max(self.parameters_before, 1)
        checked = (
            "not verified"
            if self.relative_error is None
            else f"largest difference to the masked model {self.relative_error:.1e}"
        )
        return (
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({left:.1%} left), {checked}"
        )


def parameter_counts(model: nn.Module, before: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Elements of a cut model's parameters, with the shapes that they had before, and now."""
    parameters = dict(model.named_parameters())
    had = sum(prod(before[path]) for path in parameters if path in before)
    return had, sum(p.numel() for p in parameters.values())


def make_report(
    decision: Decision,
    plan: Plan,
    masks: Mapping[str, torch.Tensor],
    counts: tuple[int, int],
    relative_error: float | None,
) -> Report:
    """Put the report together from the decision and the plan."""
    graph = decision.graph
    layers: dict[str, LayerReport] = {}
    for path, layer in graph.layers.items():
        labels, units = layer.labels, len(layer.labels)
        masked = _masked_units(masks.get(path), layer.axis, units)
        gone = ~decision.kept(labels)
        if masked.any() or gone.any():
            why: Counter[str] = Counter()
            stayed = labels[masked & ~gone]
            for _, first, count in _grouped(decision.reason_key(stayed)):
                why[decision.reason(int(stayed[first])) or ""] += count
            name = "" if path == "weight" else path.removesuffix(".weight")
            layers[path] = LayerReport(name, units, int(masked.sum()), int(gone.sum()), dict(why))
    return Report(
        layers=tuple(layers.values()),
        parameters_before=counts[0],
        parameters_after=counts[1],
        relative_error=relative_error,
        constants_folded=tuple(sorted(plan.biases)),
        constants_carried=tuple(sorted(plan.carries)),
    )


def _masked_units(mask: torch.Tensor | None, axis: int, units: int) -> np.ndarray:
    if mask is None:
        return np.zeros(units, bool)
    rows = any_by_row(mask.movedim(axis, 0).reshape(mask.shape[axis], -1)).cpu().numpy()
    return ~rows if len(rows) == units else np.zeros(units, bool)


def _grouped(keys: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Each distinct key, where it is first, and how often it is there."""
    for key, first, count in zip(
        *np.unique(keys, return_index=True, return_counts=True), strict=True
    ):
        yield int(key), int(first), int(count)
