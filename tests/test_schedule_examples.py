"""The examples of pruning in steps, in this process, as a user starts them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def started(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, "--quick", *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return started


def test_agp_prints_a_row_for_each_epoch(run: Any) -> None:
    lines = run("agp_digits.py", "--epochs", "5", "--algorithm", "l1", "--sparsity", "0.5")
    assert lines[0].split() == ["epoch", "sparsity", "loss", "accuracy"]
    assert [line.split()[1] for line in lines[1:6]] == [
        "0.00%",
        "0.00%",
        "0.00%",
        "50.00%",
        "50.00%",
    ]
    assert lines[6].endswith("of 10,138 parameters are 0")
    assert int(lines[6].split()[0].replace(",", "")) >= 4680  # half of the convolutions' weights


def test_agp_logs_for_tensorboard(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    lines = run("agp_digits.py", "--epochs", "2", "--tensorboard", str(tmp_path))
    assert len(lines) == 4
    assert [file.name[:7] for file in tmp_path.iterdir()] == ["events."]


def test_tickets_beside_weights_drawn_anew(run: Any) -> None:
    lines = run("lottery_ticket_digits.py", "--epochs", "1", "--rounds", "2", "--rewind-step", "2")
    assert lines[0].split() == ["round", "weights", "left", "ticket", "drawn", "anew"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["0", "100.0%"],
        ["1", "17.3%"],
        ["2", "3.0%"],
    ]


def test_rounds_with_distillation(run: Any, tmp_path: Path) -> None:
    arguments = ("--epochs", "1", "--rounds", "2", "--state", str(tmp_path / "state"))
    lines = run("iterative_distillation.py", *arguments)
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "11,", "21"], ["2", "7,", "13"]]
    assert [line.split()[0] for line in lines[5:7]] == ["dense", "small"]
    again = run("iterative_distillation.py", *arguments)  # all is done
    assert again[0] == lines[0]
    assert again[3].split()[0] == "dense"


@pytest.mark.parametrize("search", ["annealing", "netadapt"])
def test_a_search_beside_the_same_sparsity_everywhere(
    run: Any, tmp_path: Path, search: str
) -> None:
    lines = run("search_digits.py", "--epochs", "1", "--search", search, "--folder", str(tmp_path))
    assert any("(taken)" in line for line in lines)
    assert [line.split()[0] for line in lines[-4:-1]] == ["dense", "searched", "uniform"]
    assert (tmp_path / "search_result.json").is_file()
