"""Pictures of what searches found; the only place of searches that knows matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import SearchError
from compress.files import write_atomically

if TYPE_CHECKING:
    from compress.search.results import SearchResult

_FORMATS = (".png", ".svg", ".pdf")
_COSTS = {"params": "parameters", "flops": "FLOPs"}
_GREY, _BLUE, _ORANGE, _GREEN, _RED = "#9a9a9a", "#1f6fb2", "#e07b00", "#2a8a3e", "#c22a2a"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot_search(result: SearchResult, path: str | os.PathLike[str], cost: str) -> None:
    """See `SearchResult.plot`."""
    if cost not in _COSTS:
        raise SearchError(f"cost: got {cost!r}; expected one of {', '.join(_COSTS)}")
    figure, axes = _figure(path)
    from matplotlib.ticker import EngFormatter

    sign = 1 if result.maximize else -1

    def at(trials: Any) -> tuple[list[float], list[float]]:
        known = [(t.parameters if cost == "params" else t.flops, t.performance) for t in trials]
        known = [(each, performance) for each, performance in known if each is not None]
        return [each for each, _ in known], [performance for _, performance in known]

    whole = [trial for trial in result.trials if not trial.stopped]
    axes.scatter(*at(whole), s=16, color=_GREY, label="trials", zorder=2)
    if len(whole) < len(result.trials):
        axes.scatter(*at(trial for trial in result.trials if trial.stopped), s=16, marker="x",
                     color=_GREY, label="stopped", zorder=2)  # fmt: skip
    front = at(result.pareto(cost))
    # Between two trials of the front nothing better is known than the cheaper one.
    axes.step(*front, where="post", color=_BLUE, linewidth=1.2, zorder=3)
    axes.scatter(*front, s=26, color=_BLUE, label="Pareto front", zorder=4)
    dense = result.dense_parameters if cost == "params" else result.dense_flops
    if dense is not None:
        axes.scatter([dense], [result.dense], s=70, marker="s", color=_GREEN, label="dense",
                     zorder=5)  # fmt: skip
    uniform = [trial for trial in result.trials if trial.number == result.uniform]
    if uniform:
        axes.scatter(*at(uniform), s=60, marker="D", color=_ORANGE, label="uniform", zorder=6)
    axes.scatter(*at([result.best]), s=150, marker="o", facecolors="none", edgecolors=_RED,
                 linewidths=1.6, label="taken", zorder=7)  # fmt: skip
    axes.set_xlabel(_COSTS[cost])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("performance" if sign > 0 else "performance (less is better)")
    axes.set_title(f"{result.pruner}: {len(result.trials)} trials")
    figure.legend(frameon=False, loc="outside right upper")
    _save(figure, path)


def plot_sensitivity(
    performances: Mapping[str, Mapping[float, float]], dense: float, path: str | os.PathLike[str]
) -> None:
    """Performance over sparsity, a line for each group."""
    figure, axes = _figure(path)
    figure.set_figwidth(8.5)
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for index, (name, found) in enumerate(performances.items()):
        points = sorted({0.0: dense, **found}.items())
        axes.plot(
            [sparsity for sparsity, _ in points],
            [performance for _, performance in points],
            marker="o",
            markersize=3,
            linewidth=1.2,
            color=colours(index / max(len(performances) - 1, 1)),
            label=name,
        )
    axes.axhline(dense, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("sparsity of the layer alone")
    axes.set_ylabel("performance")
    columns = 1 + len(performances) // 26
    axes.legend(
        frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns
    )
    _save(figure, path)


def _figure(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    target = Path(path)
    if target.suffix not in _FORMATS:
        raise SearchError(
            f"{target}: plots {', '.join(_FORMATS)}; pass a file name with one of them"
        )
    if not can_plot():
        raise SearchError(
            f"{target}: plotting needs matplotlib: pip install 'compress-torch[draw]'"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    kind = Path(path).suffix[1:]
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format=kind))
