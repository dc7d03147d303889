"""How good a model is without a part of each layer alone: curves, as object, file and picture."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.charts import Curves, save
from compress.errors import SearchError, StateError
from compress.files import write_atomically
from compress.measure.table import Table
from compress.search.plots import sensitivity_chart


@dataclass(frozen=True)
class Sensitivity:
    """How good a model is without a part of one layer, or of several that go together.

    Attributes:
        performances: by the name of the group's first layer, then by sparsity.
        dense: the performance of the whole model; None where a file does not have it.
        layers: of each group.
        maximize: whether more is better.
    """

    performances: dict[str, dict[float, float]]
    dense: float | None = None
    layers: dict[str, tuple[str, ...]] | None = None
    maximize: bool = True

    def bearable(self, drop: float) -> dict[str, float]:
        """The sparsity at which each group's performance is worse by ``drop``, interpolated.

        Raises:
            SearchError: the performance of the whole model is not known.
        """
        dense = self._dense()
        return {
            name: bearable(dense, drop, curve, self.maximize)
            for name, curve in self.performances.items()
        }

    def table(self) -> Table:
        """A row for each group, a column for each sparsity."""
        sparsities = sorted({s for curve in self.performances.values() for s in curve})
        rows = [
            (name, *(f"{curve[s]:.4g}" if s in curve else "" for s in sparsities))
            for name, curve in self.performances.items()
        ]
        caption = "" if self.dense is None else f"dense: {self.dense:.4g}"
        return Table(("layer", *(f"{s:g}" for s in sparsities)), tuple(rows), caption)

    def __str__(self) -> str:
        return str(self.table())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw performance over sparsity, a line for each group, in a .png, .svg or .pdf file.

        Raises:
            ChartError: matplotlib is not installed, or there is no such kind of file.
        """
        save(self.chart(), path)

    def chart(self) -> Curves:
        """What `plot` draws, as data for `compress.charts`."""
        return sensitivity_chart(self.performances, self.dense)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write a .csv file as NNI's ``SensitivityAnalysis.export`` does, or all of it as .json.

        In the first line of a .csv file are ``layername`` and the sparsities; each other line has
        a layer and the performances, as far as they were measured.
        """
        write = self._write_json if _is_json(path) else self._write_csv
        write_atomically(path, write)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Sensitivity:
        """What `export` wrote, or NNI.

        Raises:
            StateError: there is no such file, or it has something else.
        """
        try:
            text = Path(path).read_text()
            return _read_json(text) if _is_json(path) else _read_csv(text)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StateError(
                f"{os.fspath(path)}: no sensitivities can be read: {type(error).__name__}: "
                f"{error}; expected what Sensitivity.export() writes: in a .csv file, layername "
                "and sparsities, then a layer and its performances in each line"
            ) from error

    def _dense(self) -> float:
        if self.dense is None:
            raise SearchError(
                "the performance of the dense model is not known, as a .csv file does not have it; "
                "pass dataclasses.replace(sensitivity, dense=...)"
            )
        return self.dense

    def _write_csv(self, path: Path) -> None:
        sparsities = sorted({s for curve in self.performances.values() for s in curve})
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["layername", *sparsities])
            for name, curve in self.performances.items():
                writer.writerow([name, *(curve.get(s, "") for s in sparsities)])

    def _write_json(self, path: Path) -> None:
        content = {
            "dense": self.dense,
            "maximize": self.maximize,
            "layers": self.layers,
            "performances": {
                name: [[s, value] for s, value in curve.items()]
                for name, curve in self.performances.items()
            },
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def bearable(
    dense: float, drop: float, curve: Mapping[float, float], maximize: bool, begin: float = 0.0
) -> float:
    """Where a curve, which is at ``dense`` at ``begin``, is first worse by ``drop``, or its end."""
    before, lost = begin, 0.0
    for sparsity, performance in sorted(curve.items()):
        worse = dense - performance if maximize else performance - dense
        if worse > drop:
            return before + (sparsity - before) * (drop - lost) / (worse - lost)
        before, lost = sparsity, worse
    return before


def _is_json(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".json"


def _read_json(text: str) -> Sensitivity:
    content = json.loads(text)
    layers = content["layers"]
    return Sensitivity(
        {
            name: {float(s): float(value) for s, value in curve}
            for name, curve in content["performances"].items()
        },
        content["dense"],
        None if layers is None else {name: tuple(each) for name, each in layers.items()},
        content["maximize"],
    )


def _read_csv(text: str) -> Sensitivity:
    header, *rows = csv.reader(text.splitlines())
    if header[:1] != ["layername"]:
        raise ValueError(f"the first line begins with {header[:1]}")
    sparsities = [float(each) for each in header[1:]]
    return Sensitivity(
        {
            name: {s: float(value) for s, value in zip(sparsities, values, strict=False) if value}
            for name, *values in rows
        }
    )
