"""Which labels may go: the least set that must stay, grown from what the outputs need.

A label stays when some consumer reads it there: sees a value that is not a constant it can absorb.
Then labels come back until what is left is rectangular. Leaving a removable channel in place is
always safe: nobody reads it, or it is a known constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from compress.graph.channels import ChannelGraph, Step
from compress.graph.labels import EqualParts, Grid, Labels
from compress.graph.trace import location
from compress.rules.registry import Read, Rule
from compress.speedup.knowledge import Knowledge

_CELL = "is where a kept row and a kept column meet at"
_LINE = "has a kept cell at"
_EVENS = "evens out the parts at"
_DEEPEST = 4  # how many reasons one reason may be explained by


@dataclass(frozen=True)
class Limits:
    """``round_to``: kept channels of a layer are a multiple; ``min_channels``: at least so many."""

    round_to: int = 1
    min_channels: int = 1

    def in_words(self) -> str:
        """Why a channel stays on account of them: a clause that follows "it"."""
        wanted = []
        if self.min_channels > 1:
            wanted.append(f"at least {self.min_channels} channels (min_channels)")
        if self.round_to > 1:
            wanted.append(f"a multiple of {self.round_to} (round_to)")
        return f"completes its layer to {' and '.join(wanted)}"


class Decision:
    """``keep`` (one per label root, true: stays) and why: ``reason(label)``.

    ``dropped`` (one per label root): goes though it is read. With ``exact`` nothing is.
    """

    def __init__(self, knowledge: Knowledge, limits: Limits, exact: bool = True) -> None:
        self.knowledge = knowledge
        self.graph: ChannelGraph = knowledge.graph
        self.root = self.graph.root
        self.limits = limits
        self.keep = np.zeros(self.graph.space.size, bool)
        self.keep[self.root[0]] = True
        self.dropped = np.zeros(self.graph.space.size, bool) if exact else wholly_masked(knowledge)
        self.reads: dict[fx.Node, list[Read]] = {}
        self._reasons: list[tuple[str, fx.Node | None]] = [("is in use", None)]
        self._blame = np.zeros(self.graph.space.size, np.int64)  # index of the reason, by root
        self._because = np.zeros(
            self.graph.space.size, np.int64
        )  # which label asked for it, by root
        self._last_live: dict[fx.Node, bytes] = {}
        self._sizes: dict[int, int] = {}
        self._grow_from_reads()
        self._make_rectangular()

    # -- what the rules ask ----------------------------------------------------------------

    def kept(self, labels: Labels) -> np.ndarray:
        return np.asarray(self.keep[self.root[labels]])

    def size(self, axis: Labels) -> int:
        """How many positions of an axis of the graph stay; asked for a few vectors, but often."""
        found = self._sizes.get(id(axis))
        if found is None:
            found = self._sizes[id(axis)] = int(self.kept(axis).sum())
        return found

    def live(self, node: fx.Node, axis: int) -> np.ndarray:
        """Bool, one per position of an output axis: whether it must be computed rightly.

        It must if it stays and is read, or if it is a known constant (whoever absorbs a constant
        relies on it).
        """
        labels = self.knowledge.axis(node, axis)
        size = node.meta["shape"][axis]
        live: np.ndarray = np.ones(size, bool) if labels is None else self.kept(labels)
        unread = self.knowledge.unread(node, axis)
        if unread is not None:
            live = live & ~unread
        known = self.knowledge.known(node, axis)
        return live if known is None else live | known

    # -- reading ---------------------------------------------------------------------------

    def _grow_from_reads(self) -> None:
        readers = [s for s in self.graph.steps if type(s.rule).reads is not Rule.reads]
        grids = self.graph.space.grids
        changed = True
        while changed:
            changed = False
            for step in reversed(readers):
                changed |= self._read(step)
            for grid in reversed(grids):
                changed |= self._close_grid(grid)

    def _read(self, step: Step) -> bool:
        """Keep what one call reads; skip it if nothing it depends on has changed."""
        node = step.call.node
        state = step.rule.live(step.call, self)
        key = b"" if state is None else state.tobytes()
        if self._last_live.get(node) == key:
            return False
        self._last_live[node] = key
        self.reads[node] = list(step.rule.reads(step.call, self.knowledge, state))
        return _any_changed(
            self._restore(
                read.labels[read.needed & ~self.dropped[self.root[read.labels]]], "is read by", node
            )
            for read in self.reads[node]
        )

    def _restore(self, labels: Labels, reason: str, node: fx.Node | None = None) -> bool:
        """Keep labels after all; ``reason`` is a clause that the place of ``node`` completes."""
        roots = self.root[labels]
        new = roots[~self.keep[roots]]
        if not len(new):
            return False
        self.keep[new] = True
        self._blame[new] = len(self._reasons)
        self._reasons.append((reason, node))
        return True

    # -- constraints -----------------------------------------------------------------------

    def _make_rectangular(self) -> None:
        steps: list[Callable[[], bool]] = [
            self._keep_carriers,
            lambda: _any_changed(self._close_grid(g) for g in self.graph.space.grids),
            lambda: _any_changed(self._equalise(p) for p in self.graph.space.equal_parts),
            self._keep_one,
            self._keep_counts,
        ]
        while _any_changed(step() for step in steps):
            pass

    def _close_grid(self, grid: Grid) -> bool:
        cells = self.kept(grid.cells)
        changed = self._restore(grid.rows[cells.any(1)], _LINE, grid.node)
        changed |= self._restore(grid.columns[cells.any(0)], _LINE, grid.node)
        wanted = self.kept(grid.rows)[:, None] & self.kept(grid.columns)
        return self._restore(grid.cells[wanted], _CELL, grid.node) or changed

    def _equalise(self, equal: EqualParts) -> bool:
        kept = self.kept(equal.parts)
        counts = kept.sum(1)
        alive: np.ndarray = np.ones(len(counts), bool)
        if equal.partners is not None:
            both = np.concatenate([kept, self.kept(equal.partners)], axis=1)
            alive = np.asarray(both.any(axis=1))
        target = max(int(counts[alive].max(initial=0)), 1)
        lacking = [
            self._some(equal.parts[i][~kept[i]], target - counts[i])
            for i in np.flatnonzero(alive & (counts < target))
        ]
        if not lacking:
            return False
        found = np.concatenate(lacking)
        fullest = int(np.argmax(np.where(alive, counts, -1)))
        there = equal.parts[fullest][kept[fullest]]
        self._because[self.root[found]] = there[-1] if len(there) else 0
        evens = "is counted together with other units at" if equal.counted else _EVENS
        return self._restore(found, evens, equal.node)

    def _some(self, gone: Labels, wanted: int) -> Labels:
        """So many labels to restore; of a grid only one, as others come back with it."""
        first = gone[:wanted]
        return first[:1] if self._gridded[self.root[first]].any() else first

    @cached_property
    def _gridded(self) -> np.ndarray:
        """Bool, by root: whether the label is a cell, row or column of a grid."""
        found = np.zeros(self.graph.space.size, bool)
        for grid in self.graph.space.grids:
            for labels in (grid.cells.reshape(-1), grid.rows, grid.columns):
                found[self.root[labels]] = True
        return found

    def _keep_one(self) -> bool:
        changed = False
        for vector in self.graph.vectors:
            if not self.kept(vector).any():
                changed |= self._restore(vector[:1], "is the last one of its layer")
        return changed

    def _keep_counts(self) -> bool:
        limits, changed = self.limits, False
        if limits.round_to <= 1 and limits.min_channels <= 1:
            return False
        for labels in self._layer_outputs():
            kept = self.kept(labels)
            wanted = -(-max(int(kept.sum()), limits.min_channels) // limits.round_to)
            missing = min(wanted * limits.round_to, len(labels)) - int(kept.sum())
            if missing > 0:
                changed |= self._restore(labels[~kept][:missing], limits.in_words())
        return changed

    def _layer_outputs(self) -> list[Labels]:
        found: dict[int, Labels] = {}
        for node in self.reads:
            for axis in self.graph.axes[node]:
                if axis is not None:
                    found[id(axis)] = axis
        return list(found.values())

    # -- constants -------------------------------------------------------------------------

    def _keep_carriers(self) -> bool:
        """Where removed constants meet zero padding, one of them stays to carry the others."""
        changed = False
        for node, reads in self.reads.items():
            for read in reads:
                if read.carried is None or read.constants is None:
                    continue
                gone = read.carried & ~self.kept(read.labels)
                if gone.any() and self.carrier(read.labels, read.constants, gone) is None:
                    largest = np.argmax(np.where(gone, np.abs(read.constants), 0.0))
                    reason = "carries the constants of removed channels into"
                    changed |= self._restore(read.labels[[largest]], reason, node)
        return changed

    def carrier(self, labels: Labels, constants: np.ndarray, gone: np.ndarray) -> int | None:
        """The kept position whose constant can stand for those that are gone."""
        size = np.where(self.kept(labels) & ~np.isnan(constants), np.abs(constants), 0.0)
        best = int(np.argmax(size))
        # A much smaller constant would need much larger weights, and lose precision.
        enough = 0.1 * np.nanmax(np.abs(constants[gone]))
        return best if size[best] > 0 and size[best] >= enough else None

    def reason_key(self, labels: Labels) -> np.ndarray:
        """Equal for labels that certainly stay for the same reason."""
        roots = self.root[labels]
        pins = -1 - self.graph.nearest_pin[labels]
        return np.asarray(np.where(roots == 0, pins, self._blame[roots]))

    # -- why -------------------------------------------------------------------------------

    def reason(self, label: int) -> str | None:
        """Why a label stays (a clause that follows "it"), or None if it goes."""
        return self._reason(label) if self.keep[self.root[label]] else None

    def _reason(self, label: int, depth: int = 0) -> str:
        root = int(self.root[label])
        if root == 0:
            return self.graph.pin_reason(label)
        reason, node = self._reasons[self._blame[root]]
        text = reason if node is None else f"{reason} {location(node)}"
        if depth < _DEEPEST and reason == _CELL:
            text += self._line_reason(label, depth)
        if depth < _DEEPEST and reason == _LINE:
            text = self._cell_reason(label, depth) or text
        if depth < _DEEPEST and self._because[root]:
            text += f", where one {self._reason(int(self._because[root]), depth + 1)}"
        return text

    def _line_reason(self, label: int, depth: int) -> str:
        """Why the row and the column of a grid's cell stay: first that which could go at all."""
        for grid in self.graph.space.grids:
            for row, column in np.argwhere(self.root[grid.cells] == self.root[label])[:1].tolist():
                lines = {"row": int(grid.rows[row]), "column": int(grid.columns[column])}
                names = sorted(lines, key=lambda name: self.root[lines[name]] == 0)
                if self._is_cell(lines[names[0]]):  # it says the rest
                    names = names[:1]
                clauses = [f"its {name} {self._reason(lines[name], depth + 1)}" for name in names]
                return f": {', and '.join(clauses)}"
        return ""

    def _is_cell(self, label: int) -> bool:
        return bool(self._reasons[self._blame[self.root[label]]][0] == _CELL)

    def _cell_reason(self, label: int, depth: int) -> str:
        """Which kept cell of a row or column keeps it, if not one that it keeps itself."""
        for grid in self.graph.space.grids:
            for lines, cells in ((grid.rows, grid.cells), (grid.columns, grid.cells.T)):
                for at in np.flatnonzero(self.root[lines] == self.root[label])[:1].tolist():
                    for cell in cells[at][self.kept(cells[at])].tolist():
                        if self.root[cell] == 0 or not self._is_cell(cell):
                            return f"has a kept cell that {self._reason(cell, depth + 1)}"
        return ""


def wholly_masked(knowledge: Knowledge) -> np.ndarray:
    """Bool (labels,), by root: whether all the weights and biases that make a unit are 0.

    Of every call that makes units; those that pass their input's own channels on (depthwise
    convolutions) count as readers.
    """
    graph = knowledge.graph
    made, alive = np.zeros(graph.space.size, bool), np.zeros(graph.space.size, bool)
    for step in graph.steps:
        for units in step.rule.makes(step.call):
            if units.axis is None:
                continue
            labels = graph.axes[step.call.node][units.axis]
            if labels is None or graph.passes_on(units, labels):
                continue
            live = np.asarray(knowledge.pattern(units.weight).any(axis=1 - units.weight_axis))
            live = live if len(live) == len(labels) else np.ones(len(labels), bool)
            for bias in set(step.call.inputs) - {units.weight, units.source}:
                value = knowledge.value(bias)
                live = live | (True if value is None else (value != 0).numpy())
            made[graph.root[labels]] = True
            alive[graph.root[labels[live]]] = True
    alive[graph.root[0]] = True
    return made & ~alive


def _any_changed(changes: Iterable[bool]) -> bool:
    """Whether any step changed something; unlike ``any``, takes them all."""
    return any(list(changes))
