"""Functions that make tensors of constants, of a given size, and any tensors like another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from compress.graph.labels import Axes, LabelSpace
from compress.rules.registry import Call, Rule, Value, no_axes, rule

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

AxesOf = Callable[[Any], Axes]


def is_zeros(node: fx.Node) -> bool:
    """Whether a node makes a tensor of zeros by its sizes: its positions are all alike."""
    return node.meta["name"] in ("zeros", "new_zeros")


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
class Creation(Rule):
    """A new tensor, of sizes that the code gives: they shrink if it counts them off others."""

    def sized(self, call: Call) -> bool:
        return True

    def given_sizes(self, call: Call) -> dict[int, int]:
        first = 1 if call.name.startswith("new_") else 0
        full = call.name.endswith("full")
        sizes = call.arg(first, "size") if full else call.rest(first, "size")
        return {i: s for i, s in enumerate(sizes) if isinstance(s, int)}

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Axes:
        return tuple(space.created(s, call.node) if s > 1 else None for s in call.shape)

    def value(self, call: Call, known: Knowledge) -> Value:
        fill: Any = {"zeros": 0.0, "ones": 1.0}.get(call.name.removeprefix("new_"))
        if call.name.endswith("full"):
            fill = call.arg(2 if call.name == "new_full" else 1, "fill_value")
        if not isinstance(fill, (int, float)) or not call.node.meta["dtype"].is_floating_point:
            return None
        return torch.full((1,) * len(call.shape), fill, dtype=torch.float64)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero",
      "fill")  # fmt: skip
class Like(Rule):
    """A new tensor with the sizes of another, or that one filled: it shrinks along with it."""

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        return axes(call.first)

    def value(self, call: Call, known: Knowledge) -> Value:
        fill: Any = {"zeros_like": 0.0, "zero": 0.0, "ones_like": 1.0}.get(call.name)
        if call.name in ("full_like", "fill"):
            fill = call.arg(1, "fill_value", call.node.kwargs.get("value"))
        if not isinstance(fill, (int, float)) or not call.node.meta["dtype"].is_floating_point:
            return None
        return torch.full((1,) * len(call.shape), float(fill), dtype=torch.float64)


@rule("new_tensor")
class NewTensor(Rule):
    """``x.new_tensor(data)``: of x it takes the dtype and the device."""

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        for node in call.inputs:
            if node is not call.first:
                space.pin_all(axes(node), call.node, "is copied by new_tensor")
        return no_axes(call.shape)
