"""Sensitivity: the curves of each layer, and the search that follows them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_jobs import CONFIG, evaluate, network, pool, tune
from torch import nn

from compress import L1FilterPruner, ModelSpeedup, SensitivityPruner, sensitivity_analysis
from compress.errors import ConfigError, SearchError, StateError
from compress.masks import applied_masks
from compress.search import Sensitivity

CURVES = Sensitivity(
    {"a": {0.25: 0.9, 0.5: 0.5}, "b": {0.25: 0.88}}, 0.9, {"a": ("a", "c"), "b": ("b",)}
)
EASY = {"acc_drop_threshold": 0.001, "sparsity_per_iter": None, "sparsities": (0.25, 0.5, 0.75)}


# -- the curves ----------------------------------------------------------------------------


def test_each_curve_is_that_of_the_layer_alone() -> None:
    found = sensitivity_analysis(network(), CONFIG, evaluate, (0.25, 0.5))
    assert list(found.performances) == ["0", "3", "5"] and found.dense == evaluate(network())
    for name, curve in found.performances.items():
        for sparsity, performance in curve.items():
            model = network()
            one = [{"sparsity": sparsity, "op_names": [name]}]
            x = torch.rand(2, 1, 6, 6)
            masks = L1FilterPruner(model, one, mode="dependency_aware", dummy_input=x).compress()[1]
            small = ModelSpeedup(model, x, masks).speedup_model()
            assert performance == pytest.approx(evaluate(small), abs=1e-7)
    assert "dense: -0" in str(found) and "0.25" in str(found)


def test_the_model_is_never_changed_and_needs_no_sparsity() -> None:
    model = network()
    config_list = [{"op_types": ["Conv2d"]}, {"op_names": ["3"], "exclude": True}]
    found = sensitivity_analysis(model, config_list, evaluate, [0.5])
    assert list(found.performances) == ["0", "5"]
    assert not applied_masks(model)
    for name, tensor in network().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_coupled_layers_are_one() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Linear(4 * 16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x).relu()
            return self.last((x + self.two(x)).relu().flatten(1))

    torch.manual_seed(0)
    found = sensitivity_analysis(Residual(), CONFIG, evaluate, [0.5])
    assert found.layers == {"one": ("one", "two")}


def test_what_masks_nothing_new_is_not_evaluated_again() -> None:
    asked: list[nn.Module] = []

    def counted(model: nn.Module) -> float:
        asked.append(model)
        return evaluate(model)

    found = sensitivity_analysis(network(), CONFIG, counted, (0.05, 0.5, 0.6))
    # Of 8, 12 and 6 filters 0.05 takes none; 0.6 of 8 and of 6 are as many as 0.5 of them.
    assert len(asked) == 1 + 3 + 1
    assert all(curve[0.05] == found.dense for curve in found.performances.values())
    assert found.performances["0"][0.6] == found.performances["0"][0.5]


def test_a_layer_that_has_become_too_bad_is_left() -> None:
    whole = sensitivity_analysis(network(), CONFIG, evaluate)
    assert whole.dense is not None
    drop = (whole.dense - min(min(curve.values()) for curve in whole.performances.values())) / 2
    found = sensitivity_analysis(network(), CONFIG, evaluate, max_drop=drop)
    for name, curve in found.performances.items():
        bad = [s for s, value in whole.performances[name].items() if whole.dense - value > drop]
        expected = {s: v for s, v in whole.performances[name].items() if not bad or s <= bad[0]}
        assert curve == expected
    assert any(len(curve) < 9 for curve in found.performances.values())


def test_single_weights() -> None:
    found = sensitivity_analysis(network(), CONFIG, evaluate, (0.5, 0.9), base_algo="level")
    assert list(found.performances) == ["0", "3", "5"]
    assert all(curve[0.9] < curve[0.5] < 0 for curve in found.performances.values())


def test_what_each_bears_is_interpolated_by_hand() -> None:
    assert CURVES.bearable(0.2) == {"a": pytest.approx(0.375), "b": 0.25}
    assert CURVES.bearable(0.01) == {"a": pytest.approx(0.25625), "b": pytest.approx(0.125)}
    less = replace(CURVES, performances={"a": {0.5: 1.9}}, maximize=False)
    assert less.bearable(0.5) == {"a": pytest.approx(0.25)}


# -- as files ------------------------------------------------------------------------------


def test_a_csv_is_as_nni_has_it(tmp_path: Path) -> None:
    CURVES.export(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["layername", "0.25", "0.5"], ["a", "0.9", "0.5"], ["b", "0.88", ""],
        ]  # fmt: skip
    assert Sensitivity.read(tmp_path / "found.csv").performances == CURVES.performances
    # NNI's lines end where the analysis of a layer did.
    (tmp_path / "theirs.csv").write_text("layername,0.25,0.5\na,0.9,0.5\nb,0.88\n")
    theirs = Sensitivity.read(tmp_path / "theirs.csv")
    assert theirs == replace(CURVES, dense=None, layers=None)
    with pytest.raises(SearchError, match=r"dense model is not known.*dense=\.\.\."):
        theirs.bearable(0.1)


def test_json_has_all(tmp_path: Path) -> None:
    CURVES.export(tmp_path / "found.json")
    assert Sensitivity.read(tmp_path / "found.json") == CURVES


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", ""), ("a.csv", "x,1\n"), ("a.csv", "layername,b\n"), ("a.csv", "layername,1\na,b\n"),
     ("a.json", ""), ("a.json", "[]"), ("a.json", "{}")],
)  # fmt: skip
def test_files_of_something_else(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(StateError, match=r"no sensitivities can be read.*export\(\)"):
        Sensitivity.read(tmp_path / name)
    with pytest.raises(StateError, match="FileNotFoundError"):
        Sensitivity.read(tmp_path / "none.csv")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    CURVES.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_gets_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sensitivity_analysis(
        network(), CONFIG, evaluate, (0.25, 0.5), experiment_data_dir=tmp_path
    )
    assert Sensitivity.read(tmp_path / "sensitivity.json") == found
    assert Sensitivity.read(tmp_path / "sensitivity.csv").performances == found.performances
    assert (tmp_path / "sensitivity.png").exists()


# -- the search ----------------------------------------------------------------------------


def search(evaluator: Any = evaluate, **arguments: Any) -> SensitivityPruner:
    pruner = SensitivityPruner(network(), CONFIG, evaluator, **EASY | arguments)
    pruner.compress()
    return pruner


def course(pruner: SensitivityPruner) -> list[Any]:
    assert pruner.result is not None
    return [pruner.result.best.number, *(replace(t, seconds=0.0) for t in pruner.result.trials)]


def test_sparsities_have_the_proportions_of_what_each_bears() -> None:
    pruner = search()
    assert pruner.result is not None and pruner.sensitivity is not None
    best = pruner.result.best
    bears = pruner.sensitivity.bearable(0.001)
    ratios = [best.sparsities[name] / bears[name] for name in bears]
    capped = [name for name, sparsity in best.sparsities.items() if sparsity > 0.83]
    assert len(set(bears.values())) > 1
    assert max(ratios) - min(ratios) < 1e-6 or capped
    assert 0.5 <= best.share < 0.6
    assert best.number == pruner.result.trials[-1].number
    assert pruner.masks and applied_masks(pruner.model)


def test_it_finds_the_layer_that_bears_more() -> None:
    """The second half of one layer's filters is dead: it can go without any loss."""

    def planted() -> nn.Module:
        model = network()
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(model[3], name)[4:] = 0
        return model

    wanted = planted()(torch.linspace(-1, 1, 432).reshape(12, 1, 6, 6).sin()).detach()

    def score(model: nn.Module) -> float:
        x = torch.linspace(-1, 1, 432).reshape(12, 1, 6, 6).sin()
        return -(model(x) - wanted).square().mean().item()

    pruner = SensitivityPruner(planted(), CONFIG, score, acc_drop_threshold=1e-5)
    pruner.compress()
    assert pruner.result is not None
    assert pruner.result.best.sparsities["3"] > 2 * pruner.result.best.sparsities["0"]
    assert pruner.result.best.performance > -1e-6


