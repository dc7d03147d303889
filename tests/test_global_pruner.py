"""Pruning to a cost, by a clock without noise; and by a threshold, on data."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import randomise
from staircase import STEP, Clock, model_ms
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress import GlobalPruner, ModelSpeedup, verify
from compress.cost import cost_model
from compress.cost.calibration import calibrated
from compress.cost.search import Search
from compress.errors import CompressError, ConfigError
from compress.graph.channels import ChannelGraph
from compress.measure import latency


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.one = nn.Conv2d(width, inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.two(F.relu(self.norm(self.one(x)))))


class Net(nn.Module):
    """A stem, two residual blocks, a head: four families of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.a, self.wide, self.b = Block(48, 64), nn.Conv2d(48, 72, 1), Block(72, 40)
        self.fc = nn.Linear(72, 5)

    def forward(self, x):
        return self.fc(self.b(self.wide(self.a(F.relu(self.stem(x))))).mean((2, 3)))


X = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    randomise(model)
    return model.eval()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], v) for n, v in state.items())


# -- a latency -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.5, 0.3, "30 ms", "0.02 s"])
def test_the_measured_time_is_met_and_the_report_tells_it(monkeypatch, target):
    Clock(monkeypatch)
    model = net()
    dense = model_ms(model, X)
    wanted = {0.5: dense / 2, 0.3: dense * 0.3, "30 ms": 30.0, "0.02 s": 20.0}[target]
    pruner = GlobalPruner(model, target=target, dummy_input=X)
    same, masks = pruner.compress()
    assert same is model and masks
    masked = copy.deepcopy(model)
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert verify(small, masked, X)
    reached = model_ms(small, X)
    assert abs(reached / wanted - 1) <= 0.05
    report = pruner.report
    assert report.measured == pytest.approx(reached) and report.dense == pytest.approx(dense)
    assert report.reached == pytest.approx(reached / dense)
    assert report.measured in [made.measured for made in report.rounds]
    assert len(report.rounds) <= 12
    assert report.prediction_error == pytest.approx(report.predicted / reached - 1)
    assert report.kept["stem"] == (48, small.stem.out_channels)
    assert report.kept["a.one"] == (64, small.a.one.out_channels)
    text = str(report)
    assert f"reached: {reached:.2f} ms of {dense:.2f} ms" in text and "stem" in text


def test_counts_are_those_where_the_measured_time_drops(monkeypatch):
    Clock(monkeypatch)
    pruner = GlobalPruner(net(), target=0.4, dummy_input=X)
    pruner.compress()
    left = {name: kept for name, (_, kept) in pruner.report.kept.items()}
    assert left.pop("fc") == 5
    assert all(kept % STEP == 0 for kept in left.values()) and left["a.one"] < 64
    assert left["stem"] == left["a.two"]  # one residual stream


def test_predictions_learn_from_what_was_measured(monkeypatch):
    Clock(monkeypatch)
    pruner = GlobalPruner(net(), target=0.25, dummy_input=X, round_to=8)
    pruner.compress()
    assert abs(pruner.report.prediction_error) < 0.05
    assert pruner.report.measured / pruner.report.dense == pytest.approx(0.25, rel=0.05)


def test_a_target_that_no_cut_meets_says_what_can_be_reached(monkeypatch):
    Clock(monkeypatch)
    model = net()
    state = state_of(model)
    config = [{"op_types": ["default"], "max_sparsity_per_layer": 0.25}]
    pruner = GlobalPruner(model, config, target=0.2, dummy_input=X)
    with pytest.raises(ConfigError, match=r"target: got 20.0% .* least that can be reached") as e:
        pruner.compress()
    least = copy.deepcopy(model)
    bounded = GlobalPruner(least, config, target=0.65, dummy_input=X, tolerance=0.2)
    bounded.compress()
    (percent,) = (w for w in str(e.value).split() if w.startswith("(") and "%" in w)
    assert 0.5 < float(percent.strip("():%")) / 100 <= bounded.report.reached + 0.02
    assert unchanged(model, state)


def test_steps_that_are_too_large_are_an_error_with_what_was_measured(monkeypatch):
    Clock(monkeypatch)
    pruner = GlobalPruner(net(), target=0.5, dummy_input=X, round_to=32, tolerance=0.001)
    with pytest.raises(ConfigError, match=r"no cut of \d+ was within 0% of it: measured .* ms"):
        pruner.compress()


