"""What is known of every tensor of a trace under the masks, whatever the input."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.graph.channels import ChannelGraph
from compress.graph.labels import Axis
from compress.graph.shapes import per_position
from compress.rules.elementwise import LARGEST_VALUE
from compress.rules.registry import Value, rule_for

_PLAIN_FORWARDS = {
    cls.forward
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
                nn.ConvTranspose2d, nn.ConvTranspose3d)
}  # fmt: skip


# What stands for the values of a parameter on the meta device: anything but 0.
UNKNOWN = 0.37


class Knowledge:
    """Known values of a masked model, computed once in the order of the run.

    ``masks`` maps parameter paths to bool tensors (true: kept). Values are float64 and compact
    (see ``compress.graph.shapes``), NaN where the input decides.
    """

    def __init__(
        self, graph: ChannelGraph, masks: Mapping[str, torch.Tensor], constants: str = "exact"
    ) -> None:
        self.graph = graph
        self.masks = masks
        self.constants = constants
        self._values: dict[fx.Node, Any] = {}
        self._patterns: dict[fx.Node, np.ndarray] = {}
        self._unread: dict[tuple[fx.Node, int], np.ndarray | None] = {}
        self._outputs = set(graph.trace.outputs)
        for step in graph.steps:
            # A form of a call that a rule did not foresee: nothing is known of its output.
            with suppress(Exception):
                self._values[step.call.node] = step.rule.value(step.call, self)

    # -- leaves ----------------------------------------------------------------------------

    def leaf(
        self, node: fx.Node, axis: int = 0, positions: np.ndarray | None = None
    ) -> torch.Tensor:
        """The masked parameter (or buffer) behind a leaf, or some positions along an axis.

        Of a weight that is computed from others: what is known of it.
        """
        if node.op != "get_attr":
            value = self.value(node)
            full = torch.tensor(torch.nan).double() if value is None else value
            full = full.expand(node.meta["shape"])
            index = None if positions is None else torch.from_numpy(positions)
            return full if index is None else full.index_select(axis, index)
        tensor: torch.Tensor = node.meta["tensor"].detach()
        mask = self.masks.get(str(node.target))
        if tensor.is_meta:
            tensor = torch.tensor(UNKNOWN, device="cpu").expand(tensor.shape)
        if positions is not None:
            index = torch.from_numpy(positions).to(tensor.device)
            tensor = tensor.index_select(axis, index)
            mask = None if mask is None else mask.to(tensor.device).index_select(axis, index)
        return tensor if mask is None else torch.where(mask.to(tensor.device), tensor, 0)

    def pattern(self, node: fx.Node) -> np.ndarray:
        """Bool (d0, d1): whether any weight at these positions of the first two axes is not 0."""
        found = self._patterns.get(node)
        if found is None:
            if node.op == "get_attr":
                mask = self.masks.get(str(node.target))
                weight = node.meta["tensor"].detach()
                if weight.is_meta:
                    found = _unmasked_pattern(weight.shape, mask)
                else:
                    found = _nonzero_pattern(weight, mask).cpu().numpy()
            else:
                found = _nonzero_pattern(self.leaf(node), None).numpy()
            self._patterns[node] = found
        return found

    def used(self, node: fx.Node, axes: tuple[int, int]) -> np.ndarray:
        """Bool (d0, d1): whether any weight at these positions of two axes is not 0."""
        if axes == (0, 1):
            return self.pattern(node)
        found = np.zeros([node.meta["shape"][axis] for axis in axes], bool)
        (over,) = set(range(len(node.meta["shape"]))) - set(axes)
        for position in range(node.meta["shape"][over]):  # a part at a time: they are large
            part = self.leaf(node, over, np.array([position])).squeeze(over) != 0
            found |= (part if axes[0] < axes[1] else part.T).cpu().numpy()
        return found

    def forget(self) -> None:
        """Drop what only a decision needs: a byte for each weight that has values."""
        self._patterns.clear()

    # -- values ----------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        if node is None:
            return None
        if node.op == "get_attr":
            return self._leaf_value(node)  # read once or twice: not worth keeping
        if node.meta["name"] == "getitem_output":
            source, key = node.args
            several = self._values.get(source)
            return several[key] if isinstance(several, tuple) and isinstance(key, int) else None
        value = self._values.get(node)
        return None if isinstance(value, tuple) else value

    def _leaf_value(self, node: fx.Node) -> Value:
        tensor = node.meta["tensor"]
        if tensor.numel() > LARGEST_VALUE or (tensor.is_meta and not tensor.is_floating_point()):
            return None
        value = self.leaf(node).cpu()
        if value.is_floating_point():
            return value.double()
        return None if value.is_complex() else value

    # -- demand ----------------------------------------------------------------------------

    def axis(self, node: fx.Node, axis: int) -> Axis:
        return self.graph.axis(node, axis)

    def uses(self, node: fx.Node) -> int:
        return len(node.users)

    def known(self, node: fx.Node, axis: int) -> np.ndarray | None:
        """Bool, one per position of an axis: whether the output there is a known constant."""
        value = self.value(node)
        if value is None or not value.is_floating_point():
            return None
        unknown = per_position(value, axis, node.meta["shape"][axis]).isnan()
        return (~unknown).numpy()

    def unread(self, node: fx.Node, axis: int) -> np.ndarray | None:
        """Bool, one per position: whether all calls that use the node ignore it (None: they read).

        A product with a known 0 ignores the other factor, a norm whose weight is 0 its input.
        ``axis`` counts from the right.
        """
        key = (node, axis)
        if key not in self._unread:
            self._unread[key] = self._find_unread(node, axis)
        return self._unread[key]

    def _find_unread(self, node: fx.Node, axis: int) -> np.ndarray | None:
        result: np.ndarray | None = None
        if node in self._outputs or not node.users:
            return None
        for user in node.users:
            if not rule_for(user.meta["name"]).positional:
                return None
            shape = user.meta["shape"]
            if len(shape) != len(node.meta["shape"]) or shape[axis] != node.meta["shape"][axis]:
                return None
            known, unread = self.known(user, axis), self.unread(user, axis)
            if known is None and unread is None:
                return None
            ignored = known if unread is None else unread if known is None else known | unread
            assert ignored is not None
            result = ignored if result is None else result & ignored
        return result

    def takes_bias(self, weight: fx.Node, bias: fx.Node | None, module_path: str) -> bool:
        """Whether a constant can be added to a call's bias without touching anything else."""
        if weight.op != "get_attr" or self.uses(weight) != 1:
            return False
        if bias is not None:
            return bias.meta["name"] == "parameter" and self.uses(bias) == 1
        module = self.graph.modules[module_path]
        return (
            type(module).forward in _PLAIN_FORWARDS
            and "bias" in module._parameters
            and weight.meta["module"].split(".parametrizations")[0] == module_path
        )


