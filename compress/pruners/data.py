"""Pruners that look at data: the user's arguments, and what is measured before the scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from compress import criteria
from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator, as_evaluator, device_of
from compress.masks import applied_masks, raw_parameter, suspend_masks
from compress.progress import progress_bar
from compress.pruners.base import Layer, Pruner
from compress.pruners.oneshot import ChannelPruner, filter_axis
from compress.unchanged import requiring_gradients


class DataPruner(Pruner):
    """A pruner that needs the user's data.

    What it does with it is done without this pruner's own masks, under those that the model had
    before.

    Args:
        model, config_list: as `Pruner`.
        evaluator: an `Evaluator`; or, as in NNI v1, a function of a model that returns its score.
        trainer: NNI v1's ``trainer(model, optimizer, criterion, epoch)``, in an Evaluator's place.
        optimizer: with ``trainer``: of the model's parameters.
        criterion: with ``trainer``, which is called with it.
        progress: False is no progress bar; there is none where stderr is no terminal.
        **options: as `Pruner`.

    Raises:
        ConfigError: as `Pruner`; or the data is missing, or not enough for this pruner.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        *,
        trainer: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        self.evaluator = as_evaluator(evaluator, trainer, optimizer, criterion)
        self.progress = progress
        super().__init__(model, config_list, **options)

    @property
    def data(self) -> Evaluator:
        """The evaluator; that there is one was checked when the pruner was made."""
        assert self.evaluator is not None
        return self.evaluator

    def _problems(self) -> list[str]:
        """What is wrong with the arguments about data."""
        return self._lacking()

    def _lacking(self, **needs: bool) -> list[str]:
        if self.evaluator is None:
            return [
                "evaluator: got None; it looks at data: pass evaluator=Evaluator(train_loader, "
                "criterion), or trainer=, optimizer= and criterion="
            ]
        problem = self.evaluator.lacks(self.model, **needs)
        return [f"evaluator: {problem}"] if problem else []

    def _check_arguments(self) -> None:
        super()._check_arguments()
        problems = self._problems()
        if problems:
            raise ConfigError("\n  ".join([f"{type(self).__name__} cannot be made:", *problems]))

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """The model without this pruner's masks, but with those that it had before."""
        before = self._masks_before()
        if applied_masks(self.model) == before:
            yield
            return
        with suspend_masks(self.model):
            before.apply(self.model)
            try:
                yield
            finally:
                suspend_masks(self.model)  # not restored: what is below puts its own masks on

    def _users(self) -> dict[str, list[nn.Module]]:
        """The modules of each target: its own, and those that are tied to it."""
        modules = dict(self.model.named_modules())
        return {t.name: [modules[path] for path in t.modules] for t in self.targets}

    def _weights(self) -> dict[str, nn.Parameter]:
        """The raw weights of the targets, by path."""
        modules = dict(self.model.named_modules())
        found = {
            path: raw_parameter(modules[target.modules[0]], name)
            for target in self.targets
            for path, name in zip(target.parameters, target.weights, strict=True)
        }
        return {path: weight for path, weight in found.items() if weight is not None}

    def _by_layer(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the weights' shapes, by path, in the shapes of the layers' weights, by name.

        Without layers of which there is nothing.
        """
        layers = {}
        for target in self.targets:
            tensors = [found[path].detach() for path in target.parameters if path in found]
            if len(tensors) == len(target.parameters):
                layers[target.name] = self.part(self.model, target).gathered(tensors)
        return layers

    def _refuse_unused(self, used: Collection[str]) -> None:
        """Raise CompressError if a target is not among those that were ``used``."""
        unused = [target.name for target in self.targets if target.name not in used]
        if unused:
            raise CompressError(
                f"{type(self).__name__} measured nothing of {', '.join(map(repr, unused))}: no "
                "batch used them, or not by calling the module, or training leaves them frozen; "
                "exclude them, or use other batches"
            )


class MeasuringPruner(DataPruner):
    """A pruner that measures before it scores: it runs batches through the model.

    In eval mode (a ``trainer`` of the user's sets the mode that it likes). The model, the optimizer
    and the random state are the same after.

    Args:
        model, config_list, evaluator: as `DataPruner`.
        training_batches: how many batches to measure; None is all of the loader.
        **arguments: as `DataPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        training_batches: int | None = 8,
        **arguments: Any,
    ) -> None:
        self.training_batches = training_batches
        super().__init__(model, config_list, evaluator, **arguments)

    def _prepare(self) -> None:
        with self._as_before():
            self._measure()

    @abstractmethod
    def _measure(self) -> None:
        """Run batches and keep what `score` needs."""

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.training_batches is not None and not is_count(self.training_batches, 1):
            problems.append(
                f"training_batches: got {self.training_batches!r}; expected a whole number ≥ 1, or "
                "None for all"
            )
        return problems


class GradientPruner(MeasuringPruner, ChannelPruner):
    """Scores filters by the loss's derivatives, summed over batches."""

    _scores: dict[str, Tensor]

    def score(self, layer: Layer) -> Tensor:
        return self._scores[layer.name]


class TaylorFOWeightFilterPruner(GradientPruner):
    """Masks the filters with the smallest Σ(w·g)², summed over batches and a filter's entries.

    An estimate of the squared change of the loss without the filter: Molchanov et al. 2019,
    Importance Estimation for Neural Network Pruning, the first-order criterion on weights,
    I = Σ_s (g_s w_s)². With a ``trainer``, gradients are taken where it calls ``step()``. A weight
    that is used several times is scored once, with the gradient over all of its uses.
    """

    def _measure(self) -> None:
        weights, users = self._weights(), self._users()
        scores: dict[str, Tensor] = {}

        def add() -> None:
            found = {path: w.grad for path, w in weights.items() if w.grad is not None}
            gradients, values = self._by_layer(found), self._by_layer(weights)
            for name, gradient in gradients.items():
                axis = filter_axis(users[name][0])
                score = criteria.taylor_first_order(values[name], gradient, *axis)
                scores[name] = scores[name] + score if name in scores else score

        with requiring_gradients(weights.values()):
            self.data.measure(
                self.model, self.training_batches, add, backward=True, progress=self.progress
            )
        self._refuse_unused(scores)
        self._scores = scores


class OBDFilterPruner(GradientPruner):
    """Masks the filters with the smallest ½ Σ h·w²: LeCun et al. 1990, Optimal Brain Damage.

    h is the diagonal of the loss's Hessian, summed over batches, by Hutchinson's estimate: the mean
    of z ⊙ Hz over random signs z, each of which costs a second backward. (With the empirical Fisher
    Σg² in the Hessian's place, this is `TaylorFOWeightFilterPruner`, but for the ½.) Needs an
    `Evaluator`, since a ``trainer`` keeps no graph to differentiate again. Where training has not
    come to an end, h can be negative: such filters go first, as the loss falls without them.

    Args:
        samples: vectors z for each batch.
        seed: of the pruner's own generator.
        **arguments: as `MeasuringPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        samples: int = 4,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        self.samples = samples
        self.seed = seed
        super().__init__(model, config_list, evaluator, **arguments)

    def _problems(self) -> list[str]:
        if not is_count(self.samples, 1):
            return [f"samples: got {self.samples!r}; expected a whole number ≥ 1"]
        return super()._problems()

    def _lacking(self, **needs: bool) -> list[str]:
        return super()._lacking(graph=True)

    def _measure(self) -> None:
        weights, users = self._weights(), self._users()
        generator = torch.Generator().manual_seed(self.seed)
        curvature: dict[str, Tensor] = {}
        with (
            requiring_gradients(weights.values()),
            self.data.measuring(self.model),
            progress_bar("measuring", self.training_batches, self.progress) as advance,
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
        ):
            for batch in self.data.batches(self.training_batches, device_of(self.model)):
                loss = self.data.loss(self.model, batch)
                for path, diagonal in _hessian_diagonal(loss, weights, self.samples, generator):
                    curvature[path] = curvature[path] + diagonal if path in curvature else diagonal
                advance()
        curved, values = self._by_layer(curvature), self._by_layer(weights)
        self._refuse_unused(curved)
        self._scores = {
            name: criteria.optimal_brain_damage(values[name], h, *filter_axis(users[name][0]))
            for name, h in curved.items()
        }


def _hessian_diagonal(
    loss: Tensor, weights: Mapping[str, Tensor], samples: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Names and z ⊙ Hz / samples, for each sample z and each weight that the loss depends on.

    H is the Hessian over all weights together, so that the other weights' share has mean 0 only.
    """
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
    gradients = {n: g for n, g in zip(weights, found, strict=True) if g is not None}
    for _ in range(samples):
        signs = [
            (torch.randint(0, 2, g.shape, generator=generator) * 2 - 1).to(g)
            for g in gradients.values()
        ]
        second = differentiate_again(
            [g for g in gradients.values() if g.requires_grad],
            [weights[name] for name in gradients],
            [z for z, g in zip(signs, gradients.values(), strict=True) if g.requires_grad],
            who="OBDFilterPruner",
            instead="TaylorFOWeightFilterPruner",
        )
        for name, z, value in zip(gradients, signs, second, strict=True):
            yield name, z * value / samples


def differentiate_again(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    who: str,
    instead: str,
) -> tuple[Tensor, ...]:
    """H·v over the weights, for gradients that have a graph; 0 where the loss is linear in one.

    Raises:
        CompressError: the loss has no second derivative; ``instead`` is a pruner that needs none.
    """
    try:
        return torch.autograd.grad(
            gradients,
            weights,
            vectors,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        raise CompressError(
            f"{who} cannot differentiate this model's loss twice: {error}. Use {instead}, which "
            "needs the gradient only"
        ) from error


def is_count(value: object, least: int) -> bool:
    """Whether a user's argument is a whole number, at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a user's argument is a finite number; bools are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