def test_what_was_measured_once_is_not_again(monkeypatch, tmp_path):
    clock, path = Clock(monkeypatch), tmp_path / "table.json"
    _, first = GlobalPruner(net(), target=0.5, dummy_input=X, table=path).compress()
    asked = clock.calls
    _, second = GlobalPruner(net(), target=0.5, dummy_input=X, table=path).compress()
    assert asked > 0 and clock.calls == asked and first == second


def test_a_slower_machine_in_between_changes_nothing_for_a_fraction(monkeypatch):
    clock = Clock(monkeypatch)

    def slower(models, x, *, warmup, repeats, in_turn):
        factor = 1.0 + clock.models  # the same for those that are timed in turn
        found = clock.latencies(models, x, warmup=warmup, repeats=repeats, in_turn=in_turn)
        return {
            name: replace(each, samples_ms=tuple(factor * ms for ms in each.samples_ms))
            for name, each in found.items()
        }

    monkeypatch.setattr("compress.cost.shrunk.latencies", slower)
    model = net()
    dense = model_ms(model, X)
    pruner = GlobalPruner(model, target=0.5, dummy_input=X)
    _, masks = pruner.compress()
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert model_ms(small, X) / dense == pytest.approx(0.5, rel=0.05)


def test_by_the_real_clock(monkeypatch):
    monkeypatch.setattr("compress.cost.shrunk._MOST_MS", 20.0)
    model = net()
    pruner = GlobalPruner(model, target=0.9, dummy_input=X, round_to=16, tolerance=0.9, rounds=2)
    model, masks = pruner.compress()
    assert pruner.report.measured > 0 and pruner.report.predicted > 0
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert small.a.one.out_channels % 16 == 0 and latency(small, X, repeats=2).median_ms > 0


# -- other costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "local"])
@pytest.mark.parametrize(
    ("cost", "target", "value"),
    [
        ("flops", 0.5, None), ("flops", 0.2, None),
        ("params", "60 K", 60e3), ("memory", "500 KB", 500e3),
    ],
)  # fmt: skip
def test_a_size_is_met_as_near_as_one_step_allows(cost, target, value, strategy):
    model = net()
    dense = cost_model(cost, ChannelGraph(model, X)).dense
    wanted = target * dense if value is None else value
    pruner = GlobalPruner(model, cost=cost, target=target, strategy=strategy, dummy_input=X)
    _, masks = pruner.compress()
    small = ModelSpeedup(model, X, masks).speedup_model()
    real = cost_model(cost, ChannelGraph(small, X)).dense
    assert pruner.report.measured == real and pruner.report.dense == dense
    # One channel of the residual stream is the largest step: a fiftieth of the model.
    assert wanted * 0.93 - dense / 50 <= real <= wanted


def test_local_takes_the_same_share_of_every_group():
    model = net()
    pruner = GlobalPruner(model, cost="flops", target=0.5, strategy="local", dummy_input=X)
    pruner.compress()
    shares = [kept / units for name, (units, kept) in pruner.report.kept.items() if name != "fc"]
    assert max(shares) - min(shares) < 0.1 and max(shares) < 0.8


def test_global_takes_where_least_is_lost():
    model = net()
    with torch.no_grad():
        model.a.one.weight[:40] *= 1e-4  # the block has 24 channels that count
    pruner = GlobalPruner(model, cost="flops", target=0.5, dummy_input=X)
    _, masks = pruner.compress()
    keep = masks["a.one"]["weight"].flatten(1).any(1)
    assert not keep[:40].any() and keep[40:].float().mean() > 0.6
    units, kept = pruner.report.kept["stem"]
    assert kept / units > 0.7


def test_shared_weights_and_coupled_groups_go_as_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(6, 16)
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.two.weight = self.one.weight
            self.fc = nn.Linear(16, 3)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.one(torch.relu(x))
            return self.fc(x + self.two(torch.relu(x)))

    torch.manual_seed(0)
    model, x = Shared(), torch.rand(4, 6)
    randomise(model)
    pruner = GlobalPruner(model, cost="params", target=0.5, dummy_input=x)
    _, masks = pruner.compress()
    masked = copy.deepcopy(model)
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert verify(small, masked, x)
    assert small.one.weight is small.two.weight
    width = small.stem.out_features
    assert small.one.weight.shape == (width, width) and width < 16


