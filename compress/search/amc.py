"""Search by reinforcement learning."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any

from torch import nn

from compress.config_entry import Entry
from compress.errors import ConfigError, SearchError
from compress.evaluator import Evaluator
from compress.pruners.data import is_count, is_number
from compress.search.base import Found, SearchPruner
from compress.search.ddpg import Agent, Settings
from compress.search.environment import Environment, Episode
from compress.search.measuring import chosen_metric
from compress.search.space import Point
from compress.search.subject import COSTS, Subject
from compress.search.trials import Trial

REWARDS = ("acc_reward", "acc_flops_reward")
_OF_NNI = {  # its other arguments, and what to do in their place
    "model_type": "any model can be traced: leave it out",
    "dataset": "it was a part of the output folder's name: leave it out, or pass suffix=",
    "output_dir": "pass experiment_data_dir=",
    "channel_round": 'pass pruning_params={"round_to": 8}',
    "max_episode_length": "an episode has one step for each group of layers: leave it out",
    "epsilon": "the noise decays by delta_decay: leave it out",
    "debug": "the journal in experiment_data_dir tells all: leave it out",
    **dict.fromkeys(
        ("n_calibration_batches", "n_points_per_layer"),
        "weights are not reconstructed: leave it out, or pass a fine_tuner= with what is to be "
        "done before a candidate is evaluated, such as recalibrate_batch_norms",
    ),
}


class AMCPruner(SearchPruner):
    """Learns, group by group, how much of each is best kept: AutoML for model compression.

    He et al. 2018, AMC: AutoML for Model Compression and Acceleration on Mobile Devices. An
    episode goes through the groups of coupled layers in their order. At each an agent (`Agent`:
    DDPG) sees the state and says how much is kept; where the groups after it could not make up for
    it, less is, so that each episode meets the budget (`Environment`). Then the candidate is
    evaluated, untrained where there is no ``fine_tuner``, and has the reward R:

        acc_reward: R = −Error;  acc_flops_reward: R = −Error·log(FLOPs)

    In the first episode all groups keep the same fraction, in the others of the warm-up a random
    one. After it, noise is on the agent's actions: a normal distribution, cut off at what is
    possible, of σ = ``init_delta·delta_decayⁱ`` in the i-th episode. An episode that ends in a
    small model that has been evaluated takes its reward. The best is that of the highest reward.

    Args:
        model, config_list, **arguments: as `SearchPruner`, but entries have no sparsity. ``cost``
            says of what ``flops_ratio`` is a fraction: "flops", "params", "memory" or "latency".
        evaluator: ``evaluator(val_loader, model)`` -> a number, or several, as NNI v1 has it, or
            with the two in the other order where the first is called ``model``;
            ``evaluator(model)``; without val_loader also an `Evaluator` with an ``eval_fn``.
        val_loader: batches, for the evaluator.
        flops_ratio: what is left at most of the model's FLOPs, in (0, 1]. With 1 only the reward
            acc_flops_reward asks for less.
        lbound, rbound: the fractions of a group's channels that are kept at least and at most.
        reward: "acc_reward", "acc_flops_reward", or ``reward(performance, flops)`` -> a number, of
            which more is better. "acc_flops_reward" takes the performance for an accuracy, in
            percent if the dense model's is above 1; with optimize_mode="minimize" for an error.
        train_episode: episodes in all.
        warmup: the first of them, in which the agent does not act yet.
        candidates: episodes between two updates of the agent. They are evaluated together, as those
            of the warm-up are, so that so many workers are of use.
        window_length: how many of the last states the agent sees.
        suffix: a folder of this name in experiment_data_dir is this search's.
        hidden1, hidden2, lr_a, lr_c, discount, bsize, tau, rmsize, updates: of the agent, as are
            init_delta and delta_decay; their meaning and defaults are in `Settings`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[..., Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        *,
        flops_ratio: float = 0.5,
        lbound: float = 0.2,
        rbound: float = 1.0,
        reward: str | Callable[[float, float], float] = "acc_reward",
        train_episode: int = 800,
        warmup: int = 100,
        candidates: int = 1,
        window_length: int = 1,
        suffix: str | None = None,
        cost: str = "flops",
        **arguments: Any,
    ) -> None:
        self.flops_ratio, self.lbound, self.rbound = flops_ratio, lbound, rbound
        self.reward, self.train_episode, self.warmup = reward, train_episode, warmup
        self.candidates, self.window_length, self.suffix = candidates, window_length, suffix
        self._scorer, self._given_config = evaluator, config_list
        names = [field.name for field in fields(Settings) if field.name in arguments]
        self.settings = Settings(**{name: arguments.pop(name) for name in names})
        _refuse_foreign(arguments)
        folder = arguments.pop("experiment_data_dir", None)
        super().__init__(
            model,
            _with_sparsity(config_list, flops_ratio),
            _with_loader(evaluator, val_loader),
            cost=cost,
            experiment_data_dir=Path(folder, suffix) if folder and suffix else folder,
            **arguments,
        )

    def _search(self, subject: Subject) -> Found:
        environment = Environment(
            subject, self.cost, self.target, self.lbound, self.rbound, self.window_length
        )
        groups = environment.groups
        agent = Agent(environment.size, len(groups), self.settings, self.seed)
        alike = self._uniform(subject).sparsities
        actions = iter([environment.action(alike[group.name]) for group in groups])
        episodes = [environment.play(lambda _: next(actions))]
        episodes += [environment.play(lambda _: agent.draw()) for _ in range(self.warmup - 1)]
        found: dict[bytes, tuple[float, Trial, Point]] = {}
        self._finish(subject, agent, episodes, found, 0)
        later = range(0, self.train_episode - self.warmup, self.candidates)
        for stage, number in enumerate(later, 1):
            agent.learn(len(episodes) if stage > 1 else 1)
            act = partial(agent.act, sigma=self.settings.sigma(number))
            count = min(self.candidates, later.stop - number)
            episodes = [environment.play(act) for _ in range(count)]
            self._finish(subject, agent, episodes, found, stage)
        _, best, point = max(found.values(), key=lambda each: (each[0], -each[1].number))
        return Found(best, subject.masks(point))

    def _finish(
        self,
        subject: Subject,
        agent: Agent,
        episodes: Sequence[Episode],
        found: dict[bytes, tuple[float, Trial, Point]],
        stage: int,
    ) -> None:
        """Evaluate where episodes have led, if nothing is known of it, and let the agent know."""
        ends = {episode.point.key: episode.point for episode in episodes}
        new = {key: point for key, point in ends.items() if key not in found}
        trials = self._evaluate(subject, list(new.values()), stage)
        for (key, point), trial in zip(new.items(), trials, strict=True):
            found[key] = self._reward(trial), trial, point
        for episode in episodes:
            agent.remember(episode.states, episode.actions, found[episode.point.key][0])

    def _reward(self, trial: Trial) -> float:
        if self.reward == "acc_reward":
            return self._gain(trial)
        assert trial.flops is not None, "pruners of single weights were refused"
        if callable(self.reward):
            value = self.reward(trial.performance, trial.flops)
            if not is_number(value):
                raise SearchError(
                    f"reward returned {value!r} for candidate {trial.number}; expected a finite "
                    "number, of which more is better"
                )
            return float(value)
        error = trial.performance
        if self.optimize_mode == "maximize":
            percent = chosen_metric(self._dense, self.metric) > 1
            error = 1 - error / (100 if percent else 1)
        return -error * math.log(trial.flops)

    def _arguments(self) -> dict[str, Any]:
        own = ("flops_ratio", "lbound", "rbound", "reward", "train_episode", "warmup",
               "candidates", "window_length")  # fmt: skip
        found = super()._arguments() | asdict(self.settings)
        if not isinstance(self._scorer, Evaluator):
            found["evaluator"] = self._scorer
        return found | {name: getattr(self, name) for name in own}

    def _problems(self) -> list[str]:
        problems = super()._problems() + self.settings.problems() + self._wrong_counts()
        problems += _sparsities(self._given_config)
        if not (is_number(self.flops_ratio) and 0 < self.flops_ratio <= 1):
            problems.append(f"flops_ratio: got {self.flops_ratio!r}; expected a number in (0, 1]")
        low, high = self.lbound, self.rbound
        if not (is_number(low) and is_number(high) and 0 <= low < high <= 1):
            problems.append(
                f"lbound: got {low!r} and rbound={high!r}; expected fractions that are kept, "
                "0 ≤ lbound < rbound ≤ 1"
            )
        if not callable(self.reward) and self.reward not in REWARDS:
            problems.append(
                f"reward: got {self.reward!r}; expected one of {', '.join(REWARDS)}, or a function "
                "of performance and FLOPs"
            )
        if self.cost == "sparsity":
            problems.append(f"cost: got 'sparsity'; expected one of {', '.join(COSTS[1:])}")
        if self.suffix is not None and not (isinstance(self.suffix, str) and self.suffix):
            problems.append(f"suffix: got {self.suffix!r}; expected the name of a folder")
        return problems

    def _wrong_counts(self) -> list[str]:
        counts = ("train_episode", "warmup", "candidates", "window_length")
        problems = [
            f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ 1"
            for name in counts
            if not is_count(getattr(self, name), 1)
        ]
        if not problems and self.warmup >= self.train_episode:
            problems.append(
                f"warmup: got {self.warmup}, of train_episode={self.train_episode} episodes in "
                "all; expected fewer, so that the agent acts in some"
            )
        return problems


