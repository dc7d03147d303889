"""AMC: an agent that learns, walks within the budget, and a search that can be stopped."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from digit_networks import Residual, batches
from oracle import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import AMCPruner, Evaluator, ModelSpeedup
from compress.errors import ConfigError, SearchError, StateError
from compress.measure import summarize
from compress.search.ddpg import Agent, Settings, truncated_normal
from compress.search.environment import Environment

QUICK: dict[str, Any] = {
    "train_episode": 8, "warmup": 4, "hidden1": 8, "hidden2": 8, "bsize": 4, "updates": 2,
    "progress": False,
}  # fmt: skip


class Mobile(nn.Module):
    """Two inverted residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
                nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
                nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )  # fmt: skip
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """Attention and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.norm = 4, nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    """Rows of an image as tokens, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 16), nn.Linear(16, 10)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.embed(x.squeeze(1))).mean(1))


NETWORKS = {"resnet": Residual, "mobilenet": Mobile, "transformer": Transformer}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[kind]()
    randomise(model)
    return model.eval()


def accuracy(loader: Any, model: nn.Module) -> float:
    right = [(model(x).argmax(1) == y).float().mean() for x, y in loader]
    return 100 * float(torch.stack(right).mean())


@cache
def loader() -> list[tuple[Tensor, Tensor]]:
    return batches()[:1]


def search(kind: str = "resnet", **arguments: Any) -> AMCPruner:
    model = network(kind)
    types = {type(module).__name__ for module in model.modules()} & {"Conv2d", "Linear"}
    return AMCPruner(model, [{"op_types": sorted(types)}], accuracy, loader(), **QUICK | arguments)


# -- the agent -----------------------------------------------------------------------------


BEST = np.array([0.9, 0.2, 0.6, 0.35])
GROUPS = np.array([
    [0.0, 0.0, 0.25, 0.1, 1.0, 0.5, 0.9],
    [0.33, 0.0, 0.5, 0.25, 0.5, 1.0, 0.6],
    [0.67, 0.0, 1.0, 0.5, 0.25, 0.5, 0.8],
    [1.0, 1.0, 0.6, 1.0, 0.1, 0.1, 0.3],
])  # fmt: skip


