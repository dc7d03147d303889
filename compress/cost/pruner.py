"""``GlobalPruner``: prune to what a model shall cost, or what is not worth its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.cost.examples import Examples, Validation, is_data
from compress.cost.meet import TargetReport, Wish, meet
from compress.cost.model import check_cost
from compress.cost.table import LatencyTable
from compress.cost.target import parse_target
from compress.cost.threshold import below
from compress.errors import ConfigError, closest
from compress.evaluator import Evaluator
from compress.masks import Masks, suspend_masks
from compress.pruners.base import Pruner
from compress.pruners.data import is_count
from compress.pruners.export import MaskedModel
from compress.schedule.bases import base_arguments, base_type
from compress.speedup import ModelSpeedup

STRATEGIES = ("global", "local")
_SPARSITIES = ("sparsity", "sparsity_per_layer", "total_sparsity")


class GlobalPruner(MaskedModel):
    """Prune all layers together, until the model costs what it shall.

    What is worth least for what it costs goes first, over all layers; layers that can only shrink
    together, and those that share weights, as one. With ``cost="latency"`` the small model is cut
    and timed beside the dense one on this device, and cut anew, until its measured time is met.

    Two ways to make it: ``GlobalPruner(model, config_list, target=0.5, dummy_input=x)`` says which
    layers may shrink, and to what the model shall; ``GlobalPruner(model, x, y).prune(0.01)`` takes
    data, and removes what the loss does not feel.

    Args:
        model: masked in place by `compress`, shrunk in place by `prune`.
        config_list: which layers: selectors, ``exclude`` and ``max_sparsity_per_layer`` of
            `compress.config`, and no sparsity; all that can be pruned, by default. Or x: inputs, a
            tensor, or a loader or dataset of ``(*inputs, target)``.
        y: the targets of a tensor x.
        cost: "latency", "flops", "params" or "memory" (see `compress.cost`).
        target: a fraction of the dense model's cost, such as 0.5, or text with a unit, such as
            "12 ms", "300 M" or "20 MB". A latency is met within ``tolerance``; the others are met
            by the first step that does not cost more.
        strategy: "global": the least important for what it saves, wherever it is. "local": every
            layer (group of layers) gives the same share of its cost.
        threshold: in the place of a target: see `prune`.
        base_algo: scores the units: see `compress.schedule.bases`; "taylorfo" where there is
            data, else "l1".
        dummy_input: what the cost is of: its batch size counts. With x, the first batch.
        evaluator: the data of a base algorithm that looks at data.
        criterion: with x, a loss other than cross-entropy (integer y) and squared error.
        pruning_params: further arguments of the base algorithm.
        round_to: layers keep multiples of so many units; by default, for latency, counts at which
            the measured time drops, and 1 for the others.
        min_channels: units that every layer keeps.
        table: a `LatencyTable`, or the path of its file; what was measured once is not again.
        tolerance: how far off a latency may be, as a fraction.
        rounds: how many cuts are measured at most.

    Raises:
        ConfigError: lists what is wrong with the arguments; nothing has been touched.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]] | Any = None,
        y: Tensor | None = None,
        *,
        cost: str = "latency",
        target: float | str | None = None,
        strategy: str = "global",
        threshold: float | None = None,
        base_algo: str | type[Pruner] | None = None,
        dummy_input: Any = None,
        evaluator: Evaluator | None = None,
        criterion: Callable[..., Tensor] | None = None,
        pruning_params: Mapping[str, Any] | None = None,
        round_to: int | None = None,
        min_channels: int = 1,
        table: LatencyTable | str | os.PathLike[str] | None = None,
        tolerance: float = 0.05,
        rounds: int = 12,
    ) -> None:
        check_cost(cost)
        _check_choice(strategy)
        _check_threshold(threshold)
        _check_numbers(tolerance, rounds)
        if target is not None and threshold is not None:
            raise ConfigError("GlobalPruner: got target and threshold; expected one of the two")
        self.examples = _examples(config_list, y, criterion)
        if self.examples is not None:
            config_list = None
            dummy_input = self.examples.inputs if dummy_input is None else dummy_input
            evaluator = self.examples if evaluator is None else evaluator
        self.strategy, self.threshold = strategy, threshold
        self.target = None if target is None else parse_target(cost, target)
        self.tolerance, self.rounds = tolerance, rounds
        self.round_to, self.dummy_input = round_to, dummy_input
        self.table = table if isinstance(table, LatencyTable) else LatencyTable(table)
        options = {"mode": "dependency_aware", "round_to": 1 if round_to is None else round_to}
        options |= {"min_channels": min_channels, **(pruning_params or {})}
        kind = base_type(base_algo or ("l1" if evaluator is None else "taylorfo"), "base_algo")
        arguments = base_arguments(kind, options, evaluator, dummy_input)
        self.base = kind(model, _layers(config_list), **arguments)
        if not self.base.runs_the_model:
            raise ConfigError(
                f"pruning_params: got mode={self.base.mode!r}; a GlobalPruner takes what goes "
                "together as one: expected 'dependency_aware' or 'isomorphic'"
            )
        self.model = model
        self.report: TargetReport | None = None
        self.validation: Validation | None = None

    @property
    def masks(self) -> Masks:
        """A copy of the masks of the last `compress`."""
        return self.base.masks

    def calc_masks(self) -> Masks:
        """The masks that meet the target (or the threshold); the model is not touched.

        Raises:
            ConfigError: there is neither.
            CompressError: the target cannot be met; says what can be reached.
        """
        return self._masks(self.threshold, self.strategy)

    def compress(self) -> tuple[nn.Module, Masks]:
        """Mask the model, in place; ``report`` tells what was reached.

        Returns:
            The model that was given, and a copy of its masks.

        Raises:
            CompressError: as `calc_masks`; the model is as it was.
        """
        return self.base.put(self.calc_masks())

    def prune(
        self,
        threshold: float | None = None,
        strategy: str | None = None,
        device: str | torch.device | None = None,
        validate: bool = False,
    ) -> nn.Module:
        """Shrink the model, in place: mask it, and cut what is masked.

        Args:
            threshold: what is less important goes; not the last unit of a layer, nor what the
                output's shape is made of. The importance of a unit is its score divided by the
                largest of the model ("global") or of its layer ("local"); of units that go
                together, their mean. By default, as the pruner was made: with its target, too.
            strategy: "global" or "local"; by default, as the pruner was made.
            device: where the model goes and is run; by default, where it is.
            validate: evaluate the loss and the accuracy on x and y before and after, print both,
                and keep them in ``validation``.

        Returns:
            The same model, smaller.

        Raises:
            CompressError: as `compress`, or `ModelSpeedup`; the model is as it was.
        """
        _check_threshold(threshold)
        _check_choice(self.strategy if strategy is None else strategy)
        if validate and self.examples is None:
            raise ConfigError(
                "prune: validate=True evaluates on x and y; make the pruner with them"
            )
        threshold = self.threshold if threshold is None else threshold
        where = next((p.device for p in self.model.parameters()), None)
        try:
            if device is not None:
                self._move(device)
            return self._prune(threshold, strategy or self.strategy, validate)
        except BaseException:
            if device is not None and where is not None:
                self._move(where)
            raise

    def _masks(self, threshold: float | None, strategy: str) -> Masks:
        if threshold is None and self.target is None:
            raise ConfigError(
                "GlobalPruner: nothing says how much goes; pass target=, such as target=0.5, or "
                "threshold="
            )
        atoms = self.base.scored_atoms()
        if threshold is not None:
            return atoms.masks(below(atoms.coupling, threshold, strategy, self.round_to or 1))
        assert self.target is not None
        wish = Wish(self.target, strategy, self.round_to, self.tolerance, self.rounds, self.table)
        with suspend_masks(self.model):
            gone, self.report = meet(self.model, self.dummy_input, atoms, wish)
        return atoms.masks(gone)

    def _prune(self, threshold: float | None, strategy: str, validate: bool) -> nn.Module:
        examples = self.examples if validate else None
        before = None if examples is None else examples.quality(self.model)
        masks = self._masks(threshold, strategy)
        suspended = suspend_masks(self.model)
        try:
            small = ModelSpeedup(self.model, self.dummy_input, masks).speedup_model()
        except BaseException:
            suspended.restore()
            raise
        if examples is not None and before is not None:
            self.validation = Validation(before, examples.quality(small))
            print(self.validation)  # noqa: T201 (what validate=True asks for)
        return small

    def _move(self, device: torch.device | str) -> None:
        self.model.to(device)
        self.dummy_input = tree_map_only(Tensor, lambda t: t.to(device), self.dummy_input)
        self.base.dummy_input = self.dummy_input


