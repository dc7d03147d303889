"""Searches: the space, the budget, annealing, NetAdapt and AutoCompress, stopping and going on."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import randomise
from snapshots import assert_unchanged, snapshot
from torch import Tensor, nn

from compress import (
    AutoCompressPruner,
    Evaluator,
    L1FilterPruner,
    LevelPruner,
    ModelSpeedup,
    NetAdaptPruner,
    SimulatedAnnealingPruner,
    TaylorFOWeightFilterPruner,
    load,
    save,
)
from compress.errors import ConfigError, SearchError, StateError
from compress.measure import summarize
from compress.search.measuring import chosen_metric, read_metrics
from compress.search.put_back import put_back
from compress.search.space import SearchSpace
from compress.search.subject import Subject

HALF = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Planted(nn.Module):
    """A residual net of which ``wide`` has 28 of 32 filters that hardly count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.back = nn.Conv2d(32, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.back(torch.relu(self.norm(self.wide(x))))
        x = torch.relu(self.narrow(x))
        return self.head(x.mean((2, 3)))


def planted() -> Planted:
    torch.manual_seed(1)
    model = Planted()
    randomise(model)
    with torch.no_grad():
        model.wide.weight[4:] *= 1e-3
        model.back.weight[:, 4:] *= 1e-3
    return model.eval()


class Likeness:
    """How near a model's outputs are to a reference: 0 is the same, less is worse."""

    def __init__(self, model: nn.Module, x: Tensor = X) -> None:
        self.x = x
        with torch.no_grad():
            self.expected = model(x)
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            return -float((model(self.x) - self.expected).square().mean())


def annealing(model: nn.Module, evaluate: Any, **arguments: Any) -> SimulatedAnnealingPruner:
    given: dict[str, Any] = {"cool_down_rate": 0.8, "progress": False, **arguments}
    return SimulatedAnnealingPruner(model, HALF, evaluate, **given)


def subject(model: nn.Module, config_list: Any = HALF, x: Tensor = X) -> Subject:
    given = {"mode": "dependency_aware", "dummy_input": x}
    return Subject(copy.deepcopy(model), L1FilterPruner, config_list, given, x)


def tune(model: nn.Module) -> None:
    """A few steps on random targets, drawn anew."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()


# --- the space and the budget


def test_layers_that_can_only_go_together_are_a_group() -> None:
    space = subject(planted()).space
    assert [group.layers for group in space.groups] == [("stem", "back"), ("wide",), ("narrow",)]
    assert [group.units for group in space.groups] == [16, 32, 16]
    weights = 16 * 3 * 9 + 2 * 32 * 16 * 9 + 16 * 16 * 9
    assert space.weights == weights
    point = space.point({"wide": 0.5})
    assert point.share == pytest.approx(16 * 16 * 9 / weights)


def test_the_ranking_of_a_group_is_what_choosing_takes() -> None:
    model = planted()
    config_list = [{"sparsity": 0.5, "op_types": ["default"]}]
    for net, x in ((model, X), (_heads(), torch.rand(2, 6, 16))):
        space = subject(net, config_list, x).space
        coupling = space.coupling
        assert coupling is not None
        for group in space.groups:
            assert coupling.ranked(group.layers) is not None
            for sparsity in (0.0, 0.1, 0.3, 0.55, 0.9, 1.0):
                gone = coupling.choose(dict.fromkeys(group.layers, sparsity))
                point = space.point({group.name: sparsity})
                assert point.gone is not None
                assert (point.gone == gone).all()


def _heads() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()


@pytest.mark.parametrize("kind", ["sparsity", "params", "flops", "memory"])
def test_the_budget_is_that_of_the_small_model(kind: str) -> None:
    model = planted()
    one = subject(model)
    point = one.scaled({"stem": 0.2, "wide": 1.0, "narrow": 0.5}, 0.4, kind)
    assert 0.4 <= one.saved(point, kind) < 0.5
    small = one.small(point).model
    before, after = summarize(model, X), summarize(small, X)
    if kind == "flops":
        assert one.saved(point, kind) == pytest.approx(1 - after.flops / before.flops)
    if kind == "params":
        share = after.parameters_total / before.parameters_total
        assert one.saved(point, kind) == pytest.approx(1 - share)


def test_a_small_candidate_is_what_a_speedup_makes() -> None:
    model = planted()
    one = subject(model)
    point = one.space.point({"stem": 0.25, "wide": 0.5})
    small = one.small(point).model
    whole = ModelSpeedup(copy.deepcopy(model), X, one.masks(point)).speedup_model()
    assert [tuple(p.shape) for p in small.parameters()] == [
        tuple(p.shape) for p in whole.parameters()
    ]
    torch.testing.assert_close(small(X), whole(X))


def test_masks_of_before_stay_and_count() -> None:
    model = planted()
    LevelPruner(model, [{"sparsity": 0.25, "op_names": ["head"]}]).compress()
    one = subject(model)
    masks = one.masks(one.space.point({"wide": 0.5}))
    assert int((~masks["head"]["weight"]).sum()) == 20


def test_single_weights_have_a_group_for_each_layer() -> None:
    model = planted()
    pruner = annealing(model, Likeness(model), base_algo="level")
    _, masks = pruner.compress()
    assert len(pruner.result.best.sparsities) == 4  # type: ignore[union-attr]
    masked = sum(int((~masks[n]["weight"]).sum()) for n in ("stem", "wide", "back", "narrow"))
    total = sum(masks[n]["weight"].numel() for n in ("stem", "wide", "back", "narrow"))
    assert masked / total == pytest.approx(0.5, abs=0.01)


def test_an_impossible_target_says_what_can_be_reached() -> None:
    model = planted()
    before = snapshot(model)
    config_list = [{"total_sparsity": 0.9, "op_types": ["Conv2d"], "max_sparsity_per_layer": 0.5}]
    pruner = SimulatedAnnealingPruner(model, config_list, Likeness(model))
    with pytest.raises(ConfigError, match=r"got 0\.9; at most 0\.5000 can go"):
        pruner.compress()
    assert_unchanged(before, snapshot(model))


# --- annealing


def test_annealing_finds_what_is_planted() -> None:
    model = planted()
    pruner = annealing(model, Likeness(model), cost="flops", cool_down_rate=0.95)
    _, masks = pruner.compress()
    result = pruner.result
    assert result is not None
    uniform = result.trials[0]
    assert len({round(s, 6) for s in uniform.sparsities.values()}) == 1
    assert result.best.performance > uniform.performance / 2  # losses are negative
    assert result.best.sparsities["wide"] > uniform.sparsities["wide"]
    assert float((~masks["wide"]["weight"]).float().mean()) > uniform.sparsities["wide"]


def test_the_call_of_nni(tmp_path: Path) -> None:
    model = planted()
    pruner = SimulatedAnnealingPruner(
        model,
        HALF,
        evaluator=Likeness(model),
        base_algo="l1",
        cool_down_rate=0.9,
        experiment_data_dir=str(tmp_path),
    )
    pruned, masks = pruner.compress()
    assert pruned is model
    assert len(pruner.result.trials) == 1 + 4 + 16  # type: ignore[union-attr]
    with open(tmp_path / "search_history.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["sparsity", "performance", "config_list"]
    assert len(rows) == 21
    found = json.loads((tmp_path / "search_result.json").read_text())
    best = json.loads(found["config_list"])
    again = L1FilterPruner(planted(), best, mode="dependency_aware", dummy_input=X).calc_masks()
    assert again == masks
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert Likeness(planted())(small) == pytest.approx(found["performance"], rel=1e-4)


def test_a_worse_candidate_is_accepted_as_often_as_the_heat_says() -> None:
    draw, left = random.Random(0), list[int]()

    class Noted(SimulatedAnnealingPruner):
        def _neighbour(self, subject: Any, current: Any, *arguments: Any) -> Any:
            left.append(current.number)
            return super()._neighbour(subject, current, *arguments)

    pruner = Noted(
        planted(), HALF, lambda _: draw.choice([1.0, 0.95, 0.9, 0.0]), dummy_input=X,
        cool_down_rate=0.99, stop_temperature=45, initial_candidates=0, progress=False,
    )  # fmt: skip
    pruner.compress()
    assert pruner.result is not None
    trials = pruner.result.trials
    differences, expected, variance, accepted = [0.0], 0.0, 0.0, 0
    for step, (number, after) in enumerate(pairwise(left)):
        worse = trials[number].performance - trials[step + 1].performance
        differences.append(abs(worse))
        if worse <= 0:
            assert after == step + 1
            continue
        scale = sum(differences) / len(differences)
        chance = 100 ** (-worse / (scale * 0.99**step))
        expected, variance = expected + chance, variance + chance * (1 - chance)
        accepted += after == step + 1
    assert expected > 5
    assert abs(accepted - expected) < 3 * variance**0.5


def test_the_same_seed_makes_the_same_search() -> None:
    def run(seed: int) -> list[float]:
        model = planted()
        pruner = annealing(model, Likeness(model), seed=seed, candidates=2)
        pruner.compress()
        return [trial.performance for trial in pruner.result.trials]  # type: ignore[union-attr]

    first = run(3)
    torch.rand(5)
    assert run(3) == first
    assert run(4) != first


def test_minimizing_is_maximizing_the_negative() -> None:
    one, other = planted(), planted()
    likeness = Likeness(one)
    _, masks = annealing(one, likeness).compress()
    _, same = annealing(other, lambda m: -likeness(m), optimize_mode="minimize").compress()
    assert masks == same


def test_random_numbers_and_modes_go_on_as_before() -> None:
    model = planted().train()
    model.head.eval()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    likeness = Likeness(planted())
    pruner = annealing(model, likeness, fine_tuner=tune)
    state = torch.get_rng_state()
    pruner.compress()
    assert torch.equal(state, torch.get_rng_state())
    assert [name for name, module in model.named_modules() if not module.training] == ["head"]
    for layer in ("stem", "wide"):  # trained copies left nothing behind
        raw = model.get_submodule(layer).parametrizations.weight.original  # type: ignore[union-attr]
        assert any(torch.equal(raw, weight) for weight in weights)  # type: ignore[arg-type]


def test_a_criterion_that_looks_at_data() -> None:
    model = planted()
    batches = [(X, torch.tensor([0, 1, 2, 3]))]
    evaluator = Evaluator(batches, nn.CrossEntropyLoss(), eval_fn=Likeness(model))
    pruner = annealing(model, evaluator, base_algo=TaylorFOWeightFilterPruner)
    _, masks = pruner.compress()
    assert masks.sparsity > 0.3
    with pytest.raises(ConfigError, match="looks at data: pass an Evaluator with a train_loader"):
        annealing(model, Likeness(model), base_algo="taylorfo")


# --- NetAdapt


def test_netadapt_takes_little_steps_from_where_it_costs_least() -> None:
    model = planted()
    pruner = NetAdaptPruner(
        model, HALF, evaluator=Likeness(model), base_algo="l1", sparsity_per_iteration=0.1,
        cost="flops", progress=False,
    )  # fmt: skip
    _, masks = pruner.compress()
    result = pruner.result
    assert result is not None
    assert [trial.stage for trial in result.trials][:3] == [1, 1, 1]
    winners = [
        max((t for t in result.trials if t.stage == stage), key=lambda t: t.performance)
        for stage in range(1, result.trials[-1].stage + 1)
    ]
    flops = [trial.flops or 0 for trial in winners]
    assert flops == sorted(flops, reverse=True)
    assert winners[0].sparsities["wide"] > 0
    assert float((~masks["wide"]["weight"]).float().mean()) > 0.5
    dense = summarize(planted(), X).flops
    assert flops[-1] <= 0.5 * dense
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert summarize(small, X).flops == flops[-1]


def test_netadapt_keeps_what_the_winner_learned(tmp_path: Path) -> None:
    model = planted()
    likeness = Likeness(model)

    def run(model: nn.Module) -> NetAdaptPruner:
        pruner = NetAdaptPruner(
            model, HALF, short_term_fine_tuner=tune, evaluator=likeness, base_algo="l1",
            sparsity_per_iteration=0.2, experiment_data_dir=tmp_path, progress=False,
            dummy_input=X,
        )  # fmt: skip
        pruner.compress()
        return pruner

    weight = model.stem.weight.detach().clone()
    pruner = run(model)
    best = pruner.result.best  # type: ignore[union-attr]
    assert not torch.equal(weight, model.stem.parametrizations.weight.original)
    assert likeness(model) == pytest.approx(best.performance, rel=1e-4)
    calls, other = likeness.calls, planted()
    again = run(other)
    assert likeness.calls == calls
    assert again.masks == pruner.masks
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), other.state_dict().values(), strict=True
    ))  # fmt: skip


class Curved(nn.Module):
    """Sigmoids: masked channels are constants, which go into biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.second(torch.sigmoid(self.first(x)))).mean((2, 3)))


