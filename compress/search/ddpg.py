"""Deep deterministic policy gradients: an agent that learns one number in [0, 1] for each state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.pruners.data import is_count, is_number

_BASELINE_RATE = 0.5  # of the moving average over updates
_PULL = 0.03  # c
_TINY = 1e-12


@dataclass(frozen=True)
class Settings:
    """What an `Agent` is made with; the defaults are the authors' where nothing else is said.

    Attributes:
        hidden1, hidden2: widths of the two hidden layers, of the actor and of the critic.
        lr_a, lr_c: learning rates (Adam) of actor and critic.
        discount: γ.
        bsize: transitions in an update.
        tau: τ, how far the targets follow in an update.
        rmsize: how many episodes are remembered; after them, the oldest is forgotten.
        updates: of the networks, for each episode. The authors have one for each of its steps,
            which is too few for the few groups of a small model.
        init_delta, delta_decay: of the noise: see `sigma`.
    """

    hidden1: int = 300
    hidden2: int = 300
    lr_a: float = 1e-4
    lr_c: float = 1e-3
    discount: float = 1.0
    bsize: int = 64
    tau: float = 0.01
    rmsize: int = 100
    updates: int = 32
    init_delta: float = 0.5
    delta_decay: float = 0.99

    def sigma(self, episode: int) -> float:
        """The standard deviation of the noise, so many episodes after the warm-up."""
        return self.init_delta * self.delta_decay**episode

    def problems(self) -> list[str]:
        """What is wrong with them."""
        found = [
            f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ 1"
            for name in ("hidden1", "hidden2", "bsize", "rmsize", "updates")
            if not is_count(getattr(self, name), 1)
        ]
        for name in ("lr_a", "lr_c", "init_delta"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                found.append(f"{name}: got {value!r}; expected a number above 0")
        for name in ("discount", "tau", "delta_decay"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                found.append(f"{name}: got {value!r}; expected a number in [0, 1]")
        return found


class Agent:
    """An actor μ(s), which acts, and a critic Q(s, a), which says how good that is.

    Lillicrap et al. 2016, Continuous control with deep reinforcement learning, as He et al. 2018
    (AMC, section 3.2) have it: each step of an episode has the reward R of its end, less a baseline
    b, the moving average of earlier rewards; the targets Q' and μ' follow slowly:

        y_i = R_i − b + γ·Q'(s_{i+1}, μ'(s_{i+1})),  without the last term at an episode's end
        critic: minimise mean_i (y_i − Q(s_i, a_i))²;  actor: maximise mean_i Q(s_i, μ(s_i))

    Here R − b is also divided by the rewards' standard deviation, so that their unit does not
    matter; μ(s) is at most the highest action that is possible in s, the last number of s; and
    c·mean_i z(s_i)² is added to the actor's loss, where μ = sigmoid(z): out of a sigmoid that a
    few episodes have saturated, others would not lead back.

    All is computed on the CPU, by one thread and with random numbers of its own: the same seed and
    rewards give the same actions wherever the rewards come from, and torch's are left alone.

    Args:
        size: of a state; its last number is the highest action that is possible in it.
        steps: of an episode.
    """

    def __init__(self, size: int, steps: int, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        self.actor = nn.Sequential(*self._layers(size))
        self.critic = nn.Sequential(*self._layers(size + 1))
        self._targets = deepcopy(self.actor), deepcopy(self.critic)
        self._actor_step = torch.optim.Adam(self.actor.parameters(), settings.lr_a, fused=True)
        self._critic_step = torch.optim.Adam(self.critic.parameters(), settings.lr_c, fused=True)
        self._memory = torch.zeros(settings.rmsize * steps, 2 * size + 3, dtype=torch.float64)
        self._seen = 0
        self._baseline: float | None = None

    def draw(self) -> float:
        """A uniform action."""
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def act(self, state: np.ndarray, sigma: float = 0.0) -> float:
        """An action for a state (size,), from 0 to the highest h that is possible in it.

        It is μ(s), or with σ > 0 drawn of TN(μ(s), σ², 0, h).
        """
        with _one_thread(), torch.no_grad():
            mean = float(_actions(self.actor, torch.from_numpy(state).float()[None])[0])
        if sigma <= 0:
            return mean
        return truncated_normal(mean, sigma, float(state[-1]), self.draw())

    def remember(self, states: np.ndarray, actions: np.ndarray, reward: float) -> None:
        """Take the steps of an episode into the memory.

        Args:
            states: (steps, size).
            actions: (steps,), what was done in them.
            reward: at the end of it.
        """
        following = np.roll(states, -1, axis=0)
        steps = len(states)
        goes_on = (np.arange(steps) < steps - 1)[:, None]
        rows = np.hstack(
            [states, actions[:, None], following, goes_on, np.full((steps, 1), reward)]
        )
        places = (self._seen + np.arange(steps)) % len(self._memory)
        self._memory[torch.from_numpy(places)] = torch.from_numpy(rows)
        self._seen += steps

    def learn(self, episodes: int = 1) -> None:
        """Update all networks, for so many new episodes, by transitions drawn from the memory."""
        with _one_thread(), torch.enable_grad():
            for _ in range(episodes * self.settings.updates):
                self._update()

    def _update(self) -> None:
        states, actions, following, goes_on, rewards = self._batch()
        actor, critic = self._targets
        with torch.no_grad():
            after = critic(torch.hstack([following, _actions(actor, following)[0]]))
            wanted = rewards + self.settings.discount * goes_on * after
        error = F.mse_loss(self.critic(torch.hstack([states, actions])), wanted)
        _descend(self._critic_step, error)
        best, logits = _actions(self.actor, states)
        value = self.critic(torch.hstack([states, best])).mean()
        _descend(self._actor_step, _PULL * logits.square().mean() - value)
        with torch.no_grad():
            for target, of in zip(self._targets, (self.actor, self.critic), strict=True):
                for slow, now in zip(target.parameters(), of.parameters(), strict=True):
                    slow.lerp_(now, self.settings.tau)

    def _batch(self) -> tuple[Tensor, ...]:
        """States, actions, following states, whether the episode goes on, scaled rewards."""
        known = self._memory[: self._seen]
        numbers = (self.settings.bsize,)
        batch = known[torch.randint(len(known), numbers, generator=self.generator)]
        mean = float(batch[:, -1].mean())
        baseline = mean if self._baseline is None else self._baseline
        self._baseline = baseline + _BASELINE_RATE * (mean - baseline)
        spread = float(known[:, -1].std(correction=0))
        batch[:, -1] = (batch[:, -1] - self._baseline) / max(spread, _TINY)
        size = (batch.shape[1] - 3) // 2
        return torch.split(batch.float(), [size, 1, size, 1, 1], dim=1)

    def _layers(self, size: int) -> list[nn.Module]:
        """Linear, ReLU, Linear, ReLU, Linear: to one number; drawn as torch draws them."""
        widths = (size, self.settings.hidden1, self.settings.hidden2, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
            for parameter in layer.parameters():
                bound = 1 / math.sqrt(inputs)
                nn.init.uniform_(parameter, -bound, bound, self.generator)
            layers += [layer, nn.ReLU()]
        return layers[:-1]


def truncated_normal(mean: float, sigma: float, high: float, quantile: float) -> float:
    """The quantile, in [0, 1], of TN(mean, σ², 0, high): a normal distribution, cut off."""
    normal = NormalDist(mean, sigma)
    below, within = normal.cdf(0.0), normal.cdf(high)
    chance = min(max(below + quantile * (within - below), _TINY), 1 - _TINY)
    return min(max(normal.inv_cdf(chance), 0.0), high)


def _actions(actor: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """μ(s) and z(s), (batch, 1), of states (batch, size)."""
    logits = actor(states)
    return torch.minimum(logits.sigmoid(), states[:, -1:]), logits


def _descend(step: torch.optim.Optimizer, loss: Tensor) -> None:
    parameters = step.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    step.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums come out the same on any machine; small networks are fastest so, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
