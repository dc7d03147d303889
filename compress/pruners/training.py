"""Pruners that train first: the masks are of what the training shows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress import criteria
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.pruners.base import Layer
from compress.pruners.data import DataPruner, is_count
from compress.pruners.oneshot import WeightPruner


class TrainingPruner(DataPruner):
    """A pruner whose `compress` trains the model before it masks it.

    Where the training fails, weights and buffers are as before it; where only masking fails
    (weights that became NaN), the trained ones stay. Modes, gradients and random state are as
    before in any case. Masks that the model had before are on while it trains.

    Args:
        model, config_list: as `Pruner`.
        evaluator: an `Evaluator` with an ``optimizer_factory``; or ``trainer``, ``optimizer`` and
            ``criterion``, as `DataPruner`.
        training_epochs: how long.
        **arguments: as `DataPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        training_epochs: int = 10,
        **arguments: Any,
    ) -> None:
        self.training_epochs = training_epochs
        super().__init__(model, config_list, evaluator, **arguments)

    def compress(self) -> tuple[nn.Module, Masks]:
        """Train the model, then mask it, in place: see `Pruner.compress`."""
        if self.training_epochs > 0:
            with self._as_before():
                self._train()
        return super().compress()

    @abstractmethod
    def _before_step(self) -> None:
        """Called in each training step, where the gradients are known."""

    def _train(self) -> None:
        self.data.train(self.model, self.training_epochs, self._before_step, progress=self.progress)

    def _problems(self) -> list[str]:
        if not is_count(self.training_epochs, 0):
            got = f"training_epochs: got {self.training_epochs!r}"
            return [f"{got}; expected a whole number of passes over the data, 0 for none"]
        return super()._problems()

    def _lacking(self, **needs: bool) -> list[str]:
        return super()._lacking(training=True) if self.training_epochs else []


class SlimPruner(TrainingPruner):
    """Masks the channels of the BatchNorms with the smallest |γ|, after training them towards 0.

    `compress` trains for ``training_epochs`` with scale·Σ|γ| added to the loss: its subgradient
    scale·sign(γ) is added to the gradient in each step (Liu et al. 2017, Learning Efficient
    Convolutional Networks through Network Slimming, eq. 1). Then the BatchNorms' weights and biases
    are masked, which silences the channel: a speedup removes its filter, too. The paper's one
    threshold over all layers is ``total_sparsity`` (a fraction of all channels) with
    ``mode="global"``. With ``mode="dependency_aware"`` coupled BatchNorms lose the same channels,
    and the filters that make them are masked along.

    Args:
        scale: weight of the penalty.
        training_epochs: 0 where the model has been trained so already; no data is needed then.
        **arguments: as `TrainingPruner`.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
    )
    granularity: ClassVar[str] = "channels"

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        scale: float = 1e-4,
        **arguments: Any,
    ) -> None:
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or scale < 0:
            raise ConfigError(f"scale: got {scale!r}; expected a number ≥ 0, such as 1e-4")
        self.scale = scale
        super().__init__(model, config_list, evaluator, **arguments)

    def score(self, layer: Layer) -> Tensor:
        return criteria.magnitude(layer.weight)

    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        return {"weight": keep, "bias": keep}

    @classmethod
    def _layer_types(cls) -> tuple[type[nn.Module], ...]:
        return cls.supported_types

    def _train(self) -> None:
        self._gammas = list(self._weights().values())
        super()._train()

    def _before_step(self) -> None:
        with torch.no_grad():
            for gamma in self._gammas:
                if gamma.grad is not None:
                    gamma.grad.add_(gamma.sign(), alpha=self.scale)


class MovementPruner(TrainingPruner, WeightPruner):
    """Masks single weights that training moves towards 0: -Σ w·g over the steps is smallest.

    Sanh et al. 2020, Movement Pruning, eq. 3, without the learning rate, which changes no ranking.
    There weights are masked while training goes on, more and more; here all at the end of
    ``training_epochs``. `calc_masks` needs a `compress` before it, which trains.
    """

    _scores: dict[str, Tensor]

    def score(self, layer: Layer) -> Tensor:
        return self._scores[layer.name]

    def _prepare(self) -> None:
        if not hasattr(self, "_scores"):
            raise CompressError(
                "MovementPruner has no scores yet: they come from training, which compress() does"
            )

    def _train(self) -> None:
        self._trained = self._weights()
        self._sums: dict[str, Tensor] = {}
        super()._train()
        scores = self._by_layer(self._sums)
        self._refuse_unused(scores)
        self._scores = scores

    def _before_step(self) -> None:
        with torch.no_grad():
            for name, weight in self._trained.items():
                if weight.grad is not None:
                    score = criteria.movement(weight, weight.grad)
                    self._sums[name] = self._sums[name] + score if name in self._sums else score

    def _problems(self) -> list[str]:
        if self.training_epochs == 0:
            return ["training_epochs: got 0; its scores come from training: expected 1 or more"]
        return super()._problems()
