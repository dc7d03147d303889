"""The one-shot pruner under a schedule: by name or class, made anew for each step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.distributed import broadcast_masks
from compress.errors import ConfigError, closest
from compress.evaluator import Evaluator
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
)
from compress.pruners.base import Pruner
from compress.pruners.data import DataPruner
from compress.schedule.entries import Extent, ScheduledConfig, plain_config

# NNI's short names.
ALGORITHMS: dict[str, type[Pruner]] = {
    "level": LevelPruner,
    "slim": SlimPruner,
    "l1": L1FilterPruner,
    "l2": L2FilterPruner,
    "fpgm": FPGMPruner,
    "taylorfo": TaylorFOWeightFilterPruner,
    "apoz": ActivationAPoZRankFilterPruner,
    "mean_activation": ActivationMeanRankFilterPruner,
}


def base_type(given: str | type[Pruner], argument: str = "pruning_algorithm") -> type[Pruner]:
    """A one-shot pruner by its short name, or as it is; ``argument`` is whose value it is.

    Raises:
        ConfigError: there is none of this name, or it is no pruner.
    """
    if isinstance(given, str) and given in ALGORITHMS:
        return ALGORITHMS[given]
    concrete = isinstance(given, type) and issubclass(given, Pruner)
    if concrete and not inspect.isabstract(given):
        return given  # type: ignore[return-value]
    hint = closest(given, ALGORITHMS) if isinstance(given, str) else ""
    raise ConfigError(
        f"{argument}: got {given!r}; expected one of {', '.join(ALGORITHMS)}, or the class "
        f"of a one-shot pruner{hint}"
    )


def base_arguments(
    kind: type[Pruner],
    pruning_params: Mapping[str, Any] | None,
    evaluator: Evaluator | None,
    dummy_input: Any,
) -> dict[str, Any]:
    """What the one-shot pruner is made with: its own arguments, and of the others what it uses.

    `SlimPruner` does not train unless its arguments say so, as the training is the user's.
    """
    found = dict(pruning_params or {})
    if issubclass(kind, DataPruner):
        found.setdefault("evaluator", evaluator)
    if issubclass(kind, SlimPruner):
        found.setdefault("training_epochs", 0)
    runs = found.get("mode") in ("dependency_aware", "isomorphic")
    if runs or found.get("dependency_aware"):
        found.setdefault("dummy_input", dummy_input)
    return found


class Remasker:
    """Masks a model to what a schedule says at a step, by a one-shot pruner.

    While sparsities grow, what is masked stays masked and counts. Where one falls, all masks are
    chosen anew, by the stored values of the weights.

    Args:
        model: masked in place.
        config: the layers and their schedules.
        kind: the one-shot pruner.
        arguments: of its constructor.

    Raises:
        ConfigError: ``kind`` does not take these arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ScheduledConfig,
        kind: type[Pruner],
        arguments: Mapping[str, Any],
    ) -> None:
        self.model, self.config, self.kind = model, config, kind
        self.arguments = dict(arguments)
        self.step: int | None = None
        self.first = applied_masks(model)
        self.before = {name: (units, size) for name, units, size in self._sizes()}
        # So that what is wrong with the arguments is said now: of the first masks (a pattern may
        # not have their sparsity) and of the last.
        for step in (config.start, config.end):
            self._make(config.sparsities(step))

    def due(self, step: int) -> bool:
        """Whether the masks of ``step`` may be others than those of now."""
        if self.step is None:
            return True
        return self.config.sparsities(step) != self.config.sparsities(self.step)

    def mask(self, step: int) -> Masks:
        """Mask the model, in place, to the sparsities of ``step``; returns all masks on it.

        Of several processes that train together all have to call it; they get the first one's.

        Raises:
            ConfigError, MaskError: as the one-shot pruner; the model is as it was.
        """
        now = self.config.sparsities(step)
        last = {} if self.step is None else self.config.sparsities(self.step)
        if any(now.values()):
            base = self._make(now)
            if any(now[index] < was for index, was in last.items()):
                self._mask_anew(base)
            else:
                base.compress()
        elif any(last.values()):
            suspend_masks(self.model)
            self.first.apply(self.model)
        self.step = step
        return broadcast_masks(self.model)

    def final(self) -> Masks:
        """What the final sparsities mask of the present weights; nothing is touched."""
        return self._make(self.config.sparsities(self.config.end)).calc_masks()

    def extents(self) -> dict[str, Extent]:
        """How large the layers are, by name."""
        return {name: Extent(units, *self.before[name]) for name, units, _ in self._sizes()}

    def _mask_anew(self, base: Pruner) -> None:
        suspended = suspend_masks(self.model)
        try:
            self.first.apply(self.model)
            base.compress()
        except BaseException:
            suspend_masks(self.model)
            suspended.restore()
            raise

    def _make(self, sparsities: Mapping[int, float]) -> Pruner:
        config_list = plain_config(self.config.targets, sparsities, self.extents())
        try:
            return self.kind(self.model, config_list, **self.arguments)
        except TypeError as error:
            raise ConfigError(
                f"pruning_params: {self.kind.__name__} does not take them: {error}"
            ) from error

    def _sizes(self) -> list[tuple[str, int, int]]:
        """Name, units and weights per unit of each target."""
        found = []
        for target in self.config.targets:
            layer = self.kind.layer(self.model, target)
            found.append((target.name, *self.kind.by_unit(layer, layer.weight).shape))
        return found
