"""Functions that make a tensor of nothing but sizes: zeros, ones, and those like another tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from compress.graph.labels import Axes, LabelSpace
from compress.rules.registry import Call, Rule, Value, rule

if TYPE_CHECKING:
    from compress.speedup.knowledge import Knowledge

_FILLS = {"zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0,
          "zeros_like": 0.0, "ones_like": 1.0}  # fmt: skip


def _filled(call: Call) -> Value:
    """The one value that a new tensor holds."""
    if call.name not in _FILLS or not call.node.meta["dtype"].is_floating_point:
        return None
    return torch.full((1,) * len(call.shape), _FILLS[call.name], dtype=torch.float64)


def is_zeros(node: fx.Node) -> bool:
    """Whether a node makes a tensor of zeros by its sizes: its positions are all alike."""
    return node.meta["name"] in ("zeros", "new_zeros")


@rule("zeros", "ones", "new_zeros", "new_ones")
class New(Rule):
    """A new tensor of sizes that the caller gives by number: it may be asked for fewer.

    Its positions are labels of their own, which what it meets ties to others.
    """

    def sizes(self, call: Call) -> tuple[Any, ...]:
        return call.rest(int(call.name.startswith("new_")), "size")

    def sized(self, call: Call) -> bool:
        return True

    def given_sizes(self, call: Call) -> dict[int, int]:
        return {i: s for i, s in enumerate(self.sizes(call)) if isinstance(s, int)}

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        return tuple(space.fresh(size) if size > 1 else None for size in call.shape)

    def value(self, call: Call, known: Knowledge) -> Value:
        return _filled(call)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
class Like(Rule):
    """A new tensor with the sizes of another: it shrinks along with it."""

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Axes:
        return axes(call.first)

    def value(self, call: Call, known: Knowledge) -> Value:
        return _filled(call)
