"""What a `GlobalPruner` asked for, what it got, and where it was taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compress.cost.search import Round
from compress.cost.target import Target, in_words
from compress.measure.table import Table


@dataclass(frozen=True)
class TargetReport:
    """Prints as a table, a line for each layer.

    Attributes:
        target: what was asked for.
        dense: what the whole model costs; for latency, measured.
        predicted: what the chosen cut was to cost.
        measured: what it costs, really shrunk.
        rounds: the cuts that were made on the way, the chosen one among them.
        kept: for each layer, its units and how many of them are left.
    """

    target: Target
    dense: float
    predicted: float
    measured: float
    rounds: tuple[Round, ...]
    kept: Mapping[str, tuple[int, int]]

    @property
    def reached(self) -> float:
        """What was measured, as a fraction of the dense model's cost."""
        return self.measured / self.dense

    @property
    def prediction_error(self) -> float:
        """Of the chosen cut, as a fraction of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        cost = self.target.cost
        rows = [
            (name, str(units), str(kept), f"{kept / units:.0%}")
            for name, (units, kept) in self.kept.items()
        ]
        caption = (  # as a line of its own: a narrow table would fold it
            f"target: {self.target}; reached: {in_words(cost, self.measured)} of "
            f"{in_words(cost, self.dense)} ({self.reached:.1%}), predicted "
            f"{in_words(cost, self.predicted)} ({self.prediction_error:+.1%}), "
            f"{len(self.rounds)} cut{'s' if len(self.rounds) != 1 else ''} measured"
        )
        return f"{Table(('layer', 'units', 'kept', ''), tuple(rows))}\n{caption}"
