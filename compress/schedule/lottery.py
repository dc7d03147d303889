"""The lottery ticket hypothesis: train, mask, rewind, and train again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from compress.errors import CompressError, ConfigError
from compress.pruners.base import Pruner
from compress.pruners.data import is_count
from compress.schedule.iterative import IterativePruner
from compress.unchanged import put_values, values_of

REWINDS = ("weights", "learning_rate")


class LotteryTicketPruner(IterativePruner):
    """Finds the sparse network that trains as well as the dense one from the same early weights.

    Round 0 trains the dense model. Each of the ``total_iteration`` rounds after it masks the model
    as trained, then rewinds what is left to what it was early in round 0, and trains again: weights
    and buffers, ``optimizer`` and ``lr_scheduler``. With ``rewind_step=0`` these are the initial
    ones (Frankle & Carbin 2019, The Lottery Ticket Hypothesis, section 1: iterative pruning with
    resetting), else those after so many steps (Frankle et al. 2020, Linear Mode Connectivity and
    the Lottery Ticket Hypothesis, section 4). Where ``finetuner`` or ``evaluator`` make an
    optimizer of their own in each round, it needs no rewinding.

    Args:
        model, config_list, optimizer, pruning_algorithm: as `IterativePruner`; the weights before
            `compress` or ``rounds`` are the initial ones.
        rewind: "weights", with all else; or "learning_rate": the weights stay, the optimizer's
            numbers and the schedule go back (Renda et al. 2020, Comparing Rewinding and
            Fine-tuning in Neural Network Pruning).
        rewind_step: steps of ``optimizer`` in round 0 after which to keep what is rewound to.
        **options: as `IterativePruner`; the schedule is exponential by default, as in the papers,
            and there is no ``speedup``: what is rewound has the size of the first model.
    """

    _schedule: ClassVar[str] = "exponential"
    _first_round: ClassVar[int] = 0

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: Optimizer | None = None,
        pruning_algorithm: str | type[Pruner] = "level",
        *,
        rewind: str = "weights",
        rewind_step: int = 0,
        **options: Any,
    ) -> None:
        self.rewind, self.rewind_step = rewind, rewind_step
        super().__init__(model, config_list, optimizer, pruning_algorithm, **options)
        self._key["arguments"] |= {"rewind": rewind, "rewind_step": rewind_step}
        self._early: dict[str, Any] | None = None

    def _begin_round(self, number: int) -> None:
        if number == 0:
            self._early = self._now() if self.rewind_step == 0 else None
            if self.rewind_step > 0:
                self._keep_at_step()
            return
        super()._begin_round(number)
        assert self._early is not None, "round 0 has kept it"
        self._rewind_to(self._early)

    def _end_round(self, number: int) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._early is None:
            raise CompressError(
                f"round 0 ended before step {self.rewind_step} of the optimizer, which is to be "
                "rewound to; train for longer, or lower rewind_step"
            )

    def _keep_at_step(self) -> None:
        steps = 0

        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == self.rewind_step:
                self._early = self._now()

        assert self.optimizer is not None, "the constructor asked for it"
        self._hook = self.optimizer.register_step_post_hook(count)

    def _now(self) -> dict[str, Any]:
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        return {
            "values": values_of(self.model) if self.rewind == "weights" else {},
            "optimizer": None if optimizer is None else deepcopy(optimizer.state_dict()),
            "lr_scheduler": None if scheduler is None else deepcopy(scheduler.state_dict()),
        }

    def _rewind_to(self, early: Mapping[str, Any]) -> None:
        put_values(self.model, early["values"])
        if self.optimizer is not None:
            # A copy, since the optimizer goes on writing into the tensors that it is given.
            state = deepcopy(early["optimizer"])
            if self.rewind == "learning_rate":
                state["state"] = self.optimizer.state_dict()["state"]
            self.optimizer.load_state_dict(state)
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(deepcopy(early["lr_scheduler"]))

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "early": self._early}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        super()._restore(saved)
        self._early = saved["early"]

    def _check_arguments(self) -> None:
        super()._check_arguments()
        problems = []
        if self.rewind not in REWINDS:
            problems.append(f"rewind: got {self.rewind!r}; expected one of {', '.join(REWINDS)}")
        if not is_count(self.rewind_step, 0):
            problems.append(f"rewind_step: got {self.rewind_step!r}; expected a whole number ≥ 0")
        elif self.rewind_step and self.optimizer is None:
            problems.append("rewind_step: it counts steps of an optimizer; pass optimizer=")
        if self.total_iteration is None:
            problems.append("total_iteration: got None; it works in rounds: pass how many")
        if self.speedup:
            problems.append("speedup: what is rewound has the first model's size; shrink it after")
        if problems:
            raise ConfigError(f"{type(self).__name__} cannot be made:", problems)
