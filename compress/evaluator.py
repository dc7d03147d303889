"""What a pruner that looks at data needs from the user: batches, a loss, training, a score.

Two ways to give it, and pruners know no difference:

- `Evaluator`: a loader, a criterion and how to make an optimizer. All else follows from them.
- `TrainerEvaluator`: the functions that NNI v1's users have, ``trainer(model, optimizer,
  criterion, epoch)`` and ``evaluator(model)``. Pruners make it of their arguments of these names.

Whatever only measures leaves the model as it was: weights, BatchNorm statistics, gradients, train
or eval mode, optimizer and random numbers. Training changes weights, statistics and the optimizer,
and no more. Both hold where the user's functions raise; training then restores the weights, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from compress.errors import CompressError, ConfigError
from compress.graph.run import eager, evaluating, state_kept
from compress.progress import progress_bar
from compress.unchanged import (
    batch_statistics,
    differentiable_in_eval,
    gradients_kept,
    random_kept,
    training,
    values_kept,
)

Step = Callable[[], None]


class Evaluator:
    """Data and a loss, from which measuring, training and scoring follow.

    A batch is a tensor, ``(*inputs, target)``, or a dict of keyword arguments, as transformers
    has them; ``forward`` and ``loss`` are for all others. Of a LightningModule or a transformers
    Trainer `compress.adapters` makes one.

    Args:
        train_loader: batches, as often as it is iterated; a `DataLoader` or any such iterable.
        criterion: ``criterion(output, target)`` -> scalar tensor; not needed with ``loss``, nor for
            dicts with which the model returns its own ``loss``, nor where no loss is computed.
        optimizer_factory: parameters -> optimizer, such as ``lambda p: torch.optim.SGD(p, 0.01)``;
            for what trains.
        eval_fn: ``eval_fn(model)`` -> number, higher is better; for what searches.
        forward: ``forward(model, batch)`` -> output.
        loss: ``loss(model, batch)`` -> scalar tensor.
        device: where batches go; the device of the model's first parameter, by default.
    """

    def __init__(
        self,
        train_loader: Iterable[Any] | None = None,
        criterion: Callable[..., Tensor] | None = None,
        optimizer_factory: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        *,
        eval_fn: Callable[[nn.Module], Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.train_loader = train_loader
        self.criterion = criterion
        self.optimizer_factory = optimizer_factory
        self.eval_fn = eval_fn
        self.device = device
        self._forward = forward
        self._loss = loss
        given = {"criterion": criterion, "optimizer_factory": optimizer_factory, "eval_fn": eval_fn}
        given |= {"forward": forward, "loss": loss}
        problems = [
            f"{name}: got {type(value).__name__}; expected a function"
            for name, value in given.items()
            if value is not None and not callable(value)
        ]
        problems += [
            f"{name}: got the class {value.__name__}; expected one of it: {value.__name__}()"
            for name, value in {"criterion": criterion, "loss": loss}.items()
            if isinstance(value, type)
        ]
        if train_loader is not None and not isinstance(train_loader, Iterable):
            problems.append(f"train_loader: got {type(train_loader).__name__}; expected batches")
        elif isinstance(train_loader, Iterator):
            problems.append(
                "train_loader: got an iterator, which gives its batches only once; expected a "
                "DataLoader, a list, or what else can be iterated again"
            )
        if problems:
            raise ConfigError("\n  ".join(["this Evaluator cannot be made:", *problems]))

    def lacks(self, model: nn.Module, *, training: bool = False, graph: bool = False) -> str:
        """What is missing to measure, to train, or for a loss to differentiate twice; or ""."""
        if self.train_loader is None:
            return "its Evaluator has no train_loader"
        if training and self.optimizer_factory is None:
            return (
                "it trains, and its Evaluator has no optimizer_factory; pass one, such as lambda "
                "parameters: torch.optim.SGD(parameters, lr=0.01)"
            )
        return ""

    def batches(self, limit: int | None = None, device: Any = None) -> Iterator[Any]:
        """The first ``limit`` batches (all, by default), their tensors on ``device``.

        Raises:
            CompressError: there is no loader, or it has no batch.
        """
        if self.train_loader is None:
            raise CompressError("this Evaluator has no train_loader, and batches were asked for")
        device = self.device if self.device is not None else device
        batch = None
        for batch in islice(self.train_loader, limit):
            if device is None:
                yield batch
            else:
                yield tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
        if batch is None:
            raise CompressError("train_loader gave no batch; expected one at least")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output on a batch, by the user's ``forward`` or by the kind of the batch."""
        if self._forward is not None:
            return self._forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)):
            return model(*(batch[:-1] if len(batch) > 1 else batch))
        return model(batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss on a batch, a scalar tensor.

        Raises:
            ConfigError: there is no way to compute it, or it is no scalar; says what to pass.
        """
        loss = self._loss_of(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a {type(loss).__name__}"
            got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else got
            raise ConfigError(
                f"the loss on a batch is {got}; expected a tensor of one number, such as its mean "
                "over the batch"
            )
        return loss

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        if self._loss is not None:
            return self._loss(model, batch)
        if isinstance(batch, Mapping):
            output = self.forward(model, batch)
            own = output.get("loss") if isinstance(output, Mapping) else output
            own = getattr(own, "loss", own)
            if isinstance(own, Tensor) and own.dim() == 0:
                return own
            raise ConfigError(
                f"the batch is a dict, and {type(model).__name__} returned no loss with it: pass "
                "loss=lambda model, batch: ... to the Evaluator"
            )
        if self.criterion is None or not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ConfigError(
                f"no loss for a batch of type {type(batch).__name__}: expected (input, target) and "
                "a criterion; pass these, or loss=lambda model, batch: ... to the Evaluator"
            )
        return self.criterion(self.forward(model, batch), batch[-1])

    def measure(
        self,
        model: nn.Module,
        limit: int | None,
        each: Step,
        *,
        backward: bool = False,
        at_start: bool = False,
        progress: bool = True,
    ) -> None:
        """Run ``limit`` batches through the model in eval mode, and change nothing by it.

        Args:
            model: where hooks of the caller's may be waiting.
            limit: how many batches; None is one pass over all.
            each: called after every batch; with ``backward`` the parameters' ``grad`` is that of
                the batch's loss then.
            at_start: of a training: as `measuring`.
            progress: whether a terminal sees a bar.
        """
        with (
            self.measuring(model, at_start),
            progress_bar("measuring", limit, progress) as advance,
        ):
            for batch in self.batches(limit, device_of(model)):
                if backward:
                    model.zero_grad(set_to_none=True)
                    with torch.enable_grad():
                        torch.autograd.backward(self.loss(model, batch))
                else:
                    with torch.no_grad():
                        self.forward(model, batch)
                each()
                advance()

    @contextmanager
    def measuring(self, model: nn.Module, at_start: bool = False) -> Iterator[None]:
        """The model in eval mode; all that a forward or a backward changes is undone at the end.

        ``at_start`` of a training batch norms take the statistics of the batch, as their running
        ones say nothing yet.
        """
        with (
            eager(),
            differentiable_in_eval(model),
            evaluating(model),
            batch_statistics(model) if at_start else nullcontext(),
            state_kept(model, values=True),
            gradients_kept(model),
            random_kept(self.train_loader),
        ):
            yield

    def train(
        self,
        model: nn.Module,
        epochs: int,
        before_step: Step | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """Train the model in place, in train mode, with an optimizer of its own.

        Args:
            epochs: passes over the loader.
            before_step: called between each backward and the optimizer's step; it may change
                the gradients.
            progress: whether a terminal sees a bar.
        """
        problem = self.lacks(model, training=True)
        if problem or self.optimizer_factory is None:
            raise ConfigError(f"{type(model).__name__} cannot be trained: {problem}")
        optimizer = self.optimizer_factory([p for p in model.parameters() if p.requires_grad])
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer_factory returned a {type(optimizer).__name__}; expected a "
                "torch.optim.Optimizer of the parameters that it is called with"
            )
        total = epochs * len(self.train_loader) if isinstance(self.train_loader, Sized) else None
        with (
            training(model),
            random_kept(self.train_loader),
            progress_bar("training", total, progress) as advance,
        ):
            for _ in range(epochs):
                for batch in self.batches(None, device_of(model)):
                    optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(self.loss(model, batch))
                    if before_step is not None:
                        before_step()
                    optimizer.step()
                    advance()

    def evaluate(self, model: nn.Module) -> Any:
        """The user's score of the model, as ``eval_fn`` returns it; nothing is changed by it.

        Raises:
            ConfigError: there is no ``eval_fn``.
        """
        if self.eval_fn is None:
            raise ConfigError(
                "nothing says how good a model is: pass eval_fn=lambda model: ... to the Evaluator "
                "(evaluator=lambda model: ... to a pruner); it returns a number, higher is better"
            )
        with self.measuring(model), torch.no_grad():
            return self.eval_fn(model)


class TrainerEvaluator(Evaluator):
    """The functions of NNI v1's users: an epoch of training, and a score.

    To measure, an epoch is begun in which ``optimizer.step()`` does nothing but count, and which
    is left at the last batch that is wanted. So the trainer must call ``step()`` of the optimizer
    that it gets once for every batch.

    Args:
        trainer: ``trainer(model, optimizer, criterion, epoch)``; trains for one epoch. Without the
            last argument, it is called without.
        optimizer: of the model's parameters.
        criterion: handed to the trainer as it is.
        evaluator: ``evaluator(model)`` -> number, higher is better.
    """

    def __init__(
        self,
        trainer: Callable[..., Any] | None = None,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        evaluator: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        super().__init__(eval_fn=evaluator)
        self.trainer = trainer
        self.optimizer = optimizer
        self.criterion = criterion

    def lacks(self, model: nn.Module, *, training: bool = False, graph: bool = False) -> str:
        if graph:
            return (
                "it differentiates twice, which a trainer does not let it; pass "
                "evaluator=Evaluator(train_loader, criterion)"
            )
        if self.trainer is None or self.optimizer is None:
            return "it needs both trainer and optimizer, or evaluator=Evaluator(...)"
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in model.parameters()):
            return "optimizer has none of this model's parameters; make it of model.parameters()"
        return ""

    def measure(
        self,
        model: nn.Module,
        limit: int | None,
        each: Step,
        *,
        backward: bool = False,
        at_start: bool = False,
        progress: bool = True,
    ) -> None:
        steps = 0
        with self.measuring(model), progress_bar("measuring", limit, progress) as advance:

            def count() -> None:
                nonlocal steps
                if steps != limit:
                    steps += 1
                    with torch.no_grad():
                        each()
                    advance()
                if steps == limit:
                    raise _EnoughError

            with values_kept(model), self._step_replaced(count), suppress(_EnoughError):
                self._epoch(model, 0)
        if steps == 0:
            raise CompressError(_NO_STEP)

    def train(
        self,
        model: nn.Module,
        epochs: int,
        before_step: Step | None = None,
        *,
        progress: bool = True,
    ) -> None:
        steps = 0

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal steps
            steps += 1
            if before_step is None:
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                before_step()
                return None
            # The gradients come from the closure, within the step.
            return (args[0], _followed_by(closure, before_step)), {}

        assert self.optimizer is not None, "the pruner asked lacks() first"
        hook = self.optimizer.register_step_pre_hook(before)
        try:
            with (
                training(model),
                random_kept(None),
                progress_bar("training", epochs, progress) as advance,
            ):
                for epoch in range(epochs):
                    self._epoch(model, epoch)
                    advance()
                if epochs > 0 and steps == 0:
                    raise CompressError(_NO_STEP)
        finally:
            hook.remove()

    def _epoch(self, model: nn.Module, epoch: int) -> None:
        assert self.trainer is not None, "the pruner asked lacks() first"
        arguments: tuple[Any, ...] = (model, self.optimizer, self.criterion, epoch)
        try:
            inspect.signature(self.trainer).bind(*arguments)
        except TypeError:
            arguments = arguments[:3]
        except ValueError:  # no signature to look at
            pass
        with torch.enable_grad():
            self.trainer(*arguments)

    @contextmanager
    def _step_replaced(self, each: Step) -> Iterator[None]:
        """``optimizer.step`` calls ``each`` and changes nothing."""
        optimizer: Any = self.optimizer

        def step(self: Optimizer, closure: Any = None, **_: Any) -> Any:
            result = None if closure is None else closure()
            each()
            return result

        attributes = dict(vars(optimizer))
        options = [dict(group) for group in optimizer.param_groups]
        # Bound, as schedulers that the trainer makes ask for its __func__.
        optimizer.step = MethodType(step, optimizer)
        try:
            yield
        finally:
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
            for group, before in zip(optimizer.param_groups, options, strict=False):
                group.clear()
                group.update(before)


def _followed_by(closure: Callable[[], Any], step: Step) -> Callable[[], Any]:
    def both() -> Any:
        result = closure()
        step()
        return result

    return both


class _EnoughError(BaseException):
    """Ends the user's epoch: not an Exception, so that no handler of the user's takes it."""


_NO_STEP = (
    "trainer never called step() of the optimizer that it was given, so that nothing could be "
    "measured or added to the gradients; call it after each batch's backward()"
)


def as_evaluator(
    evaluator: Evaluator | Callable[[nn.Module], Any] | None,
    trainer: Callable[..., Any] | None,
    optimizer: Optimizer | None,
    criterion: Any,
) -> Evaluator | None:
    """The one object of a pruner's arguments; None where none was given.

    Raises:
        ConfigError: they contradict each other, or are no functions.
    """
    functions = {"trainer": trainer, "optimizer": optimizer, "criterion": criterion}
    given = [name for name, value in functions.items() if value is not None]
    if isinstance(evaluator, Evaluator):
        if given:
            raise ConfigError(
                f"got both an Evaluator and {', '.join(given)}; an Evaluator has these: pass one"
            )
        return evaluator
    trainer_form = "a function (model, optimizer, criterion, epoch)"
    checks = (
        ("evaluator", evaluator, callable(evaluator), "an Evaluator or a function of a model"),
        ("trainer", trainer, callable(trainer), trainer_form),
        ("optimizer", optimizer, isinstance(optimizer, Optimizer), "a torch.optim.Optimizer"),
    )
    problems = [
        f"{name}: got {type(value).__name__}; expected {expected}"
        for name, value, good, expected in checks
        if value is not None and not good
    ]
    if problems:
        raise ConfigError("\n  ".join(["these arguments cannot be used:", *problems]))
    if evaluator is None and not given:
        return None
    return TrainerEvaluator(trainer, optimizer, criterion, evaluator)


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter; None where it has none."""
    first = next(model.parameters(), None)
    return None if first is None else first.device
