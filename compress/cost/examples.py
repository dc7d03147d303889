"""Inputs and targets as practitioners have them, x and y, and how good a model is on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from compress.errors import ConfigError
from compress.evaluator import Evaluator
from compress.graph.run import rng_kept
from compress.measure.table import Table


@dataclass(frozen=True)
class Quality:
    """The mean loss of a model over all examples, and the share that it tells right.

    ``accuracy`` is None where the targets are no classes.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Validation:
    """A model before and after; prints as a table."""

    before: Quality
    after: Quality

    def __str__(self) -> str:
        rows = [
            (name, f"{each.loss:.4f}", "" if each.accuracy is None else f"{each.accuracy:.2%}")
            for name, each in (("before", self.before), ("after", self.after))
        ]
        return str(Table(("", "loss", "accuracy"), tuple(rows)))


class Examples(Evaluator):
    """An `Evaluator` of inputs x and targets y.

    The loss is the cross-entropy where targets are integers, the squared error where they are not.

    Args:
        x: inputs, a tensor with an example in each row; or a loader or a dataset of
            ``(*inputs, target)``, and then there is no y.
        y: the targets of a tensor x.
        criterion: another loss, ``criterion(output, target)`` -> mean over the batch.
        batch_size: of tensors and datasets.

    Raises:
        ConfigError: x and y do not fit.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        criterion: Callable[..., Tensor] | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(_loader(x, y, batch_size), criterion or _fitting_loss)

    @property
    def inputs(self) -> Any:
        """Those of the first batch, as a model takes them."""
        with rng_kept():
            batch = next(self.batches(1))
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ConfigError(
                f"x: gives batches of type {type(batch).__name__}; expected (*inputs, target)"
            )
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])

    def quality(self, model: nn.Module) -> Quality:
        """How good a model is on all examples; it is as before."""
        loss, right, answers, examples = 0.0, 0, 0, 0
        with self.measuring(model), torch.no_grad():
            device = next((p.device for p in model.parameters()), None)
            for batch in self.batches(device=device):
                output, target = self.forward(model, batch), batch[-1]
                assert self.criterion is not None
                loss += float(self.criterion(output, target)) * len(target)
                examples += len(target)
                if _classes(target):
                    right += int((output.argmax(1) == target).sum())
                    answers += target.numel()
        return Quality(loss / examples, right / answers if answers else None)


def is_data(given: Any) -> bool:
    """Whether something is examples, and no config_list."""
    return isinstance(given, (Tensor, Dataset, DataLoader))


def _loader(x: Any, y: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(x, Tensor):
        if not isinstance(y, Tensor):
            raise ConfigError(f"y: got {type(y).__name__}; expected a tensor, a target for each x")
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y) or not len(x):
            raise ConfigError(
                f"x and y: got shapes {tuple(x.shape)} and {tuple(y.shape)}; expected as many "
                "targets as inputs, and one at least"
            )
        return DataLoader(TensorDataset(x, y), batch_size)
    if y is not None:
        raise ConfigError(
            f"y: got {type(y).__name__} beside x of type {type(x).__name__}, which has the targets "
            "in its batches; leave y out"
        )
    return x if isinstance(x, DataLoader) else DataLoader(x, batch_size)


def _classes(target: Tensor) -> bool:
    return not target.is_floating_point() and not target.is_complex()


def _fitting_loss(output: Any, target: Tensor) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"the model gives {type(output).__name__}, and the loss takes a tensor; pass criterion="
        )
    if _classes(target):
        if output.dim() != target.dim() + 1:
            raise ConfigError(
                f"y: integers of shape {tuple(target.shape)} are classes, and the model gives "
                f"{tuple(output.shape)}; expected (examples, classes); pass criterion= for others"
            )
        return F.cross_entropy(output, target.long())
    if output.shape != target.shape:
        raise ConfigError(
            f"y: got targets of shape {tuple(target.shape)}, and the model gives "
            f"{tuple(output.shape)}; make them alike, or pass criterion="
        )
    return F.mse_loss(output, target)
