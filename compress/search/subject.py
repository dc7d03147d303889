"""The model of a search as it is at a moment: what may go of it, what that saves, and copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compress.cost import CostModel, cost_model
from compress.errors import ConfigError
from compress.masks import Masks, suspend_masks
from compress.pruners.base import Pruner
from compress.search.shrink import Shrinker
from compress.search.space import Point, SearchSpace, Sparsities
from compress.speedup.plan import Plan

COSTS = ("sparsity", "params", "flops", "memory", "latency")
_HALVINGS = 40


class Subject:
    """A model of which candidates are made.

    Args:
        model: plain or masked, and nobody else's: it is made plain, and cut and put together again.
        kind, config_list, arguments: as `SearchSpace`.
        dummy_input: an input of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: type[Pruner],
        config_list: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        dummy_input: Any,
    ) -> None:
        self.model = model
        self.space = SearchSpace(kind, model, config_list, arguments)
        self._before = suspend_masks(model).masks  # for good: the space's masks have them in
        self._shrinker = Shrinker(model, dummy_input)
        self._costs: dict[str, CostModel] = {}
        self._parameters = sum(p.numel() for p in model.parameters())

    def masks(self, point: Point) -> Masks:
        """What a point masks, with what the model had before."""
        masks = self.space.masks(point)
        masks &= self._before
        return masks

    def small(self, point: Point) -> tuple[nn.Module, Plan]:
        """A small copy (of single weights, a masked one), and what was done to it."""
        masks = self.masks(point)
        if self.space.coupling is None:
            return self._shrinker.masked(masks), Plan()
        return self._shrinker.small(masks)

    def parameters(self, point: Point, small: nn.Module) -> int:
        """How many a candidate has; where single weights are masked, those that are not."""
        if self.space.coupling is not None:
            return sum(parameter.numel() for parameter in small.parameters())
        masks = self.masks(point).flat().values()
        masked = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)
        return self._parameters - masked

    def cost(self, point: Point, kind: str) -> float | None:
        """ "params", "flops", ...: what is left of it; None where single weights are masked."""
        coupling = self.space.coupling
        if coupling is None or point.gone is None:
            return None
        if kind not in self._costs:
            self._costs[kind] = cost_model(kind, coupling.graph)
        return self._costs[kind](point.gone, coupling.roots)

    def saved(self, point: Point, kind: str) -> float:
        """The fraction that a point saves: of the selected weights, or of a cost of the model."""
        if kind == "sparsity":
            return point.share
        left = self.cost(point, kind)
        if left is None:
            raise ConfigError(
                f"cost={kind!r}: base_algo masks single weights, which saves none; pass "
                'cost="sparsity", or an algorithm of whole filters, such as base_algo="l1"'
            )
        return 1.0 - left / self._costs[kind].dense

    def scaled(self, profile: Sparsities, target: float, kind: str) -> Point:
        """The point nearest above ``target`` whose sparsities have the proportions of a profile.

        Each group loses the same multiple of its number in the profile, or all that it may.

        Raises:
            ConfigError: so much cannot be saved; says what can.
        """
        groups = self.space.groups
        top = {group.name: group.max_sparsity for group in groups}
        most = self.space.point(top)
        if self.saved(most, kind) < target:
            raise ConfigError(
                f"{_wanted(kind)}: got {target:g}; at most {self.saved(most, kind):.4f} can go, "
                "since each layer keeps a channel and what its max_sparsity_per_layer says, and "
                "others are coupled with layers that are not selected; ask for less, or select more"
            )
        floor = 1e-3 * max(profile.values(), default=1.0) or 1.0  # so that any target is reached
        shares = {g.name: max(profile.get(g.name, 0.0), floor) for g in groups}
        low, high = 0.0, max(top[name] / share for name, share in shares.items())
        best = most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            point = self.space.point({n: min(middle * s, top[n]) for n, s in shares.items()})
            if self.saved(point, kind) >= target:
                high, best = middle, point
            else:
                low = middle
            if high - low < 1e-4 * high:
                break
        return best


def _wanted(kind: str) -> str:
    return "the sparsity" if kind == "sparsity" else f"the fraction of {kind} to save"