def _with_loader(
    evaluator: Evaluator | Callable[..., Any] | None, val_loader: Any
) -> Evaluator | Callable[..., Any] | None:
    """What scores a model by itself."""
    if val_loader is None:
        return evaluator
    if isinstance(evaluator, Evaluator) or not callable(evaluator):
        raise ConfigError(
            f"val_loader: got one, and the evaluator is {type(evaluator).__name__}; expected "
            "a function evaluator(val_loader, model); an Evaluator has its own batches"
        )
    if not isinstance(val_loader, Iterable) or isinstance(val_loader, Iterator):
        raise ConfigError(
            f"val_loader: got {type(val_loader).__name__}; expected a DataLoader, a list, or what "
            "else can be iterated again for each candidate"
        )
    return Evaluator(val_loader, eval_fn=_Scorer(evaluator, val_loader))


@dataclass(frozen=True)
class _Scorer:
    """Calls an evaluator with the model, and with the loader where it takes one."""

    evaluator: Callable[..., Any]
    val_loader: Any

    def __call__(self, model: nn.Module) -> Any:
        names = self._names()
        if len(names) == 1:
            return self.evaluator(model)
        if names and names[0] in ("model", "net", "network"):
            return self.evaluator(model, self.val_loader)
        return self.evaluator(self.val_loader, model)  # as NNI v1 calls it

    def _names(self) -> list[str]:
        """Of the arguments that have no default; none where it cannot be seen."""
        try:
            parameters = inspect.signature(self.evaluator).parameters.values()
        except (TypeError, ValueError):
            return []
        places = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        return [p.name for p in parameters if p.kind in places and p.default is Parameter.empty]


def _with_sparsity(config_list: Any, flops_ratio: Any) -> Any:
    """The entries as those of other pruners are; how much goes of each layer, the agent says."""
    if not isinstance(config_list, (list, tuple)) or not is_number(flops_ratio):
        return config_list
    total = {"total_sparsity": 1 - flops_ratio}
    return [
        total | dict(entry) if isinstance(entry, Mapping) and not entry.get("exclude") else entry
        for entry in config_list
    ]


def _sparsities(config_list: Any) -> list[str]:
    """Entries that say what flops_ratio says."""
    entries = config_list if isinstance(config_list, (list, tuple)) else ()
    return [
        f"config_list[{index}]: got {key}; flops_ratio says how much goes: leave it out"
        for index, entry in enumerate(entries)
        if isinstance(entry, Mapping)
        for key in Entry.SPARSITIES
        if key in entry
    ]


def _refuse_foreign(arguments: Mapping[str, Any]) -> None:
    problems = [f"{name}: {_OF_NNI[name]}" for name in arguments if name in _OF_NNI]
    if problems:
        raise ConfigError("AMCPruner has no such arguments:", problems)
