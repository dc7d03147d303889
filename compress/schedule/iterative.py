"""Pruners that follow a schedule: while the user trains, or in rounds of masking and training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from compress.errors import CompressError, ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks
from compress.pruners.base import Pruner
from compress.pruners.data import is_count
from compress.schedule.bases import Remasker, base_arguments, base_type
from compress.schedule.entries import resolve_scheduled
from compress.schedule.resumable import ResumablePruner
from compress.schedule.schedules import Schedule, schedule_type


class IterativePruner(ResumablePruner):
    """Masks more and more of a model, by any one-shot pruner, in one of two ways.

    **In rounds**, with ``total_iteration``: mask a part, train, mask more; round r of n has the
    sparsity of r/n of the schedule, the last the whole. Either `compress` does it all, with
    ``finetuner`` or ``evaluator``; or the training is the caller's::

        for round in pruner.rounds():
            train(model)

    **While the user trains**, without it: entries of the config_list have epochs (see
    `compress.schedule.entries`). `compress` masks for epoch 0; then ``pruner.update_epoch(epoch)``
    is called at the begin of each epoch, or ``steps_per_epoch`` is given, and the steps of
    ``optimizer`` are counted.

    What is masked stays masked, unless the schedule is cyclic, and counts towards the sparsity.

    Args:
        model: masked, and with ``speedup`` shrunk, in place.
        config_list: with final sparsities, see `compress.schedule.entries`.
        optimizer: the one that trains the model. With ``speedup`` its state shrinks along, and it
            is part of the saved state.
        pruning_algorithm: "level", "slim", "l1", "l2", "fpgm", "taylorfo", "apoz",
            "mean_activation", or the class of a one-shot pruner.
        total_iteration: how many rounds.
        schedule: "one_shot", "linear", "cubic", "exponential", "cyclic", or a `Schedule` class;
            that of the pruner's name by default.
        schedule_params: further fields of the schedule, such as ``{"cycles": 3}``.
        steps_per_epoch: how many steps of ``optimizer`` are an epoch; with 1, the epochs of the
            config_list are steps.
        finetuner: ``finetuner(model)`` trains after each round.
        evaluator: trains in its place; and what a one-shot pruner that looks at data measures with.
        finetune_epochs: with ``evaluator``: passes over its loader in each round.
        speedup: whether the model is shrunk in each round, before the training. The sparsities are
            still those of the model at first: what is gone counts.
        dummy_input: an input of the model, for ``speedup`` and for modes that run the model.
        lr_scheduler: its state is saved along.
        pruning_params: further arguments of the one-shot pruner, such as ``{"mode": "global"}``.
        state: path of a file to stop and go on with: see `ResumablePruner`.

    Raises:
        ConfigError: lists what is wrong with the config_list or the other arguments.
    """

    total_iteration: int | None
    schedule: type[Schedule]
    _schedule: ClassVar[str] = "linear"
    _first_round: ClassVar[int] = 1

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: Optimizer | None = None,
        pruning_algorithm: str | type[Pruner] = "level",
        *,
        total_iteration: int | None = None,
        schedule: str | type[Schedule] | None = None,
        schedule_params: Mapping[str, Any] | None = None,
        steps_per_epoch: int | None = None,
        finetuner: Callable[[nn.Module], Any] | None = None,
        evaluator: Evaluator | None = None,
        finetune_epochs: int = 1,
        speedup: bool = False,
        dummy_input: Any = None,
        lr_scheduler: Any = None,
        pruning_params: Mapping[str, Any] | None = None,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        others = ("self", "model", "config_list", "__class__")
        super().__init__(model, {k: v for k, v in locals().items() if k not in others})
        self.total_iteration, self.steps_per_epoch = total_iteration, steps_per_epoch
        self.finetuner, self.finetune_epochs = finetuner, finetune_epochs
        self.speedup = speedup
        self.schedule = schedule_type(self._schedule if schedule is None else schedule)
        kind = base_type(pruning_algorithm)
        self._check_arguments()
        options = dict(schedule_params or {})
        config = resolve_scheduled(
            model, config_list, kind, self.schedule, total_iteration, options
        )
        given = base_arguments(kind, pruning_params, evaluator, dummy_input)
        self._remask_with(Remasker(model, config, kind, given), config_list)
        self._hook: Any = None
        self._steps = 0

    # -- while the user trains -------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the masks are of; after a restart, the one to go on with."""
        return self.step or 0

    def compress(self) -> tuple[nn.Module, Masks]:
        """Do all rounds; without ``total_iteration``: mask for the first epoch.

        With ``state`` and a file of an earlier run it goes on from there.

        Returns:
            The model that was given, and a copy of its masks.

        Raises:
            StateError: the state is of something else; the model is as it was.
            CompressError: what the one-shot pruner, the speedup or the training raise.
        """
        if self.total_iteration is not None:
            self._check_training()
            for _ in self.rounds():
                self._finetune()
        else:
            if self.step is None:
                self._begin()
            if self.step is None:
                self.update_epoch(0)
            if self.steps_per_epoch is not None and self._hook is None:
                assert self.optimizer is not None, "the constructor asked for it"
                self._hook = self.optimizer.register_step_post_hook(self._count)
        return self.model, self.masks

    def update_epoch(self, epoch: int) -> None:
        """Mask as much as the schedule says for ``epoch``, counted from 0; before its training.

        Raises:
            CompressError: ``epoch`` lies before the last one, or rounds are asked for.
        """
        if self.total_iteration is not None:
            raise CompressError(
                f"update_epoch: this pruner works in {self.total_iteration} rounds; call compress()"
                " or rounds(), or make it without total_iteration"
            )
        if not is_count(epoch, self.step or 0):
            raise CompressError(
                f"update_epoch: got {epoch!r} after epoch {self.epoch}; expected a whole number, "
                "not before it"
            )
        if epoch != self.step:
            self._mask(epoch)
            self.step = epoch
            self._save()

    def unwrap_model(self) -> nn.Module:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return super().unwrap_model()

    unwrap_model.__doc__ = ResumablePruner.unwrap_model.__doc__

    def _count(self, *_: Any) -> None:
        assert self.steps_per_epoch is not None, "the hook is there only with it"
        self._steps += 1
        if self._steps == self.steps_per_epoch:
            self._steps = 0
            self.update_epoch(self.epoch + 1)

    # -- in rounds -------------------------------------------------------------------------

    def rounds(self) -> Iterator[int]:
        """Mask, and with ``speedup`` shrink; give the round's number; go on when it is trained.

        With ``state`` and a file of an earlier run it begins with the first round that was not
        finished then.

        Raises:
            CompressError: the pruner was made without ``total_iteration``; or as `compress`.
        """
        if self.total_iteration is None:
            raise CompressError(
                "rounds: how many? make the pruner with total_iteration, such as total_iteration=5"
            )
        if self.step is None:
            self._begin()
        done = self._first_round - 1 if self.step is None else self.step
        for number in range(done + 1, self.total_iteration + 1):
            self._begin_round(number)
            yield number
            self._end_round(number)
            self.step = number
            self._save()

    def _begin_round(self, number: int) -> None:
        due = self._remasker.due(number)
        self._mask(number)
        if self.speedup and due:
            self._shrink()

    def _end_round(self, number: int) -> None:
        """What follows the training."""

    def _finetune(self) -> None:
        if self.finetuner is not None:
            self.finetuner(self.model)
        else:
            assert self.evaluator is not None, "_check_training asked for it"
            self.evaluator.train(self.model, self.finetune_epochs)

    # -- what is wrong ---------------------------------------------------------------------

    def _check_training(self) -> None:
        problem = "" if self.finetuner is not None else "got no finetuner and no evaluator"
        if self.finetuner is None and self.evaluator is not None:
            problem = self.evaluator.lacks(self.model, training=True)
        if problem:
            raise ConfigError(
                f"{type(self).__name__}.compress trains in each round: {problem}. Pass finetuner=a "
                "function of the model, or an Evaluator with an optimizer_factory, or train it "
                "yourself: for round in pruner.rounds(): ..."
            )

    def _check_arguments(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ {least}"
            for name, least in (("total_iteration", 1), ("steps_per_epoch", 1))
            if getattr(self, name) is not None and not is_count(getattr(self, name), least)
        ]
        if not is_count(self.finetune_epochs, 0):
            problems.append(
                f"finetune_epochs: got {self.finetune_epochs!r}; expected a whole number ≥ 0"
            )
        if self.steps_per_epoch is not None and self.optimizer is None:
            problems.append(
                "steps_per_epoch: it counts the steps of an optimizer, and got none; pass "
                "optimizer=, or call update_epoch(epoch)"
            )
        if self.steps_per_epoch is not None and self.total_iteration is not None:
            problems.append("steps_per_epoch: total_iteration counts rounds; give one of the two")
        problems += self._speedup_problems() if self.speedup else []
        if problems:
            raise ConfigError(f"{type(self).__name__} cannot be made:", problems)

    def _speedup_problems(self) -> list[str]:
        problems = []
        if self.dummy_input is None:
            problems.append("dummy_input: got None; speedup runs the model: pass an input of it")
        if self.total_iteration is None:
            problems.append("speedup: it is done in rounds; pass total_iteration")
        if not self.schedule.monotone:
            problems.append(
                f"speedup: with a {self.schedule.__name__} schedule masked weights come back, and "
                "what is gone cannot; choose another schedule, or speedup=False"
            )
        return problems


class AGPPruner(IterativePruner):
    """Automated gradual pruning: an `IterativePruner` with the cubic schedule.

    Zhu & Gupta 2017, To prune, or not to prune: exploring the efficacy of pruning for model
    compression, eq. 1: s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(nΔt))³.
    """

    _schedule: ClassVar[str] = "cubic"


class LinearPruner(IterativePruner):
    """An `IterativePruner` with the linear schedule: as much more each time."""
