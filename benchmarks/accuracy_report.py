"""The tables and the plot of `accuracy.py`: means, spreads, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_methods import FILTERS, PEER, PEERS, RANKED, SCRATCH, Method, Record, all_methods

Values = dict[int, float]  # a number for each seed
ONE = "dependency_aware, one ranking"


@dataclass(frozen=True)
class Paired:
    """The mean of the differences between two methods over the same seeds.

    ``low`` and ``high`` bound its 95 % confidence interval by Student's t.
    """

    mean: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    @property
    def verdict(self) -> str:
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "even"


def paired(left: Values, right: Values) -> Paired | None:
    """left - right over the seeds that both have; None where these are fewer than two."""
    from scipy.stats import t

    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = error * float(t.ppf(0.975, len(differences) - 1))
    counts = [sum((d > 0) - (d < 0) == sign for d in differences) for sign in (1, 0, -1)]
    return Paired(mean, mean - half, mean + half, *counts)


class Table:
    """The records, by method and sparsity."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records: dict[tuple[str, float], dict[int, Record]] = {}
        for record in records:
            key = record["method"], record["sparsity"]
            self._records.setdefault(key, {})[record["seed"]] = record
        self.seeds = {seed for some in self._records.values() for seed in some}
        self.sparsities = sorted({sparsity for _, sparsity in self._records if sparsity > 0})

    def values(self, method: Method | str, sparsity: float, field: str = "accuracy") -> Values:
        """By seed; empty where there is none."""
        name = method if isinstance(method, str) else method.name
        found = self._records.get((name, sparsity), {})
        return {seed: one[field] for seed, one in found.items() if one[field] is not None}

    def mean(self, method: Method | str, sparsity: float, field: str = "accuracy") -> float:
        return statistics.fmean(self.values(method, sparsity, field).values())


# -- tables --------------------------------------------------------------------------------


def markdown(made: Mapping[str, Any], table: Table) -> str:
    parts = [overview(table), "", conditions(made, table)]
    for title, rows in comparisons(table).items():
        parts += ["", f"## {title}", "", *grid(rows)]
    for section, title in (("filters", "Filters"), ("weights", "Single weights")):
        for sparsity in table.sparsities:
            rows = accuracies(table, section, sparsity)
            if len(rows) > 1:
                parts += ["", f"## {title}, {sparsity:.0%}", "", *grid(rows)]
    return "\n".join(["# Accuracy after pruning and fine-tuning", "", *parts, ""])


def conditions(made: Mapping[str, Any], table: Table) -> str:
    settings = made["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return (
        f"{len(table.seeds)} seeds; residual network of widths {settings['widths']} on 8×8 digits, "
        f"{settings['dense_epochs']} epochs dense, {settings['tuning_epochs']} of fine-tuning in "
        f"batches of {settings['batch']}; {settings['test_share']:.0%} of the images are the "
        f"test. {made['machine']}; {versions}. Differences are in points of accuracy, paired by "
        "seed: mean [95 % interval], wins–ties–losses; bold where the interval leaves out 0."
    )


def overview(table: Table) -> str:
    """How many of the comparisons end how."""
    lines = []
    for title, rows in comparisons(table).items():
        cells = [cell for row in rows[1:] for cell in row[1:] if cell != "–"]
        behind = sum(cell.startswith("**−") for cell in cells)
        ahead = sum(cell.startswith("**") for cell in cells) - behind
        even = len(cells) - ahead - behind
        lines.append(f"- {title}: {ahead} ahead, {even} even, {behind} behind")
    return "\n".join(lines)


def comparisons(table: Table) -> dict[str, list[list[str]]]:
    """Titles, and the rows below each: a heading, then a name and a cell for each sparsity."""
    coupled = {name: Method(name, "dependency_aware") for name in FILTERS}
    peers = [(coupled[n], Method(n, "local", tool=PEER)) for n in PEERS]
    for name in RANKED:
        ours = Method(name, ONE, equal_cost=True)
        peers.append((ours, Method(name, "global", tool=PEER, equal_cost=True)))
    alone = [(coupled[n], Method(n, "normal", equal_cost=True)) for n in FILTERS]
    wider = [(coupled[n], Method(n, "normal")) for n in FILTERS]
    ranked = [(Method(n, ONE, equal_cost=True), coupled[n]) for n in RANKED]
    iso = [(Method(n, "isomorphic", equal_cost=True), coupled[n]) for n in RANKED]
    chance = [(coupled[n], coupled["Random"]) for n in FILTERS if n != "Random"]
    scratch = Method(SCRATCH, "small network", "baselines")
    return {
        "Beside Torch-Pruning, same criterion": pairs(table, peers),
        "dependency_aware beside normal, equal mult-adds": pairs(table, alone),
        "dependency_aware beside normal, which cuts less at the same sparsity": pairs(table, wider),
        "One ranking over all groups beside the same share of each": pairs(table, ranked),
        "Isomorphic beside the same share of each": pairs(table, iso),
        "dependency_aware beside random channels": pairs(table, chance),
        "dependency_aware beside the small network trained from scratch": pairs(
            table, [(coupled[name], scratch) for name in FILTERS]
        ),
    }


