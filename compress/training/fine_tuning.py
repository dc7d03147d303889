"""A small loop that trains a masked or small model, with what fine-tuning mostly needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator, device_of
from compress.progress import progress_bar
from compress.unchanged import put_values, random_kept, training, values_of

_PRECISIONS = (torch.float16, torch.bfloat16)


class EarlyStopping:
    """Says when to stop, and keeps the best weights.

    Args:
        patience: epochs without a better score after which to stop.
        min_delta: by how much a score has to be above the best one to be better.

    Attributes:
        best: the highest score so far; None before the first.
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.0) -> None:
        problems = []
        if type(patience) is not int or patience < 1:
            problems.append(f"patience: got {patience!r}; expected a whole number ≥ 1")
        if not min_delta >= 0:
            problems.append(f"min_delta: got {min_delta!r}; expected a number ≥ 0")
        if problems:
            raise ConfigError("this EarlyStopping cannot be made:", problems)
        self.patience, self.min_delta = patience, min_delta
        self.best: float | None = None
        self._waited = 0
        self._values: dict[str, Tensor] = {}

    def update(self, score: float, model: nn.Module) -> bool:
        """Count an epoch in; returns whether to stop. A NaN is no better score."""
        if self.best is None or score > self.best + self.min_delta:
            self.best, self._waited = score, 0
            self._values = values_of(model)
        else:
            self._waited += 1
        return self._waited >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Give ``model`` the parameters and buffers of the best score, in place.

        Raises:
            CompressError: there has been no score, or the model's sizes have changed since.
        """
        if self.best is None:
            raise CompressError("EarlyStopping.restore: no score yet; call update() first")
        put_values(model, self._values)


@dataclass(frozen=True)
class Epoch:
    """What one epoch of `fine_tune` was.

    Attributes:
        loss: the mean over its batches.
        learning_rate: of the optimizer's first group, in its last step.
        score: what the evaluator's ``eval_fn`` says after it; None without one.
    """

    loss: float
    learning_rate: float
    score: float | None


def fine_tune(
    model: nn.Module,
    evaluator: Evaluator,
    epochs: int,
    *,
    optimizer: Optimizer | None = None,
    schedule: Callable[[Optimizer], Any] | None = None,
    precision: torch.dtype | None = None,
    clip_norm: float | None = None,
    early_stopping: EarlyStopping | None = None,
    before_step: Callable[[], None] | None = None,
    progress: bool = True,
) -> list[Epoch]:
    """Train a model in place; it may have masks, be small, compiled, or wrapped for DDP.

    Modes, gradients and random numbers are as before after it; after an error weights and buffers,
    too.

    Args:
        evaluator: batches and loss (a `Distillation`, say), and the score where it has ``eval_fn``.
        epochs: passes over its loader, at most.
        optimizer: the evaluator's ``optimizer_factory`` makes one by default, anew in each call.
        schedule: ``schedule(optimizer)`` -> a learning-rate schedule, stepped after each epoch.
            Made anew in each call, so that in rounds of pruning the rate is rewound to the first:
            Renda et al. 2020, Comparing Rewinding and Fine-tuning in Neural Network Pruning.
        precision: torch.bfloat16 or torch.float16: forward and loss run under ``torch.autocast``,
            float16 with a gradient scaler where the device has one. Weights stay as they are.
        clip_norm: the largest norm of all gradients together.
        early_stopping: stops by the score, which ``eval_fn`` has to give, and restores the best.
        before_step: called between backward and step, where gradients are unscaled.
        progress: False is no progress bar.

    Returns:
        One `Epoch` for each that ran.

    Raises:
        ConfigError: lists what is missing or wrong; nothing has been trained.
        CompressError: a loss is NaN or infinite.
    """
    _check(model, evaluator, epochs, optimizer, schedule, precision, clip_norm, early_stopping)
    if optimizer is None:
        assert evaluator.optimizer_factory is not None, "_check has asked for it"
        optimizer = evaluator.optimizer_factory([p for p in model.parameters() if p.requires_grad])
    loop = _Loop(model, evaluator, optimizer, precision, clip_norm, before_step)
    scheduler = None if schedule is None else schedule(optimizer)
    history: list[Epoch] = []
    with (
        random_kept(evaluator.train_loader),
        training(model),
        progress_bar("fine-tuning", epochs, progress) as advance,
    ):
        for _ in range(epochs):
            loss = loop.epoch()
            rate = float(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                _step(scheduler, loss)
            score = None if evaluator.eval_fn is None else float(evaluator.evaluate(model))
            history.append(Epoch(loss, rate, score))
            advance()
            if early_stopping is None or score is None:
                continue
            if early_stopping.update(score, model):
                break
        if early_stopping is not None and early_stopping.best is not None:
            early_stopping.restore(model)
    return history


class _Loop:
    """The steps of one epoch."""

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        optimizer: Optimizer,
        precision: torch.dtype | None,
        clip_norm: float | None,
        before_step: Callable[[], None] | None,
    ) -> None:
        self.model, self.evaluator, self.optimizer = model, evaluator, optimizer
        self.precision, self.clip_norm, self.before_step = precision, clip_norm, before_step
        self.device = device_of(model) or torch.device("cpu")
        scaled = precision is torch.float16 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def epoch(self) -> float:
        """One pass over the loader; the mean loss."""
        self.model.train()
        losses = [self._step(batch) for batch in self.evaluator.batches(None, self.device)]
        mean = float(torch.stack(losses).mean())
        if not torch.isfinite(torch.tensor(mean)):
            raise CompressError(
                f"fine_tune: the mean loss of an epoch is {mean}; lower the learning rate, pass "
                "clip_norm, or use torch.bfloat16 in the place of torch.float16"
            )
        return mean

    def _step(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            if self.precision is not None:
                stack.enter_context(torch.autocast(self.device.type, self.precision))
            loss = self.evaluator.loss(self.model, batch)
        torch.autograd.backward(self.scaler.scale(loss))
        if self.clip_norm is not None or self.before_step is not None:
            self.scaler.unscale_(self.optimizer)
            if self.before_step is not None:
                self.before_step()
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach().float()


def _step(scheduler: Any, loss: float) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def _check(
    model: nn.Module,
    evaluator: Evaluator,
    epochs: int,
    optimizer: Optimizer | None,
    schedule: Callable[[Optimizer], Any] | None,
    precision: torch.dtype | None,
    clip_norm: float | None,
    early_stopping: EarlyStopping | None,
) -> None:
    problems = []
    lacking = evaluator.lacks(model, training=optimizer is None)
    if lacking:
        problems.append(f"evaluator: {lacking}")
    if type(epochs) is not int or epochs < 0:
        problems.append(f"epochs: got {epochs!r}; expected a whole number ≥ 0")
    if not (schedule is None or callable(schedule)):
        problems.append(
            f"schedule: got {type(schedule).__name__}; expected a function that makes one of an "
            "optimizer, such as lambda optimizer: StepLR(optimizer, 10)"
        )
    if precision is not None and precision not in _PRECISIONS:
        problems.append(f"precision: got {precision}; expected torch.bfloat16 or torch.float16")
    if clip_norm is not None and not clip_norm > 0:
        problems.append(f"clip_norm: got {clip_norm!r}; expected a number > 0")
    if early_stopping is not None and evaluator.eval_fn is None:
        problems.append("early_stopping: it goes by the score; pass eval_fn= to the Evaluator")
    if problems:
        raise ConfigError("fine_tune cannot begin:", problems)
