"""What a search found: as an object, as the files that NNI wrote, and as a picture."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.charts import Curves, save
from compress.charts.figure import can_draw
from compress.errors import StateError
from compress.files import write_atomically
from compress.measure.table import Table
from compress.search.plots import search_chart
from compress.search.trials import Trial


@dataclass(frozen=True)
class SearchResult:
    """The course of a search; prints as a table of its best trials.

    Attributes:
        pruner: its class.
        dense: the performance of the model as it was.
        best: the trial that was taken.
        trials: all, by number.
        config_list: what a one-shot pruner would be given for ``best``.
        maximize: whether more performance is better.
        dense_parameters, dense_flops: of the model as it was; the FLOPs as `Trial` has them.
        uniform: the number of the trial with the same sparsity everywhere, if there was one.
    """

    pruner: str
    dense: float
    best: Trial
    trials: tuple[Trial, ...] = field(repr=False)
    config_list: list[dict[str, Any]]
    maximize: bool = True
    dense_parameters: int | None = None
    dense_flops: float | None = None
    uniform: int | None = None

    def pareto(self, cost: str = "params") -> list[Trial]:
        """The trials than which none is better at as little cost, cheapest first.

        Args:
            cost: "params" or "flops"; trials whose FLOPs are not known are left out.
        """
        sign = 1 if self.maximize else -1
        front: list[Trial] = []
        costs = {t.number: t.parameters if cost == "params" else t.flops for t in self.trials}
        order = sorted(
            (t for t in self.trials if costs[t.number] is not None and not t.stopped),
            key=lambda t: (costs[t.number], -sign * t.performance, t.number),
        )
        for trial in order:
            if not front or sign * trial.performance > sign * front[-1].performance:
                front.append(trial)
        return front

    def table(self, rows: int = 10) -> Table:
        """The best trials, best first, below the dense model."""
        sign = 1 if self.maximize else -1
        order = sorted(self.trials, key=lambda t: (t.stopped, -sign * t.performance, t.number))[
            :rows
        ]
        cells = [("dense", f"{self.dense:.4g}", "", "", "")]
        for trial in order:
            mark = " (taken)" if trial.number == self.best.number else ""
            mark += " (stopped)" if trial.stopped else ""
            flops = "" if trial.flops is None else f"{trial.flops / 1e6:.2f}"
            cells.append((
                f"{trial.number}{mark}", f"{trial.performance:.4g}", f"{trial.share:.1%}",
                f"{trial.parameters / 1e6:.3f}", flops,
            ))  # fmt: skip
        columns = ("trial", "performance", "weights masked", "parameters M", "MFLOPs")
        caption = f"{self.pruner}: {len(self.trials)} trials"
        return Table(columns, tuple(cells), caption)

    def plot(self, path: str | os.PathLike[str], cost: str = "params") -> None:
        """Draw performance over cost: trials, their Pareto front, the dense and the uniform model.

        Args:
            path: a .png, .svg or .pdf file.
            cost: "params" or "flops".

        Raises:
            ChartError: matplotlib is not installed, or there is no such kind of file.
            SearchError: there is no such cost.
        """
        save(self.chart(cost), path)

    def chart(self, cost: str = "params") -> Curves:
        """What `plot` draws, as data for `compress.charts`."""
        return search_chart(self, cost)

    def __str__(self) -> str:
        return str(self.table())

    @staticmethod
    def read(folder: str | os.PathLike[str]) -> SearchResult:
        """What a search wrote into its ``experiment_data_dir``; without the trials' ``reports``.

        Raises:
            StateError: there is no such result, or it is another kind of file.
        """
        path = Path(folder)
        try:
            content = json.loads((path / "search_result.json").read_text())
            with open(path / "search_history.csv", newline="") as file:
                trials = tuple(_trial_of(row) for row in csv.DictReader(file))
            return SearchResult(
                content["pruner"],
                content["dense"],
                trials[content["trial"]],
                trials,
                json.loads(content["config_list"]),
                content["maximize"],
                content["dense_parameters"],
                content["dense_flops"],
                content["uniform"],
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise StateError(
                f"{os.fspath(folder)}: no search can be read: {type(error).__name__}: {error}; "
                "expected a search's experiment_data_dir, with search_result.json and "
                "search_history.csv"
            ) from error


def write_results(result: SearchResult, folder: str | os.PathLike[str] | None) -> None:
    """Write ``search_history.csv`` and ``search_result.json``, as NNI v1 has them, and more.

    Where matplotlib is installed also ``search.png``, the result's `plot`.

    Raises:
        StateError: they cannot be written.
    """
    if folder is None:
        return
    path = Path(folder)
    content = {
        "performance": result.best.performance,
        "config_list": json.dumps(result.config_list),
        "sparsity": result.best.share,
        "dense": result.dense,
        "trial": result.best.number,
        "trials": len(result.trials),
        "pruner": result.pruner,
        "maximize": result.maximize,
        "dense_parameters": result.dense_parameters,
        "dense_flops": result.dense_flops,
        "uniform": result.uniform,
    }
    text = json.dumps(content, indent=2)
    try:
        write_atomically(path / "search_history.csv", lambda p: _write_history(result, p))
        write_atomically(path / "search_result.json", lambda p: p.write_text(text + "\n"))
        if can_draw():
            result.plot(path / "search.png")
    except OSError as error:
        raise StateError(
            f"experiment_data_dir: the results cannot be written: {error}; the journal has all "
            "candidates: make room, and begin the same search again to go on"
        ) from error


def _write_history(result: SearchResult, path: Path) -> None:
    names = ("sparsity", "performance", "config_list", "number", "stage", "parameters", "flops",
             "seconds", "stopped", "metrics")  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for trial in result.trials:
            values = asdict(trial)
            values["sparsity"] = trial.share
            values["config_list"] = json.dumps(trial.sparsities)
            values["metrics"] = json.dumps(trial.metrics)
            writer.writerow({name: values[name] for name in names})


def _trial_of(row: dict[str, str]) -> Trial:
    """What `_write_history` made a line of."""
    return Trial(
        number=int(row["number"]),
        stage=int(row["stage"]),
        sparsities=json.loads(row["config_list"]),
        share=float(row["sparsity"]),
        metrics=json.loads(row["metrics"]),
        performance=float(row["performance"]),
        parameters=int(row["parameters"]),
        flops=float(row["flops"]) if row["flops"] else None,
        seconds=float(row["seconds"]),
        stopped=row["stopped"] == "True",
    )