def _examples(data: Any, y: Any, criterion: Any) -> Examples | None:
    """x and y, where they are in the place of a config_list."""
    if is_data(data):
        return Examples(data, y, criterion)
    if y is not None or criterion is not None:
        raise ConfigError(
            "GlobalPruner: y and criterion are for data as the second argument, and got "
            f"{type(data).__name__}; pass a tensor, a loader or a dataset as x"
        )
    return None


def _layers(config_list: Any) -> Any:
    """A config_list without sparsities, for a pruner that wants one in each entry."""
    if config_list is None:
        return [{"op_types": ["default"], "total_sparsity": 0.0}]
    if not isinstance(config_list, (list, tuple)):
        return config_list  # the base pruner says what is wrong with it
    found: list[Any] = []
    for index, entry in enumerate(config_list):
        if isinstance(entry, Mapping):
            given = [name for name in _SPARSITIES if name in entry]
            if given:
                raise ConfigError(
                    f"config_list[{index}][{given[0]!r}]: a GlobalPruner finds the sparsities by "
                    "itself, so that target is met; leave it out, or bound a layer with "
                    "max_sparsity_per_layer"
                )
            entry = dict(entry) if entry.get("exclude") else {**entry, "total_sparsity": 0.0}
        found.append(entry)
    return found


def _is_fraction(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1


def _check_choice(strategy: Any) -> None:
    if strategy not in STRATEGIES:
        hint = closest(strategy, STRATEGIES) if isinstance(strategy, str) else ""
        raise ConfigError(f"strategy: got {strategy!r}; expected 'global' or 'local'{hint}")


def _check_threshold(threshold: Any) -> None:
    if threshold is not None and not _is_fraction(threshold):
        raise ConfigError(
            f"threshold: got {threshold!r}; expected a number in (0, 1): 1 is the most important"
        )


def _check_numbers(tolerance: object, rounds: Any) -> None:
    if not _is_fraction(tolerance):
        raise ConfigError(f"tolerance: got {tolerance!r}; expected a fraction in (0, 1)")
    if not is_count(rounds, 1):
        raise ConfigError(f"rounds: got {rounds!r}; expected a whole number ≥ 1")
