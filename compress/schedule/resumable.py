"""Pruners that work in steps, and go on after a kill from the last step that was finished."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from compress.distributed import gathered, process_count, process_rank, wait_for_all
from compress.errors import ConfigError
from compress.evaluator import Evaluator
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners.export import MaskedModel
from compress.schedule.bases import Remasker
from compress.schedule.state import (
    described,
    random_state,
    read_state,
    set_random_state,
    structure,
    write_state,
)
from compress.speedup import ModelSpeedup
from compress.speedup.history import remember
from compress.speedup.plan import Plan
from compress.speedup.surgery import apply_plan
from compress.unchanged import put_values, values_of


class ResumablePruner(MaskedModel):
    """Masks a model step by step; with ``state=path`` every finished step is in that file.

    The file holds weights, buffers, masks, the shrinking so far, optimizer, learning-rate schedule
    and random state. Started again with the same arguments, the pruner goes on from there and ends
    with the same masks, bit for bit, as far as the user's training is the same from the same state.
    Of several processes the first writes the file, with the random state of all.
    A file of another model, config_list, arguments or seed (that of ``torch.manual_seed`` when the
    pruner was made) is refused.
    """

    optimizer: Optimizer | None
    lr_scheduler: Any
    evaluator: Evaluator | None
    dummy_input: Any
    state: str | os.PathLike[str] | None
    step: int | None  # the last that was finished; None before the first

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Set what all have; ``arguments`` are all that the user gave, which the state is keyed by.

        Raises:
            ConfigError: lists what is of a wrong type.
        """
        problems = _type_problems(model, arguments)
        if problems:
            raise ConfigError(f"{type(self).__name__} cannot be made:", problems)
        self.model = model
        for name in ("optimizer", "lr_scheduler", "evaluator", "dummy_input", "state"):
            setattr(self, name, arguments.get(name))
        self.step = None
        self._plans: list[Plan] = []
        self._masks = applied_masks(model)
        self._arguments = dict(arguments)
        self._key: dict[str, Any] = {}

    def _remask_with(self, remasker: Remasker, config_list: Sequence[Mapping[str, Any]]) -> None:
        """Set what masks; the model is still the one that the state is of."""
        self._remasker = remasker
        given = {k: v for k, v in self._arguments.items() if k not in ("model", "state")}
        self._key = {
            "pruner": type(self).__qualname__,
            "model": structure(self.model),
            "config_list": described(list(config_list)),
            "arguments": described(given),
            "seed": torch.initial_seed(),
        }

    @property
    def masks(self) -> Masks:
        """A copy of the masks of now; in a model that has been shrunk, those of what is left."""
        return Masks(self._masks)

    def _mask(self, step: int) -> None:
        if self._remasker.due(step):
            self._masks = self._remasker.mask(step)

    def _shrink(self) -> None:
        """Make the model small, with the optimizer; what could not go stays masked."""
        speedup = ModelSpeedup(self.model, self.dummy_input, optimizer=self.optimizer)
        speedup.speedup_model()
        speedup.masks.apply(self.model)
        self._plans.append(speedup.plan)
        self._masks = applied_masks(self.model)

    # -- stop and go on --------------------------------------------------------------------

    def _begin(self) -> None:
        """Go on from the state file; where there is none, write the first one."""
        if self.state is None:
            return
        saved = read_state(self.state, self._key)
        wait_for_all()  # the first process writes when all have looked
        if saved is None:
            self._save()
        else:
            self._restore(saved)

    def _save(self) -> None:
        if self.state is not None:
            contents = self._contents()
            if process_rank() == 0:
                write_state(self.state, self._key, contents)
            wait_for_all()

    def _contents(self) -> dict[str, Any]:
        """All that going on needs, of the types that `write_state` takes."""
        loader = None if self.evaluator is None else self.evaluator.train_loader
        return {
            "step": self.step,
            "masked": self._remasker.step,
            "plans": self._plans,
            "values": values_of(self.model),
            "masks": {path: dict(entries) for path, entries in applied_masks(self.model).items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "random": gathered(random_state(loader)),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        suspend_masks(self.model)  # for good: those that are saved have them in
        for plan in saved["plans"]:
            apply_plan(self.model, plan, {})
            remember(self.model, plan)
            remember(self.model, plan)
        put_values(self.model, saved["values"])
        Masks(saved["masks"]).apply(self.model)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if len(saved["random"]) == process_count():
            loader = None if self.evaluator is None else self.evaluator.train_loader
            set_random_state(saved["random"][process_rank()], loader)
        self._plans, self.step = saved["plans"], saved["step"]
        self._masks = applied_masks(self.model)
        self._remasker.step = saved["masked"]


def _type_problems(model: Any, arguments: Mapping[str, Any]) -> list[str]:
    given = {"model": model, **arguments}
    checks = (
        ("model", nn.Module, "a torch.nn.Module"),
        ("optimizer", Optimizer, "a torch.optim.Optimizer"),
        ("evaluator", Evaluator, "an Evaluator"),
        ("pruning_params", Mapping, "a dict of the one-shot pruner's arguments"),
        ("state", (str, os.PathLike), "the path of a file"),
    )
    problems = [
        f"{name}: got {type(given[name]).__name__}; expected {expected}"
        for name, kind, expected in checks
        if given.get(name) is not None and not isinstance(given[name], kind)
    ]
    if isinstance(arguments.get("optimizer"), str):
        name = arguments["optimizer"]
        problems.append(f"for the name of a one-shot pruner, pass pruning_algorithm={name!r}")
    scheduler = arguments.get("lr_scheduler")
    if scheduler is not None and not hasattr(scheduler, "load_state_dict"):
        problems.append(
            f"lr_scheduler: got {type(scheduler).__name__}; expected one of torch.optim's"
        )
    finetuner = arguments.get("finetuner")
    if finetuner is not None and not callable(finetuner):
        problems.append(
            f"finetuner: got {type(finetuner).__name__}; expected a function of the model"
        )
    return problems