def _nonzero_pattern(weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Bool (d0, d1): whether any unmasked weight at these first two positions is not 0.

    Most are told by one look at the middle of the kernel; only the rest is searched.
    """
    if weight.shape[2:].numel() == 1:
        weight = weight.reshape(weight.shape[:2])
        found = weight.bool()  # as != 0, in a tenth of the time
        return found if mask is None else found & mask.to(weight.device).reshape(weight.shape)
    weight = weight.flatten(2)
    middle = weight.select(2, weight.shape[2] // 2)
    if mask is None:
        found = middle.bool()
        unsure = ~found
    else:
        mask = mask.to(weight.device).flatten(2)
        found = torch.zeros_like(middle, dtype=torch.bool)
        rows = any_by_row(mask).nonzero()[:, 0]
        part = middle.index_select(0, rows).bool()
        part &= mask.select(2, mask.shape[2] // 2).index_select(0, rows)
        found[rows] = part
        unsure = torch.zeros_like(found)
        unsure[rows] = ~part
    if bool(unsure.any()):
        rest = weight[unsure].bool()
        found[unsure] = (rest if mask is None else rest & mask[unsure]).any(1)
    return found


def _unmasked_pattern(shape: torch.Size, mask: torch.Tensor | None) -> np.ndarray:
    """The same of a weight on meta, where all that is not masked counts; it takes no memory."""
    if mask is None:
        return np.broadcast_to(np.True_, shape[:2])
    return (mask if mask.dim() < 3 else mask.flatten(2).any(2)).cpu().numpy()


def any_by_row(mask: torch.Tensor) -> torch.Tensor:
    """Bool (rows,): whether anything in a row of a bool tensor is true."""
    if mask.device.type == "cpu":  # numpy stops at the first one that is
        return torch.from_numpy(mask.flatten(1).numpy().any(1))
    return mask.flatten(1).any(1)


def all_by_row(mask: torch.Tensor) -> torch.Tensor:
    """Bool (rows,): whether everything in a row of a bool tensor is true."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.flatten(1).numpy().all(1))
    return mask.flatten(1).all(1)
