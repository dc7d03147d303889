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

from compress.graph.explain import couplings, layer_of
from compress.graph.walk import leaves_of
from compress.speedup.decide import Decision
from compress.speedup.plan import Plan
from compress.speedup.why import masked_units


@dataclass(frozen=True)
class LayerReport:
    """One layer's output units (channels, features).

    ``masked`` units have all their weights masked; ``removed`` are gone; ``kept`` maps the reason
    why a masked unit is still there to how many there are; ``unmasked_elsewhere`` of these are not
    masked in some layer that they are coupled with. ``coupled`` names the layers whose units go
    together with these.
    """

    layer: str
    units: int
    masked: int
    removed: int
    kept: dict[str, int]
    unmasked_elsewhere: int = 0
    coupled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The outcome of a speedup.

    ``parameters_before`` and ``parameters_after`` count elements of parameters.
    ``relative_error`` is max |small - masked| / max |masked| on the dummy input, of the outputs and
    of what the model decides by on the way (scores of boxes, say); None: not checked.
    ``constants_folded`` are the biases that took constants, ``constants_carried`` the weights in
    which one channel carries those of others. ``planned``: nothing has been done yet. ``notes``
    say what limits the result.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    relative_error: float | None
    constants_folded: tuple[str, ...] = ()
    constants_carried: tuple[str, ...] = ()
    planned: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = Table(title="speedup", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("units", "masked", "removed"):
            table.add_column(name, justify="right")
        table.add_column("masked, but kept: why", overflow="fold")
        for layer in self.layers:
            reasons = "; ".join(f"{count}: it {reason}" for reason, count in layer.kept.items())
            if layer.unmasked_elsewhere:
                reasons += f"; {layer.unmasked_elsewhere} unmasked in a coupled layer"
            numbers = (str(n) for n in (layer.units, layer.masked, layer.removed))
            table.add_row(layer.layer, *numbers, reasons)
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get() + "\n".join([*self._footnotes(), self.summary()])

    def _footnotes(self) -> Iterator[str]:
        """What is coupled, and where constants went, a line for each."""
        together: dict[frozenset[str], tuple[str, ...]] = {}
        for layer in self.layers:
            names = (layer.layer, *layer.coupled)
            if together.setdefault(frozenset(names), names) is names and layer.coupled:
                yield f"go together: {', '.join(names)}"
        if self.constants_folded:
            yield f"constants added to: {', '.join(self.constants_folded)}"
        if self.constants_carried:
            yield f"constants carried by one channel of: {', '.join(self.constants_carried)}"
        yield from self.notes

    def summary(self) -> str:
        """Parameters before and after, and how exact the result is, in one line."""
        left = self.parameters_after / max(self.parameters_before, 1)
        if self.planned:
            checked = "planned: nothing is done yet"
        elif self.relative_error is None:
            checked = "not verified"
        else:
            checked = f"largest difference to the masked model {self.relative_error:.1e}"
        return (
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({left:.1%} left), {checked}"
        )


def parameter_counts(model: nn.Module, before: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Elements of a cut model's parameters, with the shapes that they had before, and now."""
    parameters = {p: tensor for p, tensor, kind in leaves_of(model) if kind == "parameter"}
    had = sum(prod(before[path]) for path in parameters if path in before)
    return had, sum(p.numel() for p in parameters.values())


def make_report(
    decision: Decision,
    plan: Plan,
    masks: Mapping[str, torch.Tensor],
    counts: tuple[int, int],
    relative_error: float | None,
    planned: bool = False,
) -> Report:
    """Put the report together from the decision and the plan."""
    graph = decision.graph
    layers: list[LayerReport] = []
    coupled, unmasked = couplings(graph), _unmasked(decision, masks)
    for path, layer in graph.layers.items():
        labels, units = layer.labels, len(layer.labels)
        masked = masked_units(masks.get(path), layer.axis, units)
        gone = ~decision.kept(labels)
        if masked.any() or gone.any():
            why = _reasons(decision, labels[masked & ~gone])
            name, counts_here = layer_of(graph, path), (units, int(masked.sum()), int(gone.sum()))
            elsewhere = int(unmasked[graph.root[labels[masked & ~gone]]].sum())
            layers.append(LayerReport(name, *counts_here, why, elsewhere, coupled[path]))
    return Report(
        layers=(*layers, *_other_weights(decision, masks)),
        parameters_before=counts[0],
        parameters_after=counts[1],
        relative_error=relative_error,
        constants_folded=tuple(sorted(plan.biases)),
        constants_carried=tuple(sorted(plan.carries)),
        planned=planned,
        notes=plan.notes,
    )


def _unmasked(decision: Decision, masks: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Bool (labels,), by root: whether some layer makes the unit and does not mask it."""
    found = np.zeros(decision.graph.space.size, bool)
    for path, layer in decision.graph.layers.items():
        if not layer.follows:
            masked = masked_units(masks.get(path), layer.axis, len(layer.labels))
            found[decision.graph.root[layer.labels[~masked]]] = True
    found[decision.graph.root[0]] = False  # all that stays for the structure's sake
    return found


def _reasons(decision: Decision, stayed: np.ndarray) -> dict[str, int]:
    """Why labels stay, each reason with how many it keeps."""
    why: Counter[str] = Counter()
    for _, first, count in _grouped(decision.reason_key(stayed)):
        why[decision.reason(int(stayed[first])) or ""] += count
    return dict(why)


def _other_weights(decision: Decision, masks: Mapping[str, torch.Tensor]) -> Iterator[LayerReport]:
    """Masked weights that no call makes units with: those of opaque functions, unused ones."""
    graph = decision.graph
    makers = {step.call.node for step in graph.steps if step.rule.makes(step.call)}
    for path, mask in masks.items():
        if path in graph.layers or mask.dim() < 2:
            continue
        node, units, name = graph.trace.leaves.get(path), len(mask), layer_of(graph, path)
        masked = masked_units(mask, 0, units)
        labels = None if node is None else graph.axes[node][0]
        known = node is not None and any(user in makers for user in node.users)
        if known or not masked.any():
            continue
        if labels is None:
            reason = "is used by nothing that ran" if node is None else decision.graph.pin_reason(0)
            yield LayerReport(name, units, int(masked.sum()), 0, {reason: int(masked.sum())})
        else:
            gone = ~decision.kept(labels)
            why = _reasons(decision, labels[masked & ~gone])
            yield LayerReport(name, units, int(masked.sum()), int(gone.sum()), why)


def _grouped(keys: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Each distinct key, where it is first, and how often it is there."""
    for key, first, count in zip(
        *np.unique(keys, return_index=True, return_counts=True), strict=True
    ):
        yield int(key), int(first), int(count)
