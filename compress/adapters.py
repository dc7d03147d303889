"""Evaluators made of what users of Lightning and of transformers have already.

`LightningEvaluator` takes a ``LightningModule`` and its data, `TransformersEvaluator` a
``Trainer``. What measures takes their batches, device placement and loss, and changes nothing, as
with every `Evaluator`. What trains goes through the library's own loop: optimizers, schedules,
precision, callbacks, logs and checkpoints are those of the user's ``Trainer``. The pruner's model
is the whole module or any part of it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator, Step, device_of
from compress.unchanged import random_kept, training

_ABSENT = object()


class LibraryEvaluator(Evaluator):
    """An `Evaluator` whose loss and training are a library's, of one module and of its parts.

    Args:
        module: what the library runs; the pruner's model is in it.
        train_loader, eval_fn: as `Evaluator`.
    """

    def __init__(
        self,
        module: nn.Module,
        train_loader: Iterable[Any] | None,
        eval_fn: Callable[[nn.Module], Any] | None,
    ) -> None:
        super().__init__(train_loader, eval_fn=eval_fn)
        self.module: Any = module

    def lacks(self, model: nn.Module, *, training: bool = False, graph: bool = False) -> str:
        if not any(part is model for part in self.module.modules()):
            return (
                f"its {type(self).__name__} is of another model: expected the "
                f"{type(self.module).__name__} that it was made with, or a part of it, and got a "
                f"{type(model).__name__}"
            )
        return "" if self.train_loader is not None else "its data has no batches to train with"

    @contextmanager
    def measuring(self, model: nn.Module, at_start: bool = False) -> Iterator[None]:
        # All of the module: its loss runs what is around the pruner's model, too.
        with super().measuring(self.module, at_start):
            yield

    @abstractmethod
    def _fit(self, epochs: int, before_step: Step) -> None:
        """The library's own training, which calls ``before_step`` before each optimizer's step."""

    def train(
        self,
        model: nn.Module,
        epochs: int,
        before_step: Step | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """Train in the library's loop, which shows its progress in its own way.

        Args:
            epochs: so many more; the epochs that its ``Trainer`` was made with stay what they are.
            before_step: as `Evaluator.train`. transformers clips gradients before it, Lightning
                after it.
        """
        problem = self.lacks(model, training=True)
        if problem:
            raise ConfigError(f"{type(model).__name__} cannot be trained: {problem}")
        steps = 0

        def before() -> None:
            nonlocal steps
            steps += 1
            if before_step is not None:
                before_step()

        with training(self.module), random_kept(self.train_loader):
            self._fit(epochs, before)
            if epochs > 0 and steps == 0:
                raise CompressError(
                    f"the Trainer of this {type(self).__name__} made no step of an optimizer: look "
                    "whether its limits (max_steps, max_time) are reached, or its data is empty"
                )


class LightningEvaluator(LibraryEvaluator):
    """What a pruner needs of a ``LightningModule`` and its data.

    The loss is ``training_step``'s, in the precision of the parameters; what it logs while it is
    measured goes nowhere. Batches take the module's hooks for the transfer to a device.

    Args:
        module: the ``LightningModule``, of ``lightning`` or ``pytorch_lightning``.
        data: its ``LightningDataModule``, or a loader; None for the module's own
            ``train_dataloader``.
        trainer: a ``Trainer``, for what trains; training goes on where it has come to.
        eval_fn: as `Evaluator`.

    Raises:
        CompressError: Lightning is not installed.
        ConfigError: the arguments are of other types.
    """

    def __init__(
        self,
        module: Any,
        data: Any = None,
        *,
        trainer: Any = None,
        eval_fn: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self._library = _lightning_of(module)
        if trainer is not None and not isinstance(trainer, self._library.Trainer):
            raise ConfigError(
                f"trainer: got {type(trainer).__name__}; expected a {self._library.__name__}"
                ".Trainer, as the module is of that library"
            )
        self.trainer: Any = trainer
        self._data = data
        with random_kept(None):
            loader = self._loader_of(module)
        super().__init__(module, loader, eval_fn)

    def lacks(self, model: nn.Module, *, training: bool = False, graph: bool = False) -> str:
        problem = super().lacks(model, training=training, graph=graph)
        if not problem and training and self.trainer is None:
            problem = (
                "it trains, and its LightningEvaluator has no trainer; pass trainer=Trainer(...)"
            )
        if not problem and not training and not self.module.automatic_optimization:
            problem = (
                "its module optimizes by itself (automatic_optimization=False), so that its "
                "training_step has no loss to measure; pass Evaluator(loader, loss=...)"
            )
        return problem

    def batches(self, limit: int | None = None, device: Any = None) -> Iterator[Any]:
        for batch in super().batches(limit):
            moved = self.module.on_before_batch_transfer(batch, 0)
            if device is not None:
                moved = self.module.transfer_batch_to_device(moved, device, 0)
            yield self.module.on_after_batch_transfer(moved, 0)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """What ``training_step`` returns."""
        step = self.module.training_step
        try:
            inspect.signature(step).bind(batch, 0)
        except TypeError:
            return step(batch)
        return step(batch, 0)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        found = self.forward(model, batch)
        loss: Tensor | None = found.get("loss") if isinstance(found, Mapping) else found
        if loss is None:
            raise ConfigError(
                f"training_step of {type(self.module).__name__} returned no loss; expected a "
                "tensor, or a dict with one under 'loss'"
            )
        return loss

    @contextmanager
    def measuring(self, model: nn.Module, at_start: bool = False) -> Iterator[None]:
        with super().measuring(model, at_start):  # it puts back what is set here
            for part in self.module.modules():
                if isinstance(part, self._library.LightningModule):
                    part.log = _log_nothing
            if self.trainer is not None:
                self.module.trainer = self.trainer
            yield

    def _loader_of(self, module: Any) -> Any:
        if self._data is None:
            return module.train_dataloader()
        if isinstance(self._data, self._library.LightningDataModule):
            self._data.prepare_data()
            self._data.setup("fit")
            return self._data.train_dataloader()
        if isinstance(self._data, (list, tuple, Mapping)):
            raise ConfigError(
                f"data: got a {type(self._data).__name__}, which Lightning takes for several "
                "loaders; expected a DataLoader or a LightningDataModule"
            )
        return self._data

    def _fit(self, epochs: int, before_step: Step) -> None:
        trainer, device = self.trainer, device_of(self.module)
        is_module = isinstance(self._data, self._library.LightningDataModule)
        data = {"datamodule" if is_module else "train_dataloaders": self._data}
        hook = {"on_before_optimizer_step": lambda *_: before_step()}
        callback = type("BeforeStep", (self._library.Callback,), hook)()
        last = trainer.fit_loop.max_epochs
        trainer.callbacks.append(callback)
        try:
            trainer.fit_loop.max_epochs = trainer.current_epoch + epochs
            trainer.fit(self.module, **data)
        finally:
            trainer.fit_loop.max_epochs = last
            trainer.callbacks = [each for each in trainer.callbacks if each is not callback]
            self.module.to(device)  # a Trainer takes it back to the CPU


class TransformersEvaluator(LibraryEvaluator):
    """What a pruner needs of a ``transformers.Trainer``: it has the model, the data and the loss.

    The batches are those of ``get_train_dataloader()``, with its collator, the loss is that of
    ``compute_loss``, in the trainer's precision. Training is ``trainer.train()``, with an optimizer
    of its own unless the trainer was given one.

    Args:
        trainer: the ``Trainer``.
        eval_fn: as `Evaluator`.

    Raises:
        CompressError: transformers is not installed.
        ConfigError: ``trainer`` is none of its.
    """

    def __init__(self, trainer: Any, *, eval_fn: Callable[[nn.Module], Any] | None = None) -> None:
        self._library = _transformers_of(trainer)
        self.trainer = trainer
        super().__init__(trainer.model, _TrainBatches(trainer), eval_fn)

    def lacks(self, model: nn.Module, *, training: bool = False, graph: bool = False) -> str:
        if training and self.trainer.model_init is not None:
            return (
                "its Trainer has a model_init, and would train a new model; make it with model=..."
            )
        return super().lacks(model, training=training, graph=graph)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The loss, as a forward without it is not known to the trainer."""
        return self.loss(model, batch)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            # A copy, as compute_loss may take the labels out of it.
            loss: Tensor = self.trainer.compute_loss(self.module, dict(batch))
        return loss

    def _fit(self, epochs: int, before_step: Step) -> None:
        trainer = self.trainer
        hook = {"on_pre_optimizer_step": lambda *_, **__: before_step()}
        callback = type("BeforeStep", (self._library.TrainerCallback,), hook)()
        of_trainer = _attributes_kept(trainer, "optimizer", "lr_scheduler")
        of_args = _attributes_kept(trainer.args, "num_train_epochs", "max_steps")
        # In mixed precision accelerate wraps the forward, and leaves it so.
        left = ("forward", "_original_forward", "_is_accelerate_prepared")
        of_module = _attributes_kept(trainer.model, *left)
        with of_trainer, of_args, of_module:
            trainer.args.num_train_epochs, trainer.args.max_steps = float(epochs), -1
            trainer.add_callback(callback)
            try:
                trainer.train()
            finally:
                trainer.remove_callback(callback)