def test_limits_and_rounding_are_kept():
    config = [
        {"op_names": ["stem", "a.one"], "max_sparsity_per_layer": {"a.one": 0.25}},
        {"exclude": True, "op_names": ["a.two"]},
    ]
    model = net()
    pruner = GlobalPruner(model, config, cost="flops", target=0.9, round_to=8, dummy_input=X)
    pruner.compress()
    kept = {name: kept for name, (_, kept) in pruner.report.kept.items()}
    assert kept == {"stem": 48, "a.one": 48}  # the stem goes along with what is excluded
    with pytest.raises(ConfigError, match=r"least that can be reached is .* at its limit"):
        GlobalPruner(net(), config, cost="flops", target=0.4, dummy_input=X).compress()


@pytest.mark.parametrize("cost", ["flops", "params"])
def test_masks_from_before_stay_and_a_second_call_takes_its_own_off(cost):
    model = net()
    pruner = GlobalPruner(model, cost=cost, target=0.5, dummy_input=X)
    _, first = pruner.compress()
    _, again = pruner.compress()
    assert first == again
    other = GlobalPruner(model, cost=cost, target=0.3, dummy_input=X)
    _, more = other.compress()
    assert more & first == more and more != first


# -- what is wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target: got 0; expected a fraction"),
        ({"target": -0.5}, "target: got -0.5"),
        ({"target": 1.5}, "target: got 1.5"),
        ({"target": math.nan}, "target: got nan"),
        ({"target": "12 parsecs"}, "latency has the units us, µs, ms, s"),
        ({"target": "fast"}, "target: got 'fast'; expected .* text like '12 ms'"),
        ({"target": "0 ms"}, "target: got '0 ms'"),
        ({"target": "3 ms", "cost": "flops"}, "flops has the units none, K, M, G"),
        ({"target": 0.5, "cost": "speed"}, "cost: got 'speed'; expected one of params"),
        ({"target": 0.5, "cost": ["flops"]}, "cost: got"),
        ({"target": 0.5, "strategy": "globle"}, "strategy: got 'globle'; .* mean 'global'"),
        ({"target": 0.5, "threshold": 0.1}, "got target and threshold"),
        ({"threshold": 2}, "threshold: got 2; expected a number in"),
        ({"target": 0.5, "tolerance": 0}, "tolerance: got 0"),
        ({"target": 0.5, "rounds": 0}, "rounds: got 0"),
        ({"target": 0.5, "round_to": 0}, "round_to: got 0"),
        ({"target": 0.5, "dummy_input": None}, "dummy_input: got None"),
        ({"target": 0.5, "base_algo": "l7"}, "got 'l7'"),
        ({"target": 0.5, "pruning_params": {"mode": "global"}}, "got mode='global'"),
        ({"target": 0.5, "base_algo": "taylorfo"}, "evaluator: got None"),
        ({"target": 0.5, "y": torch.zeros(2)}, "y and criterion are for data"),
        ({"target": 0.5, "config_list": [{"sparsity": 0.5, "op_types": ["default"]}]},
         r"config_list\[0\]\['sparsity'\]: a GlobalPruner finds the sparsities"),
        ({"target": 0.5, "config_list": "all"}, "config_list: got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_touched(arguments, message):
    model = net()
    state, seed = state_of(model), torch.random.get_rng_state()
    with pytest.raises(ConfigError, match=message):
        GlobalPruner(model, **{"dummy_input": X, **arguments})
    assert unchanged(model, state) and torch.equal(torch.random.get_rng_state(), seed)


def test_a_target_that_the_model_meets_as_it_is_and_none_at_all():
    with pytest.raises(ConfigError, match=r"target: got 1.00 G, and the model costs .* as it is"):
        GlobalPruner(net(), cost="flops", target="1 G", dummy_input=X).compress()
    with pytest.raises(ConfigError, match="nothing says how much goes"):
        GlobalPruner(net(), dummy_input=X).compress()


def test_the_model_its_modes_and_the_random_state_stay_where_a_search_fails(monkeypatch):
    clock = Clock(monkeypatch)
    model = net().train()
    model.a.two.eval()
    state, seed = state_of(model), torch.random.get_rng_state()

    def broken(*arguments, **options):
        raise RuntimeError("the clock is broken")

    clock.call_ms = broken
    monkeypatch.setattr("compress.cost.table.call_ms", broken)
    with pytest.raises(RuntimeError, match="broken"):
        GlobalPruner(model, target=0.5, dummy_input=X).compress()
    assert unchanged(model, state) and torch.equal(torch.random.get_rng_state(), seed)
    assert model.training and not model.a.two.training


# -- the search by itself ------------------------------------------------------------------


def search(prices, goal, real, tolerance=0.05, rounds=12, path=None):
    """A search whose predictions learn from what is measured, and from nothing else."""
    prices = np.asarray(prices, float)
    known = {}

    def measure(position):
        known[prices[position]] = float(real(position))
        return known[prices[position]]

    def predict(position):
        return float(calibrated(prices[position], known))

    dense = measure(0)
    found = Search(
        prices, path or len(prices), goal, predict, measure,
        tolerance=tolerance, rounds=rounds,
    )  # fmt: skip
    return found, found.run(dense)


def test_a_search_finds_the_position_though_predictions_are_far_off():
    prices = np.linspace(100, 10, 91)
    real = {position: 50 + 1.1 * price**1.1 for position, price in enumerate(prices)}
    found, met = search(prices, 100.0, real.__getitem__)
    assert abs(met.measured / 100 - 1) <= 0.025 and len(found.rounds) <= 4
    assert abs(found.rounds[-1].error) < abs(found.rounds[0].error) / 3


def test_what_is_close_is_measured_again_before_it_counts():
    prices = np.linspace(100, 10, 91)
    real = 20 + 0.8 * prices
    asked = []

    def lucky(position):  # the first cut seems to meet the goal
        asked.append(position)
        return 50.0 if len(asked) == 2 else float(real[position])

    _, met = search(prices, 50.0, lucky)
    assert asked[1] == asked[2] and met.position != asked[1]
    assert abs(real[met.position] / 50 - 1) <= 0.05
    assert asked.count(met.position) == 2


def test_positions_beside_the_path_are_for_where_it_has_none():
    prices = [100.0, 60.0, 30.0, 45.0, 59.0]
    _, met = search(prices, 45.0, prices.__getitem__, path=3)
    assert met.position == 3
    found, met = search(prices, 59.0, prices.__getitem__, path=3)
    assert met.position == 1 and len(found.rounds) == 1


def test_a_search_stops_where_steps_are_too_large():
    prices = [100.0, 60.0, 30.0]
    asked = []
    found, met = search(prices, 45.0, lambda p: asked.append(p) or prices[p], rounds=50)
    assert met is None and len(asked) < 10 and {m.position for m in found.rounds} <= {1, 2}


def test_without_tolerance_the_first_that_does_not_cost_more():
    prices = np.linspace(100, 10, 91)
    real = np.concatenate([prices[:60], prices[60:] + 3])  # something came back
    _, met = search(prices, 30.0, real.__getitem__, tolerance=0.0)
    assert real[met.position] <= 30 < real[met.position - 1]
    _, none = search(prices, 5.0, real.__getitem__, tolerance=0.0)
    assert none is None


# -- x and y -------------------------------------------------------------------------------


def classes(count=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, 6, 6, generator=generator)
    return x, torch.randint(0, 5, (count,), generator=generator)


def planted():
    """A model of which the loss does not feel 20 channels of the block."""
    model = net()
    with torch.no_grad():
        model.a.two.weight[:, :20] = 0
    return model


def importances(model, x, y, strategy):
    """Σ (w·g)² of each filter, divided by the largest; by the definition, one batch at a time."""
    found = {}
    for part, targets in zip(x.split(64), y.split(64), strict=True):
        model.zero_grad()
        F.cross_entropy(model(part), targets).backward()
        for name in ("stem", "a.one", "a.two", "wide", "b.one", "b.two", "fc"):
            weight = model.get_submodule(name).weight
            found[name] = (weight * weight.grad).detach().square().flatten(1).sum(1)
    model.zero_grad()
    most = max(float(values.max()) for values in found.values())
    return {
        name: values / (most if strategy == "global" else values.max())
        for name, values in found.items()
    }


@pytest.mark.parametrize("strategy", ["global", "local"])
def test_what_is_under_the_threshold_goes(strategy):
    model, (x, y) = planted(), classes()
    wanted = importances(model, x, y, strategy)
    stream = (wanted["stem"] + wanted["a.two"]) / 2  # they go together
    before = copy.deepcopy(model)
    small = GlobalPruner(model, x, y).prune(threshold=1e-4, strategy=strategy, device="cpu")
    assert small is model and small(x).shape == before(x).shape
    assert small.a.one.out_channels == int((wanted["a.one"] >= 1e-4).sum()) <= 44
    assert small.stem.out_channels == int((stream >= 1e-4).sum()) < 48


def test_a_threshold_of_all_empties_no_layer():
    model = net()
    x, y = classes()
    small = GlobalPruner(model, x, y).prune(threshold=0.999)
    assert small(x).shape == (40, 5)
    assert small.stem.out_channels >= 1 and small.a.one.out_channels >= 1


def test_validation_shows_both_and_keeps_them(capsys):
    model = planted()
    x, y = classes()
    logits = model(x).detach()
    loss, right = F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
    pruner = GlobalPruner(model, x, y)
    small = pruner.prune(threshold=1e-5, validate=True)
    printed = capsys.readouterr().out
    assert pruner.validation.before.loss == pytest.approx(float(loss), rel=1e-5)
    assert pruner.validation.before.accuracy == pytest.approx(float(right))
    after = F.cross_entropy(small(x).detach(), y)
    assert pruner.validation.after.loss == pytest.approx(float(after), rel=1e-5)
    assert "before" in printed and "after" in printed and f"{float(loss):.4f}" in printed


def test_numbers_as_targets_have_a_squared_error():
    model = net()
    x, _ = classes(20)
    y = torch.rand(20, 5)
    expected = float(F.mse_loss(model(x).detach(), y))
    pruner = GlobalPruner(model, x, y)
    pruner.prune(threshold=1e-6, validate=True)
    assert pruner.validation.before.loss == pytest.approx(expected, rel=1e-5)
    assert pruner.validation.before.accuracy is None


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_datasets_and_loaders(kind):
    x, y = classes()
    data = TensorDataset(x, y)
    data = DataLoader(data, batch_size=64) if kind == "loader" else data
    other = GlobalPruner(planted(), x, y).prune(threshold=1e-5)
    small = GlobalPruner(planted(), data).prune(threshold=1e-5)
    assert small.a.one.out_channels <= 44
    assert torch.allclose(small(x), other(x), rtol=1e-3, atol=1e-3)


def test_the_shuffling_of_a_loader_leaves_the_random_state_alone():
    loader = DataLoader(TensorDataset(*classes()), batch_size=8, shuffle=True)
    seed = torch.random.get_rng_state()
    GlobalPruner(planted(), loader).prune(threshold=1e-5)
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_data_and_a_target():
    x, y = classes()
    model = net()
    small = GlobalPruner(model, x, y, cost="params", target=0.5).prune()
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(
        p.numel() for p in net().parameters()
    )


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(4, 3, 6, 6), None, "y: got NoneType; expected a tensor"),
        (torch.rand(4, 3, 6, 6), torch.zeros(3), r"got shapes \(4, 3, 6, 6\) and \(3,\)"),
        (torch.rand(0, 3, 6, 6), torch.zeros(0), "one at least"),
        (TensorDataset(torch.rand(4, 3)), torch.zeros(4), "leave y out"),
        (TensorDataset(torch.rand(4, 3)), None, r"expected \(\*inputs, target\)"),
    ],
)
def test_data_that_does_not_fit_is_refused(x, y, message):
    with pytest.raises(ConfigError, match=message):
        GlobalPruner(net(), x, y)


def test_targets_that_do_not_fit_the_output_leave_the_model_alone():
    model, (x, _) = net(), classes(8)
    state = state_of(model)
    with pytest.raises(ConfigError, match=r"y: got targets of shape \(8,\)"):
        GlobalPruner(model, x, torch.rand(8)).prune(threshold=0.1)
    with pytest.raises(ConfigError, match="validate=True evaluates on x and y"):
        GlobalPruner(model, dummy_input=X).prune(threshold=0.1, validate=True)
    with pytest.raises(ConfigError, match="threshold: got 0"):
        GlobalPruner(model, x, torch.rand(8, 5)).prune(threshold=0)
    assert unchanged(model, state)


def test_a_speedup_that_fails_leaves_the_masks_as_they_were(monkeypatch):
    model, (x, y) = planted(), classes()
    state = state_of(model)

    def broken(self):
        raise CompressError("no")

    monkeypatch.setattr(ModelSpeedup, "speedup_model", broken)
    with pytest.raises(CompressError, match="no"):
        GlobalPruner(model, x, y).prune(threshold=1e-5, device="cpu")
    assert unchanged(model, state)