def test_weights_go_back_where_constants_were_moved() -> None:
    torch.manual_seed(0)
    model = Curved().eval()
    likeness = Likeness(model)
    pruner = NetAdaptPruner(
        model, HALF, short_term_fine_tuner=tune, evaluator=likeness, sparsity_per_iteration=0.25,
        progress=False,
    )  # fmt: skip
    pruner.compress()
    best = pruner.result.best  # type: ignore[union-attr]
    assert likeness(model) == pytest.approx(best.performance, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_trained_weights_are_put_back_exactly(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=groups), nn.ReLU(), nn.Conv2d(16, 5, 1),
    )  # fmt: skip
    randomise(model)
    model.eval()
    one = subject(model)
    point = one.scaled({"0": 1.0, "3": 0.5}, 0.4, "sparsity")
    cut = one.small(point)
    small, plan = cut.model, cut.plan
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter))
    put_back(one.model, plan, small.state_dict())
    one.masks(point).apply(one.model)
    torch.testing.assert_close(one.model(X), small(X))


def test_a_layer_of_single_weights_keeps_one() -> None:
    model = planted()
    config_list = [{"sparsity": 0.9, "op_types": ["Conv2d"]}]
    pruner = SimulatedAnnealingPruner(
        model, config_list, Likeness(model), base_algo="level", initial_candidates=20,
        cool_down_rate=0.5, progress=False,
    )  # fmt: skip
    masks = pruner.compress()[1]
    assert all(masks[name]["weight"].any() for name in masks)


