"""Norms: over the batch and places (channel by channel), and over channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from compress.graph.labels import Axes, Axis, LabelSpace
from compress.graph.shapes import along, per_position
from compress.rules.registry import Call, Rule, Value, rule

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

AxesOf = Callable[[Any], Axes]


def _tie_vectors(
    axis: Axis, vectors: list[fx.Node | None], axes: AxesOf, call: Call, space: LabelSpace
) -> Axis:
    """Tie a channel axis to the vectors (weight, bias, statistics) that go with it."""
    for vector in vectors:
        if vector is not None:
            axis = space.tie(axis, axes(vector)[0], call.node, f"meets a fixed {call.name}")
    return axis


def _vector(node: fx.Node | None, known: Knowledge, default: float, size: int) -> Value:
    if node is None:
        return torch.full((size,), default, dtype=torch.float64)
    return known.value(node)


@rule("batch_norm", "instance_norm")
class ChannelNorm(Rule):
    """(x - mean) / sqrt(var + eps) * weight + bias, with one of each for every channel (axis 1).

    Values are those of eval mode. Where the statistics come from the data, a constant channel is
    its own mean and gives its bias.
    """

    positional = True

    def parts(self, call: Call) -> tuple[list[fx.Node | None], bool, float]:
        """Weight, bias, running mean and variance; whether these two are used; eps."""
        mean, var = call.arg(1, "running_mean"), call.arg(2, "running_var")
        weight, bias = call.arg(3, "weight"), call.arg(4, "bias")
        eps = call.arg(7, "eps", 1e-5)
        from_data = call.arg(5, "training", False)
        if call.name == "instance_norm":
            from_data = call.arg(5, "use_input_stats", True)
        fixed = mean is not None and not from_data
        return [weight, bias, mean, var], fixed, eps

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        result, (vectors, fixed, _) = list(axes(call.first)), self.parts(call)
        for i, axis in enumerate(result):
            if i > 1 or (i == 0 and not fixed and call.name == "batch_norm"):
                space.pin(axis, call.node, f"is a place that {call.name} works over")
                result[i] = None
        result[1] = _tie_vectors(result[1], vectors, axes, call, space)
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        vectors, fixed, eps = self.parts(call)
        x, channels = known.value(call.first), call.shape[1]
        weight = _vector(vectors[0], known, 1.0, channels)
        bias = _vector(vectors[1], known, 0.0, channels)
        if weight is None or bias is None:
            return None
        if x is None:
            constant = torch.full((channels,), torch.nan, dtype=torch.float64)
        else:
            constant = per_position(x, 1, channels)
        if fixed:
            mean, var = known.value(vectors[2]), known.value(vectors[3])
            if mean is None or var is None:
                return None
            normal = (constant - mean) / torch.sqrt(var + eps)
        else:
            normal = torch.where(constant.isnan(), constant, 0.0)
        result = torch.where(weight == 0, bias, normal * weight + bias)
        return None if bool(result.isnan().all()) else along(result, 1, len(call.shape))

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        """Without parameters a norm counts all the same: it warns of other sizes."""
        axis = plan.knowledge.axis(call.node, 1)
        module = plan.graph.modules[call.module]
        counts = isinstance(module, nn.modules.batchnorm._NormBase)
        if axis is not None and counts and module.num_features == len(axis):
            plan.set_number(call, "num_features", len(axis), int(plan.kept(axis).sum()))


@rule("group_norm")
class GroupNorm(Rule):
    """Statistics over groups of channels: a group goes as a whole."""

    def sized(self, call: Call) -> bool:
        return True

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        result, groups = list(axes(call.first)), call.arg(1, "num_groups")
        for i in range(2, len(result)):
            space.pin(result[i], call.node, "is a place that group_norm works over")
            result[i] = None
        vectors = [call.arg(2, "weight"), call.arg(3, "bias")]
        axis = result[1] = _tie_vectors(result[1], vectors, axes, call, space)
        if axis is not None:
            first = axis[:: len(axis) // groups]  # of each group
            space.tie(np.repeat(first, len(axis) // groups), axis, call.node, "group_norm")
        return tuple(result)

    def value(self, call: Call, known: Knowledge) -> Value:
        x, channels = known.value(call.first), call.shape[1]
        weight = _vector(call.arg(2, "weight"), known, 1.0, channels)
        bias = _vector(call.arg(3, "bias"), known, 0.0, channels)
        if weight is None or bias is None:
            return None
        normal = torch.full((channels,), torch.nan, dtype=torch.float64)
        if x is not None:
            groups = per_position(x, 1, channels).reshape(call.arg(1, "num_groups"), -1)
            spread = groups.var(1, unbiased=False, keepdim=True) + call.arg(4, "eps", 1e-5)
            normal = ((groups - groups.mean(1, keepdim=True)) / spread.sqrt()).reshape(-1)
        result = torch.where(weight == 0, bias, normal * weight + bias)
        return None if bool(result.isnan().all()) else along(result, 1, len(call.shape))

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        axis, groups = plan.knowledge.axis(call.node, 1), call.arg(1, "num_groups")
        if axis is not None:
            left = int(plan.kept(axis).reshape(groups, -1)[:, 0].sum())
            plan.set_number(call, "num_groups", groups, left)


@rule("local_response_norm")
class NormOverChannels(Rule):
    """Statistics over neighbouring channels: they stay as they are."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        result = list(axes(call.first))
        space.pin(result[1], call.node, f"is what {call.name} takes its statistics over")
        result[1] = None
        return tuple(result)