class _TrainBatches:
    """A new loader of the trainer's for every pass, so that each has the same batches."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        return iter(self.trainer.get_train_dataloader())


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of a LightningModule's ``log``, which works in a Trainer's loop only."""


@contextmanager
def _attributes_kept(owner: Any, *names: str) -> Iterator[None]:
    """These attributes of the instance are as before after, or are not there again."""
    before = {name: vars(owner).get(name, _ABSENT) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def _lightning_of(module: Any) -> Any:
    """The package that a LightningModule is of: its two names have classes of their own."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        library = sys.modules.get(name)
        if library is not None and isinstance(module, library.LightningModule):
            return library
    _need("lightning", "lightning", "pytorch_lightning")
    raise ConfigError(f"module: got {type(module).__name__}; expected a LightningModule")


def _transformers_of(trainer: Any) -> Any:
    library = sys.modules.get("transformers")
    if library is not None:
        with suppress(ImportError):  # without accelerate it has no Trainer
            if isinstance(trainer, library.Trainer):
                return library
    _need("transformers", "transformers")
    raise ConfigError(f"trainer: got {type(trainer).__name__}; expected a transformers.Trainer")


def _need(extra: str, *packages: str) -> None:
    if all(importlib.util.find_spec(package) is None for package in packages):
        raise CompressError(
            f"this adapter is for {extra}, which is not installed here: pip install "
            f"compress-torch[{extra}]"
        )
