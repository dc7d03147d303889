"""The model of a search as it is at a moment: what may go of it, what that saves, and copies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from compress.cost import CostModel, cost_model
from compress.errors import ConfigError
from compress.graph.run import collector_paused
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners.base import Pruner
from compress.search.put_back import moves_constants, put_back
from compress.search.shrink import Shrinker, Small
from compress.search.space import Point, SearchSpace, Sparsities
from compress.speedup.surgery import remaining_masks
from compress.unchanged import put_values, values_of

COSTS = ("sparsity", "params", "flops", "memory", "latency")
_HALVINGS = 40
_LESSONS = 5  # each may uncover what the next teaches
_MORE = 0.01  # of FLOPs than were meant is worth telling


class Subject:
    """A model of which candidates are made.

    Args:
        model: plain or masked, and nobody else's: it is made plain, and cut and put together again.
        kind, config_list, arguments: as `SearchSpace`.
        dummy_input: an input of the model.
    """

    @collector_paused()
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
        coupling = self.space.coupling
        self._shrinker = Shrinker(model, dummy_input, None if coupling is None else coupling.graph)
        self._costs: dict[str, CostModel] = {}
        self._parameters = sum(p.numel() for p in model.parameters())
        self._told = False
        if coupling is not None:
            self._try_out()

    def masks(self, point: Point) -> Masks:
        """What a point masks, with what the model had before."""
        masks = self.space.masks(point)
        masks &= self._before
        return masks

    @collector_paused()
    def small(self, point: Point) -> Small:
        """A small copy (of single weights, a masked one), and what was done to it."""
        masks = self.masks(point)
        if self.space.coupling is None:
            return self._shrinker.masked(masks)
        small = self._shrinker.small(masks)
        self._tell_what_stayed(point, small)
        return small

    def trainable(self, small: Small) -> nn.Module:
        """A candidate to be trained: small, where its weights can be put back into the large one.

        They cannot where the small model has constants of masked channels in its biases, or has
        masks left; then it is a masked copy of the large one.
        """
        plan, filters = small.plan, self.space.coupling is not None
        left = filters and bool(remaining_masks(small.masks, plan, small.model))
        if filters and not left and not moves_constants(plan):
            return small.model
        masked = deepcopy(self.model)
        small.masks.apply(masked)
        return masked

    def take_over(self, point: Point, state: Mapping[str, Tensor]) -> None:
        """Put the state of a `trainable` candidate, trained, into the model."""
        small = self.small(point)
        candidate = self.trainable(small)
        candidate.load_state_dict(state)
        if applied_masks(candidate):
            suspend_masks(candidate)
            put_values(self.model, values_of(candidate))
        else:
            put_back(self.model, small.plan, candidate.state_dict())

    def parameters(self, small: Small) -> int:
        """How many a candidate has; where single weights are masked, those that are not."""
        if self.space.coupling is not None:
            return sum(parameter.numel() for parameter in small.model.parameters())
        masks = small.masks.flat().values()
        masked = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)
        return self._parameters - masked

    def flops(self, small: Small) -> float | None:
        """Of a small model, with what the speedup kept; None where single weights are masked."""
        if small.decision is None:
            return None
        return self._cost_model("flops")(~small.decision.keep, small.decision.root)

    def cost(self, point: Point, kind: str) -> float | None:
        """ "params", "flops", ...: what is left of it; None where single weights are masked."""
        coupling = self.space.coupling
        if coupling is None or point.gone is None:
            return None
        return self._cost_model(kind)(point.gone, coupling.roots)

    def _cost_model(self, kind: str) -> CostModel:
        assert self.space.coupling is not None, "single weights have no costs"
        if kind not in self._costs:
            self._costs[kind] = cost_model(kind, self.space.coupling.graph)
        return self._costs[kind]

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

    def most(self, target: float, kind: str) -> Point:
        """All that may go.

        Raises:
            ConfigError: that saves less than ``target``; says how much.
        """
        most = self.space.point({group.name: group.max_sparsity for group in self.space.groups})
        if self.saved(most, kind) < target:
            raise ConfigError(
                f"{_wanted(kind)}: got {target:g}; at most {self.saved(most, kind):.4f} can go, "
                "since each layer keeps a channel and what its max_sparsity_per_layer says, and "
                "others are coupled with layers that are not selected; ask for less, or select more"
            )
        return most

    @collector_paused()
    def scaled(
        self, profile: Sparsities, target: float, kind: str, least: Sparsities | None = None
    ) -> Point:
        """The point nearest above ``target`` whose sparsities have the proportions of a profile.

        Each group loses the same multiple of its number in the profile, or all that it may; and
        what ``least`` says at least.

        Raises:
            ConfigError: so much cannot be saved; says what can.
        """
        most = self.most(target, kind)
        top = most.sparsities
        groups = self.space.groups
        floor = 1e-3 * max(profile.values(), default=1.0) or 1.0  # so that any target is reached
        shares = {g.name: max(profile.get(g.name, 0.0), floor) for g in groups}
        low, high = 0.0, max(top[name] / share for name, share in shares.items())
        best = most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            wanted = {n: max(middle * s, (least or {}).get(n, 0.0)) for n, s in shares.items()}
            point = self.space.point({n: min(s, top[n]) for n, s in wanted.items()})
            if self.saved(point, kind) >= target:
                high, best = middle, point
            else:
                low = middle
            if high - low < 1e-4 * high:
                break
        return best

    def _try_out(self) -> None:
        """Cut before anything is chosen, so that the space knows what the code cannot follow.

        A size that is a number in the code, or one attribute that two blocks count with. Each group
        is cut, and neighbours differ.
        """
        for _ in range(_LESSONS):
            masks = [self.masks(self._differing(odd)) for odd in (0, 1)]
            if not self._shrinker.learns(masks):
                return
            self.space.renew()

    def _differing(self, odd: int) -> Point:
        """Half of what each second group may lose, and a quarter of what the others may."""
        groups = enumerate(self.space.groups, odd)
        return self.space.point({g.name: g.max_sparsity / (2 + 2 * (i % 2)) for i, g in groups})

    def _tell_what_stayed(self, point: Point, small: Small) -> None:
        """Warn, once, of a candidate that costs more than its sparsities say."""
        wanted, got = self.cost(point, "flops"), self.flops(small)
        if self._told or wanted is None or got is None or got <= wanted * (1 + _MORE):
            return
        coupling, decision = self.space.coupling, small.decision
        assert coupling is not None and decision is not None and point.gone is not None
        for path, layer in coupling.graph.layers.items():
            chosen = layer.labels[point.gone[coupling.roots[layer.labels]]]
            stays = chosen[decision.kept(chosen)]
            if len(stays):
                self._told = True
                warnings.warn(
                    f"{path.removesuffix('.weight')!r}: {len(stays)} units that a candidate masks "
                    f"stay in its small model: it {decision.reason(int(stays[0]))}; that has "
                    f"{got:.4g} FLOPs, and {wanted:.4g} were meant. Trials have what it has",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return


def _wanted(kind: str) -> str:
    return "the sparsity" if kind == "sparsity" else f"the fraction of {kind} to save"
