"""Search, train towards what was found, shrink, and begin again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from compress.cost import cost_model
from compress.evaluator import Evaluator, TrainerEvaluator
from compress.graph.channels import ChannelGraph
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners.data import is_count
from compress.schedule.admm import ADMMPruner
from compress.schedule.state import read_state, write_state
from compress.search.annealing import SimulatedAnnealingPruner
from compress.search.base import Found, take
from compress.search.subject import Subject
from compress.speedup import ModelSpeedup
from compress.speedup.plan import Plan
from compress.unchanged import random_kept, values_of

_STATE = "autocompress_state.safetensors"


class AutoCompressPruner(SimulatedAnnealingPruner):
    """Rounds of simulated annealing, ADMM and speedup; the model comes back small and trained.

    Liu et al. 2020, AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High
    Compression Rates, figure 3. Each round takes the same share of what the last one left,
    1 − (1 − s)^(1/n), so that all together take s. The annealing says how much of each layer; ADMM
    trains the weights towards that; what is masked then is cut away. NNI v1 returned the small
    model, too; its masks are those of what is left, most often none.

    Args:
        model, config_list: as `SearchPruner`.
        trainer: NNI v1's ``trainer(model, optimizer, criterion, epoch)`` for ADMM; not with an
            ``evaluator`` that is an `Evaluator` with a loader and an ``optimizer_factory``.
        evaluator: as `SearchPruner`.
        dummy_input: as `SearchPruner`.
        num_iterations: how many rounds.
        admm_num_iterations, admm_training_epochs, row: ``num_iterations``, ``training_epochs`` and
            ρ of `ADMMPruner`.
        optimizer_factory: with ``trainer``: parameters -> its optimizer; by default NNI's, Adam
            with a learning rate of 1e-3 and a weight decay of 5e-5.
        criterion: with ``trainer``: handed to it; cross-entropy by default.
        **arguments: as `SimulatedAnnealingPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Callable[..., Any] | None = None,
        evaluator: Evaluator | Callable[[nn.Module], Any] | None = None,
        dummy_input: Any = None,
        *,
        num_iterations: int = 3,
        admm_num_iterations: int = 30,
        admm_training_epochs: int = 5,
        row: float = 1e-4,
        optimizer_factory: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        criterion: Any = None,
        **arguments: Any,
    ) -> None:
        self.num_iterations = num_iterations
        self.admm_num_iterations, self.row = admm_num_iterations, row
        self.admm_training_epochs = admm_training_epochs
        self.trainer = trainer
        self.optimizer_factory = _adam if optimizer_factory is None else optimizer_factory
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        super().__init__(model, config_list, evaluator, dummy_input=dummy_input, **arguments)

    def _search(self, subject: Subject) -> Found:
        model = deepcopy(self.model)
        plans: list[Plan] = []
        done, trial = 0, None
        left = {group.name: 1.0 for group in subject.space.groups}
        saved = self._read_state()
        if saved is not None:
            done, plans, left = saved["rounds"], saved["plans"], saved["left"]
            take(model, Masks(saved["masks"]), saved["values"], plans)
            self._trials.recall(saved["trials"])
            trial = self._trials.done[-1]
        target = 1 - (1 - self.target) ** (1 / self.num_iterations)
        for number in range(done + 1, self.num_iterations + 1):
            subject = self._subject(deepcopy(model)) if number > 1 else subject
            chosen, _ = self._anneal(subject, target, number)
            self._train(model, subject.space.config_list(chosen.sparsities), number)
            if subject.space.coupling is not None:
                plans.append(_speedup(model, self.dummy_input))
            left = {
                name: was * (1 - chosen.sparsities.get(name, 0.0)) for name, was in left.items()
            }
            overall = {name: 1 - share for name, share in left.items()}
            share = 1 - (1 - target) ** number
            flops = None if subject.space.coupling is None else _flops(model, self.dummy_input)
            trial = self._trials.measure(model, overall, share, number, flops)
            self._write_state(number, plans, left, model)
        assert trial is not None, "there is a round at least"
        return Found(trial, applied_masks(model), values_of(model), plans)

    def _planned(self) -> int | None:
        return self.num_iterations * ((super()._planned() or 0) + 1)

    def _train(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], number: int
    ) -> None:
        """ADMM towards these sparsities, and the masks."""
        evaluator, state = self._training(model), None
        if self.experiment_data_dir is not None:
            state = Path(self.experiment_data_dir) / f"admm_round_{number}.safetensors"
        given = self._base_arguments()
        with random_kept(evaluator.train_loader):
            torch.manual_seed(self.seed + number)
            ADMMPruner(
                model,
                config_list,
                evaluator,
                num_iterations=self.admm_num_iterations,
                training_epochs=self.admm_training_epochs,
                row=self.row,
                pruning_algorithm=self.kind,
                pruning_params={k: v for k, v in given.items() if k != "evaluator"},
                dummy_input=self.dummy_input,
                state=state,
            ).compress()

    def _training(self, model: nn.Module) -> Evaluator:
        """What trains a model: the user's Evaluator, or the trainer with an optimizer of it."""
        assert self.evaluator is not None, "_problems asked for it"
        if self.trainer is None:
            return self.evaluator
        optimizer = self.optimizer_factory(p for p in model.parameters() if p.requires_grad)
        return TrainerEvaluator(self.trainer, optimizer, self.criterion, self.evaluator.eval_fn)

    # -- stop and go on --------------------------------------------------------------------

    def _read_state(self) -> Any:
        if self.experiment_data_dir is None:
            return None
        return read_state(Path(self.experiment_data_dir) / _STATE, self.key)

    def _write_state(
        self, number: int, plans: list[Plan], left: Mapping[str, float], model: nn.Module
    ) -> None:
        if self.experiment_data_dir is None:
            return
        state = {
            "rounds": number,
            "plans": plans,
            "left": dict(left),
            "trials": len(self._trials.done),
            "values": values_of(model),
            "masks": {path: dict(entries) for path, entries in applied_masks(model).items()},
        }
        write_state(Path(self.experiment_data_dir) / _STATE, self.key, state)

    # -- what is wrong ---------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        own = ("num_iterations", "admm_num_iterations", "admm_training_epochs", "row", "trainer",
               "criterion")  # fmt: skip
        return super()._arguments() | {name: getattr(self, name) for name in own}

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name in ("num_iterations", "admm_num_iterations", "admm_training_epochs"):
            if not is_count(getattr(self, name), 1):
                problems.append(f"{name}: got {getattr(self, name)!r}; expected a whole number ≥ 1")
        if isinstance(self.row, bool) or not isinstance(self.row, (int, float)) or self.row < 0:
            problems.append(f"row: got {self.row!r}; expected a number ≥ 0, such as 1e-4")
        if self.trainer is not None and not callable(self.trainer):
            problems.append(
                f"trainer: got {type(self.trainer).__name__}; expected a function (model, "
                "optimizer, criterion, epoch)"
            )
        elif self.trainer is None and self.evaluator is not None:
            lacking = self.evaluator.lacks(self.model, training=True)
            if lacking or isinstance(self.evaluator, TrainerEvaluator):
                problems.append(
                    "trainer: got None, and nothing else trains; pass trainer=a function (model, "
                    "optimizer, criterion, epoch), or an Evaluator with a train_loader, a "
                    "criterion and an optimizer_factory"
                )
        return problems


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=5e-5)


def _flops(model: nn.Module, dummy_input: Any) -> float:
    """Of one run of a small model; what stayed masked counts."""
    with suspend_masks(model):
        return cost_model("flops", ChannelGraph(model, dummy_input)).dense


def _speedup(model: nn.Module, dummy_input: Any) -> Plan:
    """Make a masked model small, in place; what could not go stays masked."""
    speedup = ModelSpeedup(model, dummy_input, progress=False)
    speedup.speedup_model()
    speedup.masks.apply(model)
    return speedup.plan
