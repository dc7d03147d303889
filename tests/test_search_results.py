"""What a search shows: its result as an object, as files, as a picture, and how far it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from search_jobs import CONFIG, evaluate, network

from compress.errors import ChartError, SearchError, StateError
from compress.progress import progress_bar
from compress.search import SearchResult, SimulatedAnnealingPruner, Trial


def trial(number: int, performance: float, parameters: int, flops: float | None) -> Trial:
    metrics = {"metric": performance}
    return Trial(number, 0, {"0": 0.5}, 0.5, metrics, performance, parameters, flops, 1.0)


TRIALS = (
    trial(0, 0.8, 500, 9e6),
    trial(1, 0.9, 600, None),
    trial(2, 0.7, 550, 8e6),
    trial(3, 0.9, 900, 9e6),
    trial(4, 0.95, 1000, 9.5e6),
)
RESULT = SearchResult("Some", 0.99, TRIALS[1], TRIALS, [], True, 2000, 2e7, 0)


def test_the_front_has_what_nothing_cheaper_beats() -> None:
    assert [t.number for t in RESULT.pareto()] == [0, 1, 4]
    assert [t.number for t in RESULT.pareto("flops")] == [2, 3, 4]
    least = SearchResult("Some", 0.1, TRIALS[2], TRIALS, [], False)
    assert [t.number for t in least.pareto()] == [0, 2]


@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_picture(tmp_path: Path, cost: str, kind: str) -> None:
    pytest.importorskip("matplotlib")
    RESULT.plot(tmp_path / f"picture.{kind}", cost)
    content = (tmp_path / f"picture.{kind}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])
    assert len(content) > 3000


def test_the_picture_names_what_is_in_it(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        RESULT.plot(tmp_path / "picture.svg")
        SearchResult("Some", 0.1, TRIALS[2], TRIALS, []).plot(tmp_path / "less.svg", "flops")
    text, less = (tmp_path / "picture.svg").read_text(), (tmp_path / "less.svg").read_text()
    for name in ("Pareto front", "dense", "uniform", "taken", "parameters", "Some: 5 trials"):
        assert f">{name}<" in text
    assert ">FLOPs<" in less and ">uniform<" not in less and ">dense<" not in less


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ChartError, match=r"plots \.png, \.svg, \.pdf"):
        RESULT.plot(tmp_path / "picture.jpeg")
    with pytest.raises(SearchError, match="cost: got 'latency'; expected one of params, flops"):
        RESULT.plot(tmp_path / "picture.png", "latency")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "compress.charts.figure.find_spec",
        lambda name: None if name == "matplotlib" else found(name),
    )
    with pytest.raises(ChartError, match=r"pip install 'compress-torch\[report\]'"):
        RESULT.plot(tmp_path / "picture.png")
    search(tmp_path)  # writes what it can
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"search_journal.jsonl", "search_history.csv", "search_result.json"}


def search(folder: Path | None = None, **arguments: Any) -> SearchResult:
    pruner = SimulatedAnnealingPruner(
        network(), CONFIG, evaluate, cool_down_rate=0.5, experiment_data_dir=folder, **arguments
    )
    pruner.compress()
    assert pruner.result is not None
    return pruner.result


def test_a_search_knows_its_dense_and_its_uniform_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = search(tmp_path)
    assert found.dense_parameters == sum(p.numel() for p in network().parameters())
    assert found.dense_flops is not None and found.trials[0].flops is not None
    assert found.dense_flops > found.trials[0].flops
    assert found.uniform == 0
    assert len(set(found.trials[0].sparsities.values())) == 1
    assert (tmp_path / "search.png").stat().st_size > 3000


def test_a_result_is_read_again(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert SearchResult.read(tmp_path) == found
    (tmp_path / "search_history.csv").write_text("number\n0\n")
    with pytest.raises(StateError, match="no search can be read: KeyError"):
        SearchResult.read(tmp_path)
    with pytest.raises(StateError, match="expected a search's experiment_data_dir"):
        SearchResult.read(tmp_path / "none")


# -- how far it is -------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.progress._PATIENCE_S", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_terminal_sees_the_best_so_far(terminal: None, capsys: Any) -> None:
    found = search()
    shown = capsys.readouterr().err
    assert f"SimulatedAnnealingPruner: best {found.best.performance:.4g} (dense -0)" in shown
    assert f"{len(found.trials)}/{len(found.trials)}" in shown
    search(progress=False)
    assert capsys.readouterr().err == ""


def test_steps_that_were_done_before_do_not_count_for_the_time_left(
    terminal: None, capsys: Any, monkeypatch: Any
) -> None:
    now = [0.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    with progress_bar("searching", 10) as advance:
        for _ in range(6):
            advance(known=True)
        for _ in range(3):
            now[0] += 3600.0
            advance()
    assert "1:00:00" in capsys.readouterr().err  # one step is left, of an hour
