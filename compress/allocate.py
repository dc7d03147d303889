"""Which units stay: scores and a sparsity in, boolean keep vectors out.

The only place with top-k, rounding and ties. The rules, which every function here follows:

- ``floor(sparsity · units)`` units are masked, never more than asked; ``per_layer`` is exact to the
  unit whatever the ties. 0.3 of 10 is 3 and 0.5 of 64 is 32, in spite of binary fractions.
- The lowest scores go; among equal scores the lowest index goes first.
- Every layer keeps at least ``min_channels`` units (all of them if it has fewer), at least one.
- ``round_to`` rounds the number of *kept* units up to a multiple, never above what there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from compress.errors import ConfigError, MaskError

# 0.29 * 100 is 28.999999999999996: a count this close to the next integer is that integer.
_EPSILON = 1e-9

Limit = int | Mapping[str, int]  # of all layers, or of each by name


def prune_count(units: int, sparsity: float) -> int:
    """``floor(sparsity · units)``, safe from binary fractions, and at most ``units - 1``."""
    return max(0, min(math.floor(sparsity * units + _EPSILON), units - 1))


def keep_count(units: int, sparsity: float, round_to: int = 1, min_channels: int = 1) -> int:
    """How many of ``units`` stay, after ``min_channels`` and then ``round_to``."""
    keep = max(units - prune_count(units, sparsity), min(min_channels, units))
    return min(units, math.ceil(keep / round_to) * round_to)


def keep_highest(scores: Tensor, keep: int) -> Tensor:
    """Bool ``(units,)``, True for the ``keep`` highest scores; of equal ones the later stay."""
    pruned = len(scores) - keep
    if pruned == 0:
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    # Not a sort: a single layer of a LevelPruner can have 10⁸ units.
    threshold = scores.kthvalue(pruned).values
    kept = scores > threshold
    equal = (scores == threshold).nonzero().flatten()
    kept[equal[pruned - int((scores < threshold).count_nonzero()) :]] = True
    return kept


def balanced(scores: Mapping[str, Tensor], pruned: Mapping[str, int]) -> dict[str, Tensor]:
    """In every region of a layer as many units go: bool ``(regions, units)`` per layer.

    Args:
        scores: ``(regions, units)`` per layer.
        pruned: how many units of each region go, per layer.

    Raises:
        MaskError: names the layers with NaN or infinite scores.
    """
    check_finite({name: values.flatten() for name, values in scores.items()})
    keep = {}
    for name, values in scores.items():
        lowest = values.argsort(dim=1, stable=True)[:, : pruned[name]]
        keep[name] = torch.ones_like(values, dtype=torch.bool).scatter_(1, lowest, False)
    return keep


def per_layer(
    scores: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    *,
    round_to: Limit = 1,
    min_channels: Limit = 1,
) -> dict[str, Tensor]:
    """Each layer by itself: a keep vector for every layer of ``sparsities``.

    Args:
        scores: ``(units,)`` per layer.
        sparsities: fraction of the units to mask, in [0, 1), per layer.

    Raises:
        MaskError: names the layers with NaN or infinite scores.
    """
    check_finite({name: scores[name] for name in sparsities})
    return {
        name: keep_highest(
            scores[name],
            keep_count(len(scores[name]), sparsity, _of(round_to, name), _of(min_channels, name)),
        )
        for name, sparsity in sparsities.items()
    }


def global_(
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    sparsity: float,
    *,
    max_sparsity: Mapping[str, float] | None = None,
    round_to: Limit = 1,
    min_channels: Limit = 1,
) -> dict[str, Tensor]:
    """One ranking over all layers, until ``sparsity`` of all *weights* is masked.

    Units go in the order of their scores (equal ones in the order of layers, then of index), each
    for as many weights as it has. Of all the points where the ranking can be cut, the one nearest
    to the wanted fraction is taken (of two equally near, the one that masks less), so that the
    result is off by at most half of one unit. With ``round_to`` what goes at once is a whole step
    of a layer, ranked by its mean score.

    Args:
        scores: ``(units,)`` per layer.
        sizes: weights per unit, per layer.
        sparsity: the fraction of the weights of all layers together.
        max_sparsity: the fraction of its units that a layer may lose, per layer; 1 if absent.

    Raises:
        ConfigError: the limits of the layers do not allow it; says what they do allow.
        MaskError: names the layers with NaN or infinite scores.
    """
    check_finite(scores)
    limits = {} if max_sparsity is None else max_sparsity
    ladders = {}
    for name, values in scores.items():
        step = _of(round_to, name)
        keep = keep_count(len(values), limits.get(name, 1.0), step, _of(min_channels, name))
        ladders[name] = _ladder(values, sizes[name], keep, step)
    total = sum(len(values) * sizes[name] for name, values in scores.items())
    target = sparsity * total
    # How many weights more could have gone if nothing limited the layers.
    missing = [
        one.round_to * sizes[name]
        for name, one in ladders.items()
        if one.prunable < len(scores[name])
    ]
    reachable = sum(one.prunable * sizes[name] for name, one in ladders.items())
    if missing and target - reachable >= min(missing) - _EPSILON:
        raise ConfigError(
            f"total_sparsity {sparsity} over {_listed(scores)}: at most {reachable / total:.4f} "
            "can be masked, since every layer keeps what max_sparsity_per_layer, min_channels="
            f"{_shown(min_channels)} and round_to={_shown(round_to)} ask for, and one unit in any "
            "case; lower total_sparsity or relax these"
        )
    steps = _cut(ladders, target)
    return {
        name: keep_highest(values, len(values) - ladders[name].pruned_after(steps[name]))
        for name, values in scores.items()
    }


def expand_filters(keep: Tensor, weight: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """The mask of a weight whose filters ``keep`` names: bool, the shape of ``weight``.

    Args:
        keep: bool ``(output channels,)``; it is the mask of the bias as it stands.
        weight: ``(out, ...)`` with ``axis=0``, or ``(in, out/groups, ...)`` with ``axis=1``.
    """
    keep = keep.to(weight.device)
    if axis == 0:
        flat = keep.reshape(-1, 1).expand(len(keep), math.prod(weight.shape[1:]))
        return flat.reshape(weight.shape).clone()
    inputs, outputs = weight.shape[0], weight.shape[1]
    per_input = keep.reshape(groups, 1, outputs).expand(groups, inputs // groups, outputs)
    per_input = per_input.reshape(inputs, outputs, *[1] * (weight.dim() - 2))
    return per_input.expand(weight.shape).clone()


@dataclass(frozen=True)
class _Ladder:
    """The steps by which one layer can lose units.

    Attributes:
        scores: ``(steps,)``, the mean score of the units of each step, in any order.
        weights: ``(steps,)`` int64, how many weights go with each step.
        first: units in the first step; ``round_to`` in every later one.
        round_to: see the module.
        prunable: units in all steps.
    """

    scores: Tensor
    weights: Tensor
    first: int
    round_to: int
    prunable: int

    def pruned_after(self, steps: int) -> int:
        """Units gone after the first ``steps`` steps."""
        return 0 if steps == 0 else self.first + (steps - 1) * self.round_to


def _ladder(scores: Tensor, size: int, keep: int, round_to: int) -> _Ladder:
    """Steps from all units down to ``keep``, each leaving a multiple of ``round_to``."""
    units = len(scores)
    first = units % round_to or round_to
    prunable = units - keep
    lowest = scores.topk(prunable, largest=False, sorted=round_to > 1).values
    if round_to == 1:
        weights = torch.tensor(size, device=scores.device).expand(prunable)
        return _Ladder(lowest, weights, 1, 1, prunable)
    lowest = lowest.double()
    step = (torch.arange(prunable, device=scores.device) + round_to - first) // round_to
    steps = int(step[-1]) + 1 if prunable else 0
    counts = torch.bincount(step, minlength=steps)
    sums = torch.zeros(steps, dtype=torch.float64, device=scores.device).index_add(0, step, lowest)
    return _Ladder(sums / counts, counts * size, first, round_to, prunable)


def _cut(ladders: Mapping[str, _Ladder], target: float) -> dict[str, int]:
    """Steps that each layer takes, where the ranking of all steps is cut nearest to ``target``."""
    device = next(iter(ladders.values())).scores.device
    dtype = reduce(torch.promote_types, (one.scores.dtype for one in ladders.values()))
    scores = {name: one.scores.to(device, dtype) for name, one in ladders.items()}
    ranking = torch.cat(list(scores.values()))
    left = _steps_nearest(
        ranking, torch.cat([one.weights.to(device) for one in ladders.values()]), target
    )
    if left == 0:
        return dict.fromkeys(ladders, 0)
    threshold = ranking.kthvalue(left).values
    taken = {name: int((values < threshold).count_nonzero()) for name, values in scores.items()}
    left -= sum(taken.values())
    for name, values in scores.items():  # equal ones in the order of the layers
        equal = min(left, int((values == threshold).count_nonzero()))
        taken[name] += equal
        left -= equal
    return taken


def _steps_nearest(ranking: Tensor, weights: Tensor, target: float) -> int:
    """How many of the lowest steps weigh nearest to ``target``; of two equally near, the fewer.

    The epsilons are for a target that lies half-way but for its binary fraction.
    """
    if len(weights) == 0:
        return 0
    size = int(weights[0])
    if bool((weights == size).all()):  # no need to sort single weights
        return max(0, min(math.ceil(target / size - 0.5 - _EPSILON), len(weights)))
    order = torch.sort(ranking, stable=True).indices
    masked = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)]).double()
    distance = (masked - target).abs()
    return int((distance <= distance.min() + _EPSILON * max(1.0, target)).nonzero()[0])


def _of(limit: Limit, name: str) -> int:
    return limit if isinstance(limit, int) else limit[name]


def _shown(limit: Limit) -> str:
    each = {limit} if isinstance(limit, int) else set(limit.values())
    return " to ".join(str(value) for value in sorted({min(each), max(each)}))


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise MaskError, which names the layers with NaN or infinite scores, if there are any."""
    bad = [
        f"{name!r} ({int((~values.isfinite()).sum())} of {len(values)} units)"
        for name, values in scores.items()
        if not bool(values.isfinite().all())
    ]
    if bad:
        raise MaskError(
            f"NaN or infinite scores: {', '.join(bad)}; expected finite ones; the layers' weights "
            "have diverged, or the loss that was measured has: load a good checkpoint, look at the "
            "data, or exclude these layers"
        )


def _listed(names: Mapping[str, object]) -> str:
    shown = ", ".join(map(repr, list(names)[:5]))
    return f"{len(names)} layers ({shown}{', ...' if len(names) > 5 else ''})"
