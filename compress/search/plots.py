"""What searches found, as charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from compress.charts import Curves, Series
from compress.charts.chart import BLUE, GREEN, GREY, ORANGE, RED, colour_of, marker_of, number
from compress.errors import SearchError
from compress.search.trials import Trial

if TYPE_CHECKING:
    from compress.search.results import SearchResult

_COSTS = {"params": "parameters", "flops": "FLOPs"}


def search_chart(result: SearchResult, cost: str) -> Curves:
    """Performance over cost: trials, their Pareto front, the dense and the uniform model.

    Raises:
        SearchError: there is no such cost.
    """
    if cost not in _COSTS:
        raise SearchError(f"cost: got {cost!r}; expected one of {', '.join(_COSTS)}")

    def series(name: str, trials: Iterable[Trial], style: str, marker: str, colour: str) -> Series:
        costs = [(t, t.parameters if cost == "params" else t.flops) for t in trials]
        known = [(t, float(each)) for t, each in costs if each is not None]
        texts = [f"trial {t.number}: {t.performance:.4g} at {number(each)}" for t, each in known]
        points = [(each, t.performance) for t, each in known]
        return Series(name, tuple(points), style, marker, colour, tuple(texts))

    stopped = [trial for trial in result.trials if trial.stopped]
    whole = [trial for trial in result.trials if not trial.stopped]
    uniform = [trial for trial in result.trials if trial.number == result.uniform]
    dense = result.dense_parameters if cost == "params" else result.dense_flops
    found = [
        series("trials", whole, "points", "circle", GREY),
        series("stopped", stopped, "points", "cross", GREY),
        # Between two trials of the front nothing better is known than the cheaper one.
        series("Pareto front", result.pareto(cost), "steps", "circle", BLUE),
        series("uniform", uniform, "points", "diamond", ORANGE),
        series("taken", [result.best], "rings", "circle", RED),
    ]
    if dense is not None:
        point = (float(dense), result.dense)
        found.insert(3, Series("dense", (point,), "points", "square", GREEN))
    return Curves(
        f"{result.pruner}: {len(result.trials)} trials",
        _COSTS[cost],
        "performance" if result.maximize else "performance (less is better)",
        tuple(each for each in found if each.points),
        f"Performance over {_COSTS[cost]}: {len(result.pareto(cost))} of the trials are such that "
        "none is better at as little cost",
    )


def sensitivity_chart(
    performances: Mapping[str, Mapping[float, float]], dense: float | None
) -> Curves:
    """Performance over sparsity, a line for each group."""
    count = len(performances)
    begin = {} if dense is None else {0.0: dense}
    series = tuple(
        Series(
            name,
            tuple(sorted({**begin, **curve}.items())),
            "line",
            marker_of(index, count),
            colour_of(index, count),
        )
        for index, (name, curve) in enumerate(performances.items())
    )
    return Curves(
        "What a layer alone bears",
        "sparsity of the layer alone",
        "performance",
        series,
        f"Performance over sparsity for {count} layers, each pruned alone",
        dense,
    )
