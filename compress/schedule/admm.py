"""Training towards a sparse model by ADMM, and masking what it brought near 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import ConfigError
from compress.evaluator import Evaluator, as_evaluator
from compress.masks import Masks, raw_parameter
from compress.pruners.base import Pruner
from compress.pruners.data import is_count
from compress.schedule.bases import Remasker, base_arguments, base_type
from compress.schedule.entries import resolve_scheduled
from compress.schedule.resumable import ResumablePruner
from compress.schedule.schedules import OneShot


class ADMMPruner(ResumablePruner):
    """Trains with a quadratic penalty that draws the weights to a sparse point, then masks.

    Zhang et al. 2018, A Systematic DNN Weight Pruning Framework using Alternating Direction Method
    of Multipliers; in the scaled form of Boyd et al. 2011, eq. 3.5 to 3.7. In each iteration

    - W ← argmin f(W) + ρ/2·‖W − Z + U‖², by ``training_epochs`` of training,
    - Z ← Π(W + U), in which what the one-shot pruner masks is 0,
    - U ← U + W − Z.

    The norm is squared, as in the papers. Z begins as Π(W), U as 0. At the end W itself is masked.

    Args:
        model, config_list: as `Pruner`.
        evaluator: an `Evaluator` with an ``optimizer_factory``; or NNI v1's ``trainer``,
            ``optimizer`` and ``criterion``.
        num_iterations: how often Z and U are updated.
        training_epochs: passes over the data in each iteration.
        row: ρ, under NNI's name.
        rho: ρ; in the place of ``row``.
        pruning_algorithm, pruning_params, dummy_input, state: as `IterativePruner`.

    Raises:
        ConfigError: lists what is wrong with the config_list or the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        trainer: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        num_iterations: int = 30,
        training_epochs: int = 5,
        row: float = 1e-4,
        rho: float | None = None,
        pruning_algorithm: str | type[Pruner] = "l1",
        pruning_params: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        evaluator = as_evaluator(evaluator, trainer, optimizer, criterion)
        others = ("self", "model", "config_list", "__class__")
        super().__init__(model, {k: v for k, v in locals().items() if k not in others})
        self.num_iterations, self.training_epochs = num_iterations, training_epochs
        self.rho = row if rho is None else rho
        self._check_arguments()
        kind = base_type(pruning_algorithm)
        config = resolve_scheduled(model, config_list, kind, OneShot, 1, {})
        given = base_arguments(kind, pruning_params, evaluator, dummy_input)
        self._remask_with(Remasker(model, config, kind, given), config_list)
        self._targets: dict[str, Tensor] = {}  # Z by path of the weight
        self._duals: dict[str, Tensor] = {}  # U by path of the weight

    def compress(self) -> tuple[nn.Module, Masks]:
        """Train, then mask the model, in place.

        With ``state`` and a file of an earlier run it goes on from there.

        Returns:
            The model that was given, and a copy of its masks.

        Raises:
            StateError: the state is of something else; the model is as it was.
        """
        if self.step is None:
            self._begin()
        if not self._targets:
            self._duals = {name: torch.zeros_like(w) for name, w in self._weights().items()}
            self._targets = self._projected()
        assert self.evaluator is not None, "the constructor asked for it"
        for number in range((self.step or 0) + 1, self.num_iterations + 1):
            self.evaluator.train(self.model, self.training_epochs, self._add_penalty)
            self._update()
            self.step = number
            self._save()
        self._mask(1)
        return self.model, self.masks

    def penalty(self) -> Tensor:
        """ρ/2·Σ‖W − Z + U‖² of now: a number."""
        with torch.no_grad():
            terms = [
                (weight - self._targets[name] + self._duals[name]).square().sum()
                for name, weight in self._weights().items()
            ]
            return self.rho / 2 * torch.stack(terms).sum()

    def _add_penalty(self) -> None:
        """Add the penalty's gradient, ρ·(W − Z + U), where the loss has one."""
        with torch.no_grad():
            for name, weight in self._weights().items():
                if weight.grad is not None:
                    drawn = weight - self._targets[name] + self._duals[name]
                    weight.grad.add_(drawn, alpha=self.rho)

    def _update(self) -> None:
        self._targets = self._projected()
        for name, weight in self._weights().items():
            self._duals[name] += weight.detach() - self._targets[name]

    def _projected(self) -> dict[str, Tensor]:
        """Π(W + U) of each weight."""
        weights = self._weights()
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(self._duals[name])
            try:
                masks = self._remasker.final().flat()
                return {n: w.masked_fill(~masks[n].to(w.device), 0) for n, w in weights.items()}
            finally:
                for name, weight in weights.items():
                    weight.copy_(kept[name])

    def _weights(self) -> dict[str, nn.Parameter]:
        """Of all targets, by path."""
        modules = dict(self.model.named_modules())
        found = {}
        for target in self._remasker.config.targets:
            for path, name in zip(target.parameters, target.weights, strict=True):
                weight = raw_parameter(modules[target.modules[0]], name)
                assert weight is not None, f"{path} was checked by resolve"
                found[path] = weight
        return found

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "targets": self._targets, "duals": self._duals}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        super()._restore(saved)
        weights = self._weights()
        self._targets = {n: value.to(weights[n].device) for n, value in saved["targets"].items()}
        self._duals = {n: value.to(weights[n].device) for n, value in saved["duals"].items()}

    def _check_arguments(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ 1"
            for name in ("num_iterations", "training_epochs")
            if not is_count(getattr(self, name), 1)
        ]
        if isinstance(self.rho, bool) or not isinstance(self.rho, (int, float)) or self.rho < 0:
            problems.append(f"rho: got {self.rho!r}; expected a number ≥ 0, such as 1e-4")
        lacking = "it trains: pass an Evaluator, or trainer, optimizer and criterion"
        if self.evaluator is not None:
            lacking = self.evaluator.lacks(self.model, training=True)
        problems += [f"evaluator: {lacking}"] if lacking else []
        if problems:
            raise ConfigError(f"{type(self).__name__} cannot be made:", problems)