# --- AutoCompress


def trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int) -> None:
    model.train()
    optimizer.zero_grad()
    criterion(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def autocompress(model: nn.Module, evaluate: Any, **arguments: Any) -> AutoCompressPruner:
    given: dict[str, Any] = {
        "trainer": trainer, "dummy_input": X, "num_iterations": 2, "optimize_mode": "maximize",
        "base_algo": "l1", "cool_down_rate": 0.5, "admm_num_iterations": 2,
        "admm_training_epochs": 1, "progress": False, **arguments,
    }  # fmt: skip
    return AutoCompressPruner(model, HALF, evaluator=evaluate, **given)


def test_autocompress_gives_a_small_trained_model(tmp_path: Path) -> None:
    model = planted()
    likeness = Likeness(model)
    pruner = autocompress(model, likeness, experiment_data_dir=tmp_path)
    small, masks = pruner.compress()
    assert small is model
    assert not masks
    best = pruner.result.best  # type: ignore[union-attr]
    assert best.parameters == sum(p.numel() for p in model.parameters())
    assert best.flops == summarize(model, X).flops
    assert best.parameters < 0.6 * sum(p.numel() for p in planted().parameters())
    assert likeness(model) == pytest.approx(best.performance, rel=1e-5)
    save(model, tmp_path / "small.safetensors")
    loaded = load(Planted, tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)
    calls, other = likeness.calls, planted()
    autocompress(other, likeness, experiment_data_dir=tmp_path).compress()
    assert likeness.calls == calls
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("killed_at", [3, 6, 8])
def test_a_stopped_autocompress_goes_on(tmp_path: Path, killed_at: int) -> None:
    likeness, whole = Likeness(planted()), planted()
    autocompress(whole, likeness).compress()
    count = likeness.calls

    def dying(model: nn.Module) -> float:
        if likeness.calls == count + killed_at:
            raise KeyboardInterrupt
        return likeness(model)

    model = planted()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        autocompress(model, dying, experiment_data_dir=tmp_path).compress()
    assert_unchanged(before, snapshot(model))
    count = -1
    autocompress(model, dying, experiment_data_dir=tmp_path).compress()
    torch.testing.assert_close(model(X), whole(X), rtol=0, atol=0)


# --- stopping and going on


@pytest.mark.parametrize("make", [annealing, autocompress])
def test_a_folder_of_another_search_is_refused(tmp_path: Path, make: Callable[..., Any]) -> None:
    model = planted()
    likeness = Likeness(model)
    make(model, likeness, experiment_data_dir=tmp_path, seed=1).compress()
    journal = (tmp_path / "search_journal.jsonl").read_bytes()
    other = planted()
    before = snapshot(other)
    with pytest.raises(StateError, match=r"another search \(seed: 1, now 2\)"):
        make(other, likeness, experiment_data_dir=tmp_path, seed=2).compress()
    assert_unchanged(before, snapshot(other))
    assert (tmp_path / "search_journal.jsonl").read_bytes() == journal


def test_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    model = planted()
    likeness = Likeness(model)
    pruner = annealing(model, likeness, experiment_data_dir=tmp_path)
    _, masks = pruner.compress()
    calls = likeness.calls
    lines = (tmp_path / "search_journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "search_journal.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    other = planted()
    _, again = annealing(other, likeness, experiment_data_dir=tmp_path).compress()
    assert again == masks
    assert likeness.calls == calls + len(lines) - 6 + 1  # and the dense model, for its input


# --- what an evaluator returns


class Scores(NamedTuple):
    loss: float
    correct: int


@pytest.mark.parametrize(
    ("value", "metric", "expected"),
    [
        (0.5, None, 0.5),
        (torch.tensor(2.0), None, 2.0),
        (np.float32(2.0), None, 2.0),
        ((0.1, 7), 1, 7.0),
        ({"loss": 0.1, "correct": 7}, "correct", 7.0),
        (Scores(0.1, 7), "loss", 0.1),
        ([3.0], None, 3.0),
    ],
)
def test_numbers_of_any_kind(value: Any, metric: Any, expected: float) -> None:
    assert chosen_metric(read_metrics(value), metric) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("returned", "metric", "match"),
    [
        (None, None, r"returned None \(is there a return\?\); expected a number"),
        (float("nan"), None, "returned nan for 'metric'; expected a finite number"),
        ("good", None, "returned 'good'; expected a number"),
        ((0.1, 7), None, r"several numbers, 0: 0\.1, 1: 7; pass metric= .* metric=0"),
        ({"loss": 1.0}, "accuracy", r"metric: got 'accuracy'; .* 'loss': 1: pass one of these"),
        (torch.ones(3), None, "expected a number"),
    ],
)
def test_what_is_no_number_is_refused(returned: Any, metric: Any, match: str) -> None:
    model = planted()
    before = snapshot(model)
    with pytest.raises(SearchError, match=match):
        annealing(model, lambda m: returned, metric=metric, dummy_input=X).compress()
    assert_unchanged(before, snapshot(model))


def test_several_numbers_are_all_kept() -> None:
    model = planted()
    likeness = Likeness(model)
    pruner = annealing(model, lambda m: {"a": likeness(m), "b": 3}, metric="a")
    pruner.compress()
    best = pruner.result.best  # type: ignore[union-attr]
    assert best.metrics == {"a": best.performance, "b": 3.0}


def test_an_evaluator_that_changes_the_model_is_refused() -> None:
    model = planted().train()
    before = snapshot(model)

    def training(model: nn.Module) -> float:
        model.train()
        with torch.no_grad():
            return float(model(X).sum())

    with pytest.raises(SearchError, match=r"changed 'norm\.running_mean' of the model"):
        annealing(model, training).compress()
    assert_unchanged(before, snapshot(model))


def test_an_evaluator_that_raises_is_told_with_its_words(tmp_path: Path) -> None:
    model = planted()
    before = snapshot(model)

    def first(_: nn.Module) -> float:
        raise OSError("no disk")

    with pytest.raises(SearchError, match="raised on the model as it is: OSError: no disk"):
        annealing(model, first).compress()
    likeness = Likeness(model)

    def later(model: nn.Module) -> float:
        if likeness.calls == 5:
            raise OSError("no disk")
        return likeness(model)

    with pytest.raises(SearchError, match=r"candidate 4 \(stem: .*(?s:.)*OSError: no disk"):
        annealing(model, later, experiment_data_dir=tmp_path).compress()
    assert_unchanged(before, snapshot(model))
    assert len((tmp_path / "search_journal.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cool_down_rate": 1.5}, r"cool_down_rate: got 1\.5; expected one in \(0, 1\)"),
        ({"stop_temperature": 200}, "stop_temperature: got 200 and start_temperature=100"),
        ({"optimize_mode": "max"}, "optimize_mode: got 'max'; expected one of maximize, minimize"),
        ({"cost": "money"}, "cost: got 'money'; expected one of sparsity, params"),
        ({"base_algo": "l3"}, "got 'l3'; expected one of level"),
        ({"base_algo": "level", "cost": "flops"}, "masks single weights, which saves none"),
        ({"candidates": 0}, "candidates: got 0; expected a whole number ≥ 1"),
        ({"fine_tuner": 3}, "fine_tuner: got int; expected a function of a model"),
        ({"seed": -1}, "seed: got -1"),
        ({"perturbation_magnitude": 0}, "perturbation_magnitude: got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    model = planted()
    with pytest.raises(ConfigError, match=match):
        annealing(model, Likeness(model), **arguments)


def test_more_bad_arguments() -> None:
    model = planted()
    with pytest.raises(ConfigError, match="evaluator: got none that scores"):
        SimulatedAnnealingPruner(model, HALF)
    several = [{"sparsity": 0.5, "op_names": ["stem"]}, {"sparsity": 0.2, "op_names": ["wide"]}]
    with pytest.raises(ConfigError, match=r"got the sparsities 0\.2, 0\.5; expected one"):
        SimulatedAnnealingPruner(model, several, Likeness(model))
    with pytest.raises(ConfigError, match="trainer: got None, and nothing else trains"):
        autocompress(model, Likeness(model), trainer=None)
    with pytest.raises(ConfigError, match="two names of one argument"):
        NetAdaptPruner(model, HALF, tune, Likeness(model), fine_tuner=tune)
    with pytest.raises(ConfigError, match=r"sparsity_per_iteration: got 0; expected a number"):
        NetAdaptPruner(model, HALF, tune, Likeness(model), sparsity_per_iteration=0)
    head = [{"sparsity": 0.5, "op_names": ["head"]}]
    with pytest.raises(ConfigError, match="nothing of the layers that the config_list selects"):
        SimulatedAnnealingPruner(model, head, Likeness(model)).compress()


def test_an_evaluator_that_never_calls_the_model_needs_an_input() -> None:
    model = planted()
    with pytest.raises(SearchError, match="dummy_input: got None, and the evaluator called the"):
        annealing(model, lambda m: 1.0).compress()


def test_the_output_is_in_no_group() -> None:
    model = planted()
    space = SearchSpace(
        L1FilterPruner, model, [{"sparsity": 0.5, "op_types": ["Conv2d", "Linear"]}],
        {"mode": "dependency_aware", "dummy_input": X},
    )  # fmt: skip
    assert "head" not in {name for group in space.groups for name in group.layers}
    assert space.reachable < 1