def test_the_target_grows_and_each_iteration_looks_again() -> None:
    pruner = search(sparsity_per_iter=0.2)
    assert pruner.result is not None
    trials = pruner.result.trials
    last = {trial.stage: trial for trial in trials}
    assert list(last) == [1, 2, 3]
    assert 0.2 <= last[1].share < 0.4 <= last[2].share
    assert 0.5 <= last[3].share < 0.6
    second = next(t for t in trials if t.stage == 2).sparsities
    first = last[1].sparsities
    assert sum(second[name] != first[name] for name in first) == 1  # one group, from there


def test_the_users_proportions() -> None:
    seen: list[Any] = []

    def proportions(performance: float, threshold: float, curves: Any) -> Mapping[str, float]:
        seen.append((performance, threshold, curves))
        return {"0": 1.0, "3": 2.0, "5": 0.0}

    pruner = search(sparsity_proportion_calc=proportions)
    assert pruner.result is not None
    found = pruner.result.best.sparsities
    assert found["3"] == pytest.approx(2 * found["0"]) and found["5"] < 0.01
    ((performance, threshold, curves),) = seen
    assert (performance, threshold) == (evaluate(network()), 0.001)
    assert set(curves) == {"0", "3", "5"} and 0.25 in curves["0"]


@pytest.mark.parametrize("given", [None, {"x": 1.0}, {"0": -1}, {"0": 0, "3": 0}, {"0": "much"}])
def test_proportions_that_are_none(given: Any) -> None:
    with pytest.raises(SearchError, match=r"sparsity_proportion_calc returned.*each of 0, 3, 5"):
        search(sparsity_proportion_calc=lambda *_: given)


def score(model: nn.Module, factor: float, power: int = 1) -> float:
    return factor * evaluate(model) * power


def train(times: int, model: nn.Module) -> None:
    for _ in range(times):
        tune(model)


