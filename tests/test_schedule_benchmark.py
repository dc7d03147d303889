"""The tables of the benchmark of schedules, of numbers by hand."""

from __future__ import annotations

import pytest
import schedules
from parts import paired
from schedules import Digits, left, overhead_table, rounds_table, sparse_table, width_for
from torch import nn

from compress import LevelPruner


def test_paired_differences_by_hand() -> None:
    # mean 2 points, standard deviation 1, n = 3: 4.303 · 1 / √3
    assert paired([0.01, 0.02, 0.03]) == "+2.00 ± 2.48 | 3 of 3, 0 ties"
    assert paired([-0.01, 0.0, 0.01]) == "+0.00 ± 2.48 | 1 of 3, 1 ties"


def test_the_dense_network_has_at_least_as_many_parameters() -> None:
    model = Digits(4)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert left(Digits(width_for(count - 1))) >= count - 1
    assert width_for(count) <= 4
    _, masks = LevelPruner(model, [{"sparsity": 0.5, "op_names": ["fc"]}]).compress()
    assert left(model, masks) == count - 40
    assert isinstance(model, nn.Module)


def test_a_row_of_each_table() -> None:
    raw = [
        {"sparsity": 0.9, "large_sparse": 0.98, "small_dense": dense, "parameters_sparse": 1000,
         "parameters_dense": 1010} for dense in (0.97, 0.95)
    ]  # fmt: skip
    line = sparse_table(raw)[4]
    assert line.startswith("| 90% | 1,000 | 1,010 | 98.00% | 96.00% | +2.00 ± ")
    row = {"dense": 0.99, "one_shot": 0.9, "rounds": 0.95, "dense_mult_adds": 100}
    raw = [row | {"one_shot_mult_adds": 10, "rounds_mult_adds": 10}] * 2
    assert "99.00% | 90.00% | 95.00% | 10.0%, 10.0% | +5.00 ± 0.00 | 2 of 2" in rounds_table(raw)[4]
    found = {"image": 32, "plain_s": [1.0, 2.0, 3.0], "masked_s": [2.1], "change_s": [4.0]}
    assert overhead_table([found])[4] == "| 32×32 | 2.000 | 2.100 | +5.0% | 4.00 | +7.0% |"


def test_all_of_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["schedules.py", "--quick", "--only", "rounds"]
    monkeypatch.setattr("sys.argv", arguments)
    schedules.main()
    assert "| dense | one-shot | rounds |" in capsys.readouterr().out