def walk(choose: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """States, actions and reward of an episode over four groups; the best actions are `BEST`."""
    states, actions = [], [1.0]
    for group in GROUPS:
        states.append(np.append(group, (actions[-1], 1.0)))
        actions.append(choose(states[-1]))
    taken = np.array(actions[1:])
    return np.array(states), taken, -float(((taken - BEST) ** 2).sum())


def learnt(seed: int, episodes: int = 80, unit: float = 1.0) -> list[float]:
    """The rewards of episodes, the first 25 of them random."""
    settings = Settings(32, 32, lr_a=1e-3, lr_c=5e-3, bsize=32, updates=16, delta_decay=0.93)
    agent, rewards = Agent(9, 4, settings, seed), []
    for episode in range(episodes):
        if episode < 25:
            states, actions, reward = walk(lambda _: agent.draw())
        else:
            agent.learn()
            sigma = settings.sigma(episode - 25)
            states, actions, reward = walk(lambda state: agent.act(state, sigma))  # noqa: B023
        agent.remember(states, actions, reward * unit)
        rewards.append(reward)
    return rewards


@cache
def by_chance() -> float:
    """The reward of the best of 80 random episodes, on average."""
    draw = np.random.default_rng(0)
    actions = draw.random((1000, 80, len(BEST)))
    return float((-((actions - BEST) ** 2).sum(axis=2)).max(axis=1).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_agent_finds_more_than_random_search(seed: int) -> None:
    rewards = learnt(seed)
    assert max(rewards) > by_chance()
    assert np.mean(rewards[-10:]) > 0.5 * np.mean(rewards[:25])  # at last, not by chance


def test_the_unit_of_the_reward_does_not_matter() -> None:
    np.testing.assert_allclose(learnt(0, 29, unit=1024.0), learnt(0, 29), rtol=1e-4)


def test_the_agent_is_the_same_of_the_same_seed_and_leaves_torchs_numbers_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = learnt(1, 29), learnt(1, 29)
    assert first == again != learnt(2, 29)
    assert torch.equal(torch.get_rng_state(), state)


def test_learning_is_the_update_of_the_paper() -> None:
    """One update, computed here: with rewards of no spread but one, and targets that follow."""
    settings = Settings(hidden1=4, hidden2=4, bsize=2, updates=1, tau=0.25, discount=0.5)
    agent = Agent(2, 2, settings, 0)
    states = np.array([[0.1, 1.0], [0.3, 0.4]])
    agent.remember(states, np.array([0.5, 0.6]), 3.0)
    agent.remember(states + np.array([0.1, 0.0]), np.array([0.7, 0.8]), 1.0)
    numbers = torch.randint(4, (2,), generator=copy.deepcopy(agent).generator)
    critic, actor = copy.deepcopy(agent.critic), copy.deepcopy(agent.actor)
    rows = [(0.1, 1.0, 0.5, 3.0), (0.3, 0.4, 0.6, 3.0), (0.2, 1.0, 0.7, 1.0), (0.4, 0.4, 0.8, 1.0)]
    drawn = torch.tensor([rows[i] for i in numbers])
    goes_on = (numbers % 2 == 0).float()[:, None]
    following = torch.tensor([rows[min(i + 1, 3)][:2] for i in numbers])
    reward = drawn[:, 3:] - drawn[:, 3].mean()  # the standard deviation of 3, 3, 1 and 1 is 1
    with torch.no_grad():
        best = torch.minimum(actor(following).sigmoid(), following[:, 1:])
        after = critic(torch.hstack([following, best]))
    wanted = reward + 0.5 * goes_on * after
    step = torch.optim.Adam(critic.parameters(), settings.lr_c)
    F.mse_loss(critic(drawn[:, :3]), wanted).backward()
    step.step()
    before = copy.deepcopy(agent.critic)
    agent.learn()
    for mine, theirs in zip(critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    for old, new, slow in zip(
        before.parameters(), agent.critic.parameters(), agent._targets[1].parameters(), strict=True
    ):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * new)


def test_the_oldest_episodes_are_forgotten() -> None:
    agent = Agent(1, 2, Settings(rmsize=2), 0)
    for number in range(5):
        agent.remember(np.zeros((2, 1)), np.zeros(2), float(number))
    assert sorted(agent._memory[:, -1].tolist()) == [3.0, 3.0, 4.0, 4.0]


def test_noise_stays_within_its_bounds() -> None:
    assert truncated_normal(0.5, 1.0, 1.0, 0.5) == pytest.approx(0.5)
    assert truncated_normal(0.0, 1.0, 1.0, 0.5) == pytest.approx(0.4418, abs=1e-4)  # Φ⁻¹(0.6707)
    for high in (0.0, 0.4, 1.0):
        for mean in (0.0, 0.3 * high, high):
            for sigma in (1e-6, 0.1, 5.0):
                drawn = [truncated_normal(mean, sigma, high, q) for q in (0.0, 0.01, 0.99, 1.0)]
                assert drawn == sorted(drawn)
                assert 0 <= drawn[0] <= drawn[-1] <= high
    assert truncated_normal(0.3, 1e-6, 1.0, 0.9) == pytest.approx(0.3, abs=1e-5)
    assert Settings(init_delta=0.5, delta_decay=0.9).sigma(2) == pytest.approx(0.405)


def test_no_action_is_above_what_is_possible() -> None:
    agent = Agent(2, 1, Settings(8, 8), 0)
    free = agent.act(np.array([0.5, 1.0]))
    assert 0.3 < free < 0.7
    assert agent.act(np.array([0.5, 0.25])) == 0.25
    assert {agent.act(np.array([0.5, 0.25]), 2.0) <= 0.25 for _ in range(50)} == {True}
    assert max(agent.act(np.array([0.5, 1.0]), 2.0) for _ in range(50)) > 0.75


def test_the_actor_comes_back_from_where_first_rewards_led_it() -> None:
    agent = Agent(2, 1, Settings(16, 16, lr_a=1e-2, lr_c=1e-2, bsize=16, updates=60), 0)
    state = np.array([[0.5, 1.0]])
    for action in np.linspace(0, 1, 20):
        agent.remember(state, np.array([action]), float(action))
    agent.learn(4)
    led = agent.act(state[0])
    for action in np.linspace(0, 1, 100):
        agent.remember(state, np.array([action]), -abs(action - 0.3))
    agent.learn(4)
    assert led > 0.9 and abs(agent.act(state[0]) - 0.3) < 0.15


# -- the search ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_episode_meets_the_budget(kind: str) -> None:
    pruner = search(kind, flops_ratio=0.6)
    images = loader()[0][0]
    model, masks = pruner.compress()
    assert model is pruner.model and masks
    assert pruner.result is not None and len(pruner.result.trials) > 4
    dense = summarize(network(kind), images).flops
    flops = [trial.flops or math.inf for trial in pruner.result.trials]
    assert all(each <= 0.6 * dense for each in flops)
    assert max(flops) > 0.5 * dense  # no more goes than has to
    expected = model(images)
    small = ModelSpeedup(model, images).speedup_model()
    torch.testing.assert_close(small(images), expected, rtol=1e-5, atol=1e-5)
    assert summarize(small, images).flops == pytest.approx(pruner.result.best.flops)


def test_each_group_keeps_what_its_bounds_say() -> None:
    pruner = search(flops_ratio=1.0, lbound=0.5, rbound=0.75, train_episode=10)
    pruner.compress()
    assert pruner.result is not None
    found = [s for trial in pruner.result.trials for s in trial.sparsities.values()]
    assert len(found) > 15 and 0.25 <= min(found) < max(found) <= 0.5


def test_max_sparsity_per_layer_is_a_bound_too() -> None:
    entries = [{"op_types": ["Conv2d"], "max_sparsity_per_layer": {"conv2": 0.2}}]
    pruner = AMCPruner(network("resnet"), entries, accuracy, loader(), flops_ratio=0.8, **QUICK)
    pruner.compress()
    assert pruner.result is not None
    assert all(trial.sparsities["conv2"] <= 0.2 for trial in pruner.result.trials)
    assert any(trial.sparsities["conv1"] > 0.2 for trial in pruner.result.trials)


def test_the_first_episode_prunes_all_groups_alike() -> None:
    pruner = search("transformer", flops_ratio=0.7)
    pruner.compress()
    assert pruner.result is not None
    first, second = pruner.result.trials[:2]
    assert max(first.sparsities.values()) - min(first.sparsities.values()) <= 1 / 16
    assert max(second.sparsities.values()) - min(second.sparsities.values()) > 0.3


def test_the_states_are_those_of_the_paper() -> None:
    pruner = search(flops_ratio=0.5, lbound=0.25)
    with pruner._searching() as subject:
        environment = Environment(subject, "flops", 0.8, 0.25, 1.0, window=2)
        episode = environment.play(lambda _: 1.0)
    # conv1 and conv3 (one stream), conv2, hidden: t, kind, n, c, h, w, stride, k
    fixed = [[0, 0, 0.4, 1 / 32, 1, 1, 1, 1], [0.5, 0, 0.3, 0.25, 1, 1, 1, 1],
             [1, 1, 1, 1, 0.125, 0.125, 1, 1 / 3]]  # fmt: skip
    assert [group.layers for group in environment.groups] == [
        ("conv1", "conv3"), ("conv2",), ("hidden",)
    ]  # fmt: skip
    assert episode.states.shape == (3, 26) and environment.size == 26
    now, before = episode.states[:, 13:], episode.states[:, :13]
    np.testing.assert_allclose(now[:, :8], fixed)
    np.testing.assert_array_equal(before, [np.zeros(13), now[0], now[1]])
    alone, reduced, rest, last, highest = now[:, 8:].T
    assert reduced[0] == 0 and (np.diff(reduced) > 0).all()
    assert alone.sum() > rest[0] > 0.5  # coupled: what two groups save of one product counts once
    np.testing.assert_array_equal(last, [1.0, *episode.actions[:-1]])
    np.testing.assert_array_equal(highest, episode.actions)  # all was to be kept
    assert 1 > episode.actions[0] > episode.actions[1]
    assert episode.actions[1:].tolist() == pytest.approx([1 / 9, 1])
    assert episode.states.min() >= 0 and episode.states.max() <= 1


def trials_of(pruner: AMCPruner) -> list[Any]:
    _, masks = pruner.compress()
    assert pruner.result is not None
    found = [replace(trial, seconds=0.0) for trial in pruner.result.trials]
    return [found, pruner.result.best.number, masks]


def test_the_same_seed_gives_the_same_result() -> None:
    found = []
    for other in (5, 6):
        pruner = search(seed=1)
        torch.manual_seed(other)
        state = torch.get_rng_state()
        found.append(trials_of(pruner))
        assert torch.equal(torch.get_rng_state(), state)
    first, again = found
    assert first == again != trials_of(search(seed=2))


def test_a_search_that_was_stopped_goes_on(tmp_path: Any) -> None:
    calls = []

    def counted(loader: Any, model: nn.Module) -> float:
        calls.append(1)
        return accuracy(loader, model)

    def run(suffix: str) -> list[Any]:
        pruner = AMCPruner(
            network("resnet"), [{"op_types": ["Conv2d"]}], counted, loader(),
            experiment_data_dir=tmp_path, suffix=suffix, **QUICK,
        )  # fmt: skip
        return trials_of(pruner)

    whole = run("whole")
    lines = (tmp_path / "whole" / "search_journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole[0]) + 2 == len(calls) + 1
    for kept in (3, len(lines) - 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        torn = b"".join(lines[:kept]) + lines[kept][:20]
        (folder / "search_journal.jsonl").write_bytes(torn)
        calls.clear()
        assert whole == run(str(kept))
        assert len(calls) == len(lines) - kept + 1  # one more: the dense model shows its input
    with pytest.raises(StateError, match="another search"):
        search(experiment_data_dir=tmp_path, suffix="whole").compress()


def test_what_was_evaluated_is_not_evaluated_again() -> None:
    calls = []

    def constant(model: nn.Module) -> float:
        calls.append(model(loader()[0][0]))
        return 1.0

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))
    episodes = {"train_episode": 30, "warmup": 20, "flops_ratio": 1.0, "lbound": 0.0}
    pruner = AMCPruner(model, [{"op_names": ["1"]}], constant, **QUICK | episodes)
    pruner.compress()
    assert pruner.result is not None
    assert len(pruner.result.trials) == 3  # with 1, 2 or 3 units
    assert len(calls) == 4  # and the dense model


def test_episodes_between_updates_are_evaluated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = search(candidates=3, train_episode=12, warmup=4, flops_ratio=0.9)
    asked = []
    evaluate = pruner._evaluate

    def counted(subject: Any, points: Any, stage: int = 0) -> Any:
        asked.append(len(points))
        return evaluate(subject, points, stage)

    monkeypatch.setattr(pruner, "_evaluate", counted)
    pruner.compress()
    assert asked[0] == 4 and len(asked) == 4  # 3, 3 and 2; what is known already is not asked
    assert max(asked[1:]) > 1


# -- rewards and the evaluator --------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def fewer_is_better(model: nn.Module) -> float:
    model(loader()[0][0])
    return sum(parameter.numel() for parameter in model.parameters()) / 1000


def quick(evaluator: Any = fewer_is_better, loader: Any = None, **arguments: Any) -> AMCPruner:
    entries = arguments.pop("config_list", [{"op_types": ["Linear"]}])
    return AMCPruner(small_net(), entries, evaluator, loader, **QUICK | arguments)


def result(pruner: AMCPruner) -> Any:
    pruner.compress()
    assert pruner.result is not None
    return pruner.result


def test_the_best_is_that_of_the_highest_reward() -> None:
    found = result(quick(optimize_mode="minimize", flops_ratio=0.9))
    assert found.best.parameters == min(trial.parameters for trial in found.trials)
    found = result(quick(flops_ratio=0.9))
    assert found.best.parameters == max(trial.parameters for trial in found.trials)
    assert found.best.flops <= 0.9 * summarize(small_net(), loader()[0][0]).flops
    found = result(quick(reward=lambda performance, flops: -abs(flops - 50000), flops_ratio=1.0))
    assert abs(found.best.flops - 50000) == min(abs(t.flops - 50000) for t in found.trials)


@pytest.mark.parametrize("unit", [1, 100])
def test_acc_flops_reward_is_the_error_times_the_logarithm(unit: float) -> None:
    pruner = quick(
        lambda model: unit * fewer_is_better(model), reward="acc_flops_reward", flops_ratio=1.0
    )
    found = result(pruner)
    for trial in found.trials:
        error = 1 - trial.performance / unit
        assert pruner._reward(trial) == pytest.approx(-error * math.log(trial.flops))
    pruner = quick(reward="acc_flops_reward", optimize_mode="minimize")
    found = result(pruner)
    expected = -found.best.performance * math.log(found.best.flops)
    assert pruner._reward(found.best) == pytest.approx(expected)


def test_an_evaluator_may_come_in_each_way() -> None:
    images = loader()

    def with_loader(given: Any, model: nn.Module) -> dict[str, float]:
        assert given is images
        return {"loss": 0.0, "accuracy": accuracy(given, model)}

    def alone(model: nn.Module) -> float:
        return accuracy(images, model)

    def turned(model: nn.Module, given: Any, verbose: bool = False) -> float:
        return accuracy(given, model)

    found = [
        result(quick(with_loader, images, metric="accuracy")),
        result(quick(alone)),
        result(quick(alone, images)),
        result(quick(turned, images)),
        result(quick(Evaluator(eval_fn=alone))),
    ]
    performances = [[trial.performance for trial in each.trials] for each in found]
    assert all(each == performances[0] for each in performances)


def test_the_budget_may_be_of_parameters() -> None:
    found = result(quick(cost="params", flops_ratio=0.4))
    dense = sum(parameter.numel() for parameter in small_net().parameters())
    assert all(trial.parameters <= 0.4 * dense for trial in found.trials)


# -- what is wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flops_ratio": 0}, r"flops_ratio: got 0; expected a number in \(0, 1\]"),
        ({"flops_ratio": "half"}, "flops_ratio: got 'half'"),
        ({"lbound": 0.6, "rbound": 0.5}, "lbound: got 0.6 and rbound=0.5"),
        ({"lbound": float("nan")}, "lbound: got nan"),
        ({"reward": "accuracy"}, "reward: got 'accuracy'; expected one of acc_reward"),
        ({"warmup": 8}, "warmup: got 8, of train_episode=8 episodes"),
        ({"warmup": 0}, "warmup: got 0; expected a whole number"),
        ({"candidates": 1.5}, "candidates: got 1.5"),
        ({"window_length": 0}, "window_length: got 0"),
        ({"lr_a": 0, "tau": 2, "bsize": 0}, "(?s)bsize: got 0.*lr_a: got 0.*tau: got 2"),
        ({"cost": "sparsity"}, "cost: got 'sparsity'; expected one of params, flops"),
        ({"suffix": ""}, "suffix: got ''"),
        ({"base_algo": "level"}, "LevelPruner masks single weights"),
        ({"config_list": [{"sparsity": 0.5, "op_types": ["Linear"]}]}, "got sparsity; flops_ratio"),
        ({"config_list": [{"op_typs": ["Linear"]}]}, "unknown key 'op_typs'"),
        ({"config_list": []}, "expected a list of dicts"),
        ({"loader": 3}, "val_loader: got int; expected a DataLoader"),
        ({"loader": iter([])}, "val_loader: got list_iterator"),
        ({"loader": [], "evaluator": Evaluator(eval_fn=len)}, "the evaluator is Evaluator"),
        ({"evaluator": None}, "evaluator: got none that scores"),
        ({"model_type": "mobilenet", "output_dir": "logs"}, "(?s)leave it out.*experiment_data_"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quick(**arguments)


def test_a_budget_that_cannot_be_met_is_told_and_the_model_is_as_it_was() -> None:
    pruner = quick(flops_ratio=0.1)
    with pytest.raises(ConfigError, match=r"flops: 0.1 of it may stay, and 0.25.. stays where"):
        pruner.compress()
    assert pruner.result is None and not pruner.masks


def test_a_reward_that_is_no_number_is_told() -> None:
    with pytest.raises(
        SearchError, match=r"reward returned nan for candidate 0; expected a finite"
    ):
        quick(reward=lambda performance, flops: float("nan")).compress()