def test_called_as_with_nni() -> None:
    model = network()
    pruner = SensitivityPruner(model, CONFIG, finetuner=train, evaluator=score, **EASY)
    pruner.compress(
        eval_args=[model, 2.0], eval_kwargs={"power": 3}, finetune_args=[2],
        finetune_kwargs={"model": model},
    )  # fmt: skip
    assert pruner.result is not None and pruner.sensitivity is not None
    plain = search(acc_drop_threshold=0.001 / 6).sensitivity
    assert plain is not None
    for name, curve in plain.performances.items():
        assert pruner.sensitivity.performances[name] == {s: 6 * v for s, v in curve.items()}
    without = SensitivityPruner(network(), CONFIG, score, **EASY)
    without.compress([2.0, 3])
    assert without.sensitivity == pruner.sensitivity
    assert without.result is not None
    assert without.result.best.performance < pruner.result.best.performance  # which is trained


def test_sensitivities_of_a_file(tmp_path: Path) -> None:
    one = search(experiment_data_dir=tmp_path / "one")
    again = SensitivityPruner(network(), CONFIG, evaluate, **EASY)
    again.compress(resume_sensitivity=tmp_path / "one" / "sensitivity.csv")
    assert again.result is not None and one.result is not None
    assert again.result.best.sparsities == one.result.best.sparsities
    assert len(again.result.trials) == 1
    CURVES.export(tmp_path / "other.csv")
    with pytest.raises(ConfigError, match="resume_sensitivity: got the layers a, b; expected 0, 3"):
        SensitivityPruner(network(), CONFIG, evaluate).compress(
            resume_sensitivity=tmp_path / "other.csv"
        )


def test_workers_and_kills_change_nothing(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    given = {"sparsity_per_iter": 0.3, "finetuner": tune}
    here = course(search(experiment_data_dir=tmp_path, **given))
    with pool(2, trains=True) as executor:
        assert course(search(executor=executor, **given)) == here
    journal = tmp_path / "search_journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert course(search(experiment_data_dir=tmp_path, **given)) == here
    torch.set_num_threads(threads)


@pytest.mark.parametrize("base_algo", ["l1", "level"])
def test_what_the_finetuner_trained_is_kept(base_algo: str) -> None:
    model, seen = network(), list[torch.Tensor]()

    def noted(model: nn.Module) -> None:
        seen.append(model[3].weight.detach().abs().sum())  # type: ignore[operator, union-attr]
        tune(model)

    pruner = SensitivityPruner(
        model, CONFIG, evaluate, noted, base_algo=base_algo, acc_drop_threshold=0.001,
        sparsity_per_iter=0.25, sparsities=(0.25, 0.5, 0.75), progress=False,
    )  # fmt: skip
    masks = pruner.compress()[1]
    assert pruner.result is not None
    best = pruner.result.best
    assert evaluate(model) == pytest.approx(best.performance, rel=1e-4)
    assert best.stage == 2 and masks.sparsity >= 0.49
    if base_algo == "l1":
        small = ModelSpeedup(model, torch.rand(2, 1, 6, 6)).speedup_model()
        assert evaluate(small) == pytest.approx(best.performance, rel=1e-4)
        assert sum(p.numel() for p in small.parameters()) == best.parameters
        # The second iteration begins with what the first one trained, cut further.
        assert not any(torch.equal(dense, seen[1]) for dense in (seen[0],))


def test_what_is_masked_stays_masked_where_weights_are_trained() -> None:
    pruner = SensitivityPruner(
        network(), CONFIG, evaluate, tune, acc_drop_threshold=0.001, sparsity_per_iter=0.2,
        sparsities=(0.25, 0.5, 0.75), progress=False,
        sparsity_proportion_calc=_in_turn(),
    )  # fmt: skip
    masks = pruner.compress()[1]
    assert pruner.result is not None
    chosen = {trial.stage: trial.sparsities for trial in pruner.result.trials}
    for name, sparsity in chosen[1].items():
        assert chosen[max(chosen)][name] >= sparsity
    assert masks.sparsity < 0.6  # not what was chosen anew besides what was gone


def _in_turn() -> Any:
    """Proportions that are all in another layer each time."""
    calls = [0]

    def proportions(performance: float, threshold: float, curves: Mapping[str, Any]) -> Any:
        calls[0] += 1
        return {name: float(i == calls[0] % 2) for i, name in enumerate(curves)}

    return proportions


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError) as told:
        SensitivityPruner(
            network(), CONFIG, evaluate, sparsity_per_iter=1.5, acc_drop_threshold=-1.0,
            sparsities=[0.1, 1.0], sparsity_proportion_calc=3,
        )  # fmt: skip
    names = [problem.split(":")[0] for problem in told.value.problems]
    assert names == [
        "sparsity_per_iter", "acc_drop_threshold", "sparsities", "sparsity_proportion_calc",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="acc_drop_threshold: got None"):
        SensitivityPruner(network(), CONFIG, evaluate, acc_drop_threshold=None)
    with pytest.raises(ConfigError, match=r"(?s)^sensitivity analysis cannot.*sparsities: got"):
        sensitivity_analysis(network(), CONFIG, evaluate, ())
