"""The accuracy benchmark: that it runs and goes on, and that its statistics are right."""

import inspect
import json
import math
import sys
from pathlib import Path

import accuracy
import pytest
from accuracy_methods import FILTERS, WEIGHTS, Method, Settings, Trial, all_methods, no_less, shapes
from accuracy_report import Table, comparisons, difference, paired, spread

from compress import pruners

ROOT = Path(__file__).parents[1]
TINY = Settings(widths=(10, 20, 20), dense_epochs=1, batch=64, batches_measured=1)


def record(seed: int, method: str, accuracy: float, sparsity: float = 0.5) -> dict[str, object]:
    counts = {"parameters": 50, "nonzero": 40, "mult_adds": 30, "before": 0.1, "asked": 0.6}
    measured = {"seed": seed, "method": method, "sparsity": sparsity, "accuracy": accuracy}
    return measured | counts


# -- statistics ----------------------------------------------------------------------------


def test_paired_differences_by_hand():
    # Differences 1, 2, 0 and 5 of seeds 0 to 3; seed 4 has no partner.
    left = {0: 3.0, 1: 4.0, 2: 1.0, 3: 9.0, 4: 100.0}
    found = paired(left, {0: 2.0, 1: 2.0, 2: 1.0, 3: 4.0})
    # Mean 2, variance (1 + 0 + 4 + 9) / 3, and 3.182446 is t's 97.5 % quantile of 3 degrees.
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert (found.wins, found.ties, found.losses) == (3, 1, 0)
    assert found.verdict == "even"


def test_a_pair_needs_two_seeds():
    assert paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 3.0}) is None
    assert difference(None) == "–"


@pytest.mark.parametrize(("sign", "verdict"), [(1, "ahead"), (-1, "behind")])
def test_what_excludes_zero_is_told_apart(sign, verdict):
    zero = dict.fromkeys(range(3), 0.0)
    found = paired({0: sign * 0.010, 1: sign * 0.011, 2: sign * 0.012}, zero)
    assert found.verdict == verdict
    ahead, behind = "**+1.1 [+0.9, +1.3]** 3–0–0", "**−1.1 [−1.3, −0.9]** 0–0–3"
    assert difference(found) == (ahead if sign > 0 else behind)


def test_spread_is_that_of_a_sample():
    assert spread([0.90, 0.94]) == "92.0 ± 2.8"
    assert spread([0.9]) == "90.0"


def test_comparisons_pair_the_right_methods():
    ours, theirs = Method("L1", "dependency_aware"), Method("L1", "local", tool="Torch-Pruning")
    alone = Method("L1", "normal", equal_cost=True)
    records = [record(seed, ours.name, 0.9) for seed in range(3)]
    records += [record(seed, theirs.name, 0.8) for seed in range(3)]
    records += [record(seed, alone.name, 0.95) for seed in range(3)]
    found = comparisons(Table(records))
    assert found["Beside Torch-Pruning, same criterion"][1][0] == "L1"
    assert found["Beside Torch-Pruning, same criterion"][1][1].startswith("**+10.0")
    assert found["dependency_aware beside normal, equal mult-adds"][1][1].startswith("**−5.0")


# -- methods -------------------------------------------------------------------------------


def test_every_method_has_its_own_name():
    names = [method.name for method in all_methods()]
    assert len(set(names)) == len(names)


def test_equal_cost_is_the_highest_sparsity_that_leaves_as_much():
    # Costs fall by steps of 10; above 0.7 nothing can be reached, or layers are skipped.
    for beyond in (None, 90):

        def cost(sparsity, beyond=beyond):
            return beyond if sparsity > 0.7 else 100 - 10 * math.floor(10 * sparsity)

        assert cost(no_less(cost, 60)) == cost(no_less(cost, 55)) == 60
        assert cost(no_less(cost, 60, low=0.3)) == 60
        assert cost(no_less(cost, 0)) == 40


def test_both_tools_cut_the_same_sizes_and_leave_the_dense_model_alone():
    pytest.importorskip("torch_pruning")
    trial = Trial(TINY, 0)
    before = {name: value.clone() for name, value in trial.dense.state_dict().items()}
    ours = shapes(trial.cut(Method("L1", "dependency_aware"), 0.7))
    theirs = shapes(trial.cut(Method("L1", "local", tool="Torch-Pruning"), 0.7))
    assert ours == theirs
    assert ours["blocks.1.conv1.weight"] == (6, 3, 3, 3)
    after = trial.dense.state_dict()
    assert all(bool((after[name] == value).all()) for name, value in before.items())


def test_a_method_at_equal_cost_keeps_no_less_than_the_groups_do():
    trial = Trial(TINY, 0)
    coupled = trial.run(Method("L2", "dependency_aware"), 0.5)
    alone = trial.run(Method("L2", "normal", equal_cost=True), 0.5)
    wider = trial.run(Method("L2", "normal"), 0.5)
    assert coupled["mult_adds"] <= alone["mult_adds"] < wider["mult_adds"]
    assert alone["asked"] > 0.5


def test_all_pruners_are_compared():
    kinds = {kind for kind in vars(pruners).values() if isinstance(kind, type)}
    concrete = {kind for kind in kinds if not inspect.isabstract(kind)}
    compared = {
        *FILTERS.values(),
        *(kind for kind, _ in WEIGHTS.values()),
        pruners.SNIPFilterPruner,
    }
    assert {kind.__name__ for kind in concrete} == {kind.__name__ for kind in compared}


# -- the script ----------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The script with arguments, in this process; it measures in one of its own."""
    pytest.importorskip("torch_pruning")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the tests run without an install, too

    def start(*arguments):
        given = ["--quick", "--seeds", "1", "--json", str(tmp_path / "found.json"), *arguments]
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *given])
        accuracy.main()

    return start


def test_it_measures_only_what_is_missing_and_reports(run, tmp_path):
    path = tmp_path / "found.json"
    run("--sparsities", "0.5", "--pruners", "Dense", "Level")
    found = json.loads(path.read_text())
    assert [r["method"] for r in found["records"]] == ["Dense, as trained", "Level, normal"]
    assert set(found["records"][0]) >= {"seed", "commit", "accuracy", "parameters", "mult_adds"}
    assert found["settings"]["tuning_epochs"] == 2 and "torch" in found["versions"]
    assert "| Level, normal |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000

    kept = found["records"][0] | {"accuracy": 0.123}  # would be lost if it were measured again
    path.write_text(json.dumps(found | {"records": [kept]}))
    run("--sparsities", "0.5", "--pruners", "Dense")
    assert json.loads(path.read_text())["records"] == [kept]


def test_it_refuses_what_it_cannot_compare_or_does_not_know(run, tmp_path):
    with pytest.raises(SystemExit, match="no such pruner: L3; there are Dense, From scratch, L1"):
        run("--pruners", "L3")
    made = {"settings": {}, "versions": {}, "machine": "", "records": [record(0, "x", 0.5)]}
    (tmp_path / "found.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match="its settings and versions are not those of this run"):
        run()


def test_a_process_that_fails_says_why(run, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "QUICK", Settings(widths=(0, 0, 0), dense_epochs=1))
    with pytest.raises(SystemExit, match=r"seed 0: \w*Error: "):
        run("--pruners", "Dense")
