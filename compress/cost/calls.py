"""What each recorded call of the dense model does: its FLOPs, the memory that it takes.

The recorded graph is run once more, call by call, on torch's fake tensors: they have no values, but
the layouts of the model's own device, and torch's own FLOP formulas count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.graph.channels import ChannelGraph, Step
from compress.graph.run import rng_kept
from compress.graph.walk import leaves_of
from compress.graph.watch import tensors_in
from compress.measure.summary import FlopCounter
from compress.rules.registry import Call, Rule


@dataclass(frozen=True)
class Work:
    """One call of the dense model.

    Attributes:
        call: the recorded call.
        rule: that of its function; opaque where the rule did not foresee this form of the call.
        tensors: what it takes, by node: fake tensors of the dense shapes and strides.
        flops: as ``torch.utils.flop_counter`` counts.
        makes: whether its output is new memory: no view, and not written in place.
        writes: whether it writes one of its arguments in place.
        runs: whether the call could be run by itself.
    """

    call: Call
    rule: Rule
    tensors: Mapping[fx.Node, Any]
    flops: int
    makes: bool
    writes: bool
    runs: bool

    @property
    def free(self) -> bool:
        """Whether it computes nothing: a view."""
        return not self.makes and not self.writes

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes of the tensors that it makes: itself, or its parts."""
        if not self.call.shape or isinstance(self.call.shape[0], int):
            return [self.call.node]
        return [n for n in self.call.node.users if n.meta["name"] == "getitem_output"]


def dense_work(graph: ChannelGraph) -> list[Work]:
    """The calls of the run in eval mode, in order, each run once more."""
    values: dict[fx.Node, Any] = {}
    steps = {step.call.node: step for step in graph.steps}
    found = []
    tensors = (tensor for _, tensor, _ in leaves_of(graph.model))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with torch.no_grad(), rng_kept(), FakeTensorMode():
        for node in graph.trace.nodes:
            if node.op != "call_function":
                values[node] = _leaf(node, device)
            elif node.meta["name"] == "getitem_output":
                values[node] = _part(node, values, device)
            else:
                values[node], work = _run(steps[node], values, device)
                if not node.meta["training"]:
                    found.append(work)
    return found


def _leaf(node: fx.Node, device: torch.device) -> torch.Tensor:
    """A parameter, a buffer or an input in its own layout."""
    shape, dtype = node.meta["shape"], node.meta["dtype"]
    if "tensor" in node.meta:
        device, strides = node.meta["tensor"].device, node.meta["tensor"].stride()
    else:
        strides = node.meta["strides"]
    if strides is None:
        return _blank(shape, dtype, device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _blank(shape: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or torch.float32, device=device)


def _part(node: fx.Node, values: Mapping[fx.Node, Any], device: torch.device) -> torch.Tensor:
    source, key = node.args
    assert isinstance(source, fx.Node) and isinstance(key, int)
    whole = values[source]
    items = list(whole.values()) if isinstance(whole, Mapping) else whole
    part = items[key] if isinstance(items, (tuple, list)) and key < len(items) else None
    if isinstance(part, torch.Tensor) and tuple(part.shape) == node.meta["shape"]:
        return part
    return _blank(node.meta["shape"], node.meta["dtype"], device)


def _run(step: Step, values: Mapping[fx.Node, Any], device: torch.device) -> tuple[Any, Work]:
    call, node = step.call, step.call.node
    counter = FlopCounter()
    tensors = {each: values[each] for each in call.inputs}
    before = {each: tensor._version for each, tensor in _plain(tensors)}
    args, kwargs = arguments(node, tensors.__getitem__, device)
    try:
        with counter:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        runs = True
    except Exception:  # it looks at its data, or stands for code that the run could not see
        result, runs = _unknown(node, device), False
    written = {each for each, tensor in _plain(tensors) if tensor._version != before[each]}
    if result is None and args:  # x[i] = y
        result = args[0]
    mine = [t.untyped_storage()._cdata for t in tensors_in(result)]
    theirs = {t.untyped_storage()._cdata for _, t in _plain(tensors)}
    makes = bool(mine) and not any(memory in theirs for memory in mine)
    return result, Work(call, step.rule, tensors, counter.flops, makes, bool(written), runs)


def _plain(tensors: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, torch.Tensor]]:
    return [(node, t) for node, t in tensors.items() if isinstance(t, torch.Tensor)]


def _unknown(node: fx.Node, device: torch.device) -> Any:
    shape = node.meta["shape"]
    if shape and not isinstance(shape[0], int):
        return [None if s is None else _blank(s, None, device) for s in shape]
    return _blank(shape, node.meta["dtype"], device)


def arguments(
    node: fx.Node, value_of: Callable[[fx.Node], Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a recorded call, with a value in the place of each node.

    What it was recorded to do on the meta device it does on ``device``.
    """

    def real(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value_of(value)
        on_meta = isinstance(value, torch.device) and value.type == "meta"
        return device if on_meta else value

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), real)
    return tuple(args), dict(kwargs)
