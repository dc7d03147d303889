"""Pruners for a model that has not been trained: what its first gradients say.

The gradients are taken in eval mode but for batch norms, which normalise by the batch as they will
in the training; their running statistics say nothing yet. So a batch needs more than one sample
where there are any. Prune, train under the masks, and shrink before or after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress import criteria
from compress.errors import ConfigError
from compress.evaluator import Evaluator, device_of
from compress.progress import progress_bar
from compress.pruners.base import Layer
from compress.pruners.data import MeasuringPruner, differentiate_again
from compress.pruners.oneshot import ChannelPruner, WeightPruner, filter_axis
from compress.unchanged import requiring_gradients


class InitialPruner(MeasuringPruner):
    """Measures a tensor for each weight, of its shape, by which a subclass scores it.

    Args:
        model, config_list, evaluator: as `MeasuringPruner`.
        **arguments: as `MeasuringPruner`.
    """

    _found: Mapping[str, Tensor]

    def _measure(self) -> None:
        weights = self._weights()
        with requiring_gradients(weights.values()):
            found = self._tensors(weights)
        tensors = self._by_layer(found)
        self._refuse_unused(tensors)
        self._found = tensors

    def _tensors(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The gradient of the batches' losses together, by path of the weights that it has."""
        total: dict[str, Tensor] = {}

        def add() -> None:
            for name, weight in weights.items():
                if weight.grad is not None:
                    _add(total, name, weight.grad)

        self.data.measure(
            self.model,
            self.training_batches,
            add,
            backward=True,
            at_start=True,
            progress=self.progress,
        )
        return total


class SNIPPruner(InitialPruner, WeightPruner):
    """Masks the single weights with the smallest |g·w|, g the loss's gradient before training.

    Lee et al. 2019, SNIP: Single-shot Network Pruning based on Connection Sensitivity, eq. 5: what
    the loss feels of a gate on each connection. One ranking over all layers, as there: a
    ``total_sparsity``. Gradients of several batches are added, as for one large batch.

    Args:
        mode: "global" is the paper's; as `LevelPruner` besides.
        **arguments: as `MeasuringPruner`, and ``block_size`` and ``balance`` of `LevelPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        mode: str = "global",
        **arguments: Any,
    ) -> None:
        super().__init__(model, config_list, evaluator, mode=mode, **arguments)

    def score(self, layer: Layer) -> Tensor:
        return criteria.connection_sensitivity(layer.weight, self._found[layer.name])


class SNIPFilterPruner(InitialPruner, ChannelPruner):
    """Masks the filters with the smallest Σ|g·w|: `SNIPPruner`'s score, summed over a filter.

    Which makes a network that is small before it is trained. Modes and options are those of the
    other pruners of filters.
    """

    def score(self, layer: Layer) -> Tensor:
        return criteria.filter_sensitivity(
            layer.weight, self._found[layer.name], *filter_axis(layer.module)
        )


class GraSPPruner(InitialPruner, WeightPruner):
    """Masks the single weights without which the gradient is largest: w·Hg is smallest.

    Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow: without a
    weight, ‖g‖² changes by -2·w·Hg to first order, H the loss's Hessian and g its gradient, over
    the selected weights. One ranking over all layers, as there: a ``total_sparsity``. H and g are
    those of all batches together, which are kept in memory. Needs an `Evaluator`, since a
    ``trainer`` keeps no graph to differentiate again.

    Args:
        temperature: the model's output is divided by it, so that no class is sure of itself (200 as
            in the authors' code). 1 where the model returns no tensor of logits.
        mode: "global" is the paper's; as `LevelPruner` besides.
        **arguments: as `MeasuringPruner`, and ``block_size`` and ``balance`` of `LevelPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        temperature: float = 200.0,
        mode: str = "global",
        **arguments: Any,
    ) -> None:
        self.temperature = temperature
        super().__init__(model, config_list, evaluator, mode=mode, **arguments)

    def score(self, layer: Layer) -> Tensor:
        return criteria.gradient_flow(layer.weight, self._found[layer.name])

    def _problems(self) -> list[str]:
        value = self.temperature
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            return [f"temperature: got {value!r}; expected a number > 0"]
        return super()._problems()

    def _lacking(self, **needs: bool) -> list[str]:
        return super()._lacking(graph=True)

    def _tensors(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Hg, by path of the weights that the batches' losses depend on."""
        with self.data.measuring(self.model, at_start=True), self._tempered():
            batches = list(self.data.batches(self.training_batches, device_of(self.model)))
            with (
                progress_bar("measuring", 2 * len(batches), self.progress) as advance,
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
            ):
                gradient: dict[str, Tensor] = {}
                for batch in batches:
                    for name, value in self._gradients(weights, batch).items():
                        _add(gradient, name, value)
                    advance()
                product: dict[str, Tensor] = {}
                for batch in batches:
                    for name, value in self._products(weights, batch, gradient).items():
                        _add(product, name, value)
                    advance()
        return product

    def _gradients(
        self, weights: Mapping[str, nn.Parameter], batch: Any, again: bool = False
    ) -> dict[str, Tensor]:
        """The batch's gradients; with a graph, to be differentiated ``again``."""
        loss = self.data.loss(self.model, batch)
        found = torch.autograd.grad(
            loss, list(weights.values()), create_graph=again, allow_unused=True
        )
        return {n: g for n, g in zip(weights, found, strict=True) if g is not None}

    def _products(
        self, weights: Mapping[str, nn.Parameter], batch: Any, gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The batch's share of Hg: its Hessian, the gradient of all batches."""
        own = self._gradients(weights, batch, again=True)
        curved = [name for name, value in own.items() if value.requires_grad]
        second = differentiate_again(
            [own[name] for name in curved],
            [weights[name] for name in own],
            [gradient[name] for name in curved],
            who="GraSPPruner",
            instead="SNIPPruner",
        )
        return dict(zip(own, second, strict=True))

    @contextmanager
    def _tempered(self) -> Iterator[None]:
        """The model's output divided by the temperature."""
        reached = False

        def divide(module: nn.Module, _: Any, output: Any) -> Tensor:
            nonlocal reached
            reached = True
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"temperature: got {self.temperature}, which is for logits, and "
                    f"{type(module).__name__} returns a {type(output).__name__}; pass temperature=1"
                )
            return output / self.temperature

        if self.temperature == 1:
            yield
            return
        handle = self.model.register_forward_hook(divide)
        try:
            yield
        finally:
            handle.remove()
        if not reached:
            raise ConfigError(
                f"temperature: got {self.temperature}, and the loss is not of an output of calling "
                f"this {type(self.model).__name__}; pass temperature=1"
            )


def _add(total: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    total[name] = total[name] + value if name in total else value.clone()