def pairs(table: Table, methods: Sequence[tuple[Method, Method]]) -> list[list[str]]:
    rows = [["", *(f"{sparsity:.0%}" for sparsity in table.sparsities)]]
    for left, right in methods:
        found = [
            paired(table.values(left, each), table.values(right, each)) for each in table.sparsities
        ]
        if any(found):
            rows.append([label(left), *map(difference, found)])
    return rows


def label(method: Method) -> str:
    plain = method.mode in ("dependency_aware", "normal")
    return method.criterion if plain else f"{method.criterion}, {method.mode.split(', ')[-1]}"


def difference(found: Paired | None) -> str:
    if found is None:
        return "–"
    text = f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"
    text = text if found.verdict == "even" else f"**{text}**"
    return f"{text} {found.wins}–{found.ties}–{found.losses}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def accuracies(table: Table, section: str, sparsity: float) -> list[list[str]]:
    """The baselines and the methods of a section, those of one criterion together."""
    share = "weights not 0" if section == "weights" else "parameters left"
    rows = [["", "accuracy", "before tuning", share, "mult-adds left", "sparsity asked"]]
    for method in all_methods():
        at = 0.0 if method.criterion == "Dense" else sparsity
        if method.section in (section, "baselines") and table.values(method, at):
            rows.append([method.name, *numbers(table, method, at)])
    return rows


def numbers(table: Table, method: Method, sparsity: float) -> list[str]:
    dense = next(m for m in all_methods() if m.criterion == "Dense")
    counted = "nonzero" if method.section == "weights" else "parameters"
    reference = dense if table.values(dense, 0.0) else method
    at = 0.0 if reference is dense else sparsity
    before = table.values(method, sparsity, "before")
    return [
        spread(table.values(method, sparsity).values()),
        f"{100 * statistics.fmean(before.values()):.1f}" if before else "–",
        *(
            f"{table.mean(method, sparsity, field) / table.mean(reference, at, field):.1%}"
            for field in (counted, "mult_adds")
        ),
        f"{table.mean(method, sparsity, 'asked'):.1%}" if sparsity else "–",
    ]


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation over the seeds, in percent."""
    found = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.1f}{deviation}"


def grid(rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:])]


# -- plot ----------------------------------------------------------------------------------


def plot(table: Table, path: Path) -> None:
    """Accuracy over sparsity: the criteria, the modes, and the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = plotted()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 5.2))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, (name, method, style) in enumerate(lines):
            draw(axis, table, name, method, style, shift=(number - (len(lines) - 1) / 2) * 0.004)
        dense = table.values("Dense, as trained", 0.0)
        if dense:
            axis.axhline(100 * statistics.fmean(dense.values()), color="0.6", lw=1, label="dense")
        axis.set_title(title)
        axis.set_xlabel("sparsity of the channels (points are moved apart)")
        axis.set_xticks(table.sparsities, [f"{each:.0%}" for each in table.sparsities])
        axis.grid(axis="y", color="0.9")
        axis.legend(fontsize=8, loc="lower left")
    axes[0].set_ylabel("test accuracy in %, mean ± standard deviation over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plotted() -> dict[str, list[tuple[str, Method, str]]]:
    """Titles, and below each the lines' names, methods and styles."""
    criteria = [
        (n, Method(n, "dependency_aware"), f"C{i} o {'--' if n == 'Random' else '-'}")
        for i, n in enumerate(FILTERS)
    ]
    criteria.append((SCRATCH, Method(SCRATCH, "small network", "baselines"), "k s :"))
    modes, beside = [], []
    for i, name in enumerate(RANKED):
        coupled = Method(name, "dependency_aware")
        modes.append((f"{name}, dependency_aware", coupled, f"C{i} o -"))
        normal = Method(name, "normal", equal_cost=True)
        modes.append((f"{name}, normal", normal, f"C{i} v :"))
        beside.append((f"{name}, compress", coupled, f"C{i} o -"))
        beside.append((f"{name}, {PEER}", Method(name, "local", tool=PEER), f"C{i} x --"))
    return {
        "dependency_aware, by criterion": criteria,
        "Coupled or layer by layer, equal mult-adds": modes,
        f"Beside {PEER}": beside,
    }


def draw(axis: Any, table: Table, name: str, method: Method, style: str, shift: float) -> None:
    color, marker, line = style.split()
    found = {s: list(table.values(method, s).values()) for s in table.sparsities}
    found = {s: [100 * v for v in values] for s, values in found.items() if values}
    axis.errorbar(
        [s + shift for s in found],
        [statistics.fmean(values) for values in found.values()],
        [statistics.stdev(values) if len(values) > 1 else 0 for values in found.values()],
        color=color, marker=marker, linestyle=line, label=name, capsize=2, lw=1.2, ms=4, alpha=0.8,
    )  # fmt: skip


def write_report(made: Mapping[str, Any], records: Sequence[Record], path: Path) -> None:
    """``.md`` and ``.png`` beside the JSON file at ``path``; the tables are printed, too."""
    table = Table(records)
    text = markdown(made, table)
    path.with_suffix(".md").write_text(text)
    plot(table, path.with_suffix(".png"))
    print("\n" + text)
