"""One recorded call by itself, at other sizes: with random tensors in the place of the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from compress.cost.calls import Work, arguments
from compress.graph.watch import tensors_in

Shapes = Mapping[fx.Node, tuple[int, ...]]


def description(work: Work, shapes: Shapes) -> str:
    """The function and its arguments, the same for calls that take the same time."""

    def described(node: fx.Node) -> str:
        return _described(work.tensors[node], shapes[node])

    args, kwargs = arguments(work.call.node, described, torch.device("meta"))
    named = [f"{name}={_text(value)}" for name, value in kwargs.items()]
    return f"{work.call.name}({', '.join([*map(_text, args), *named])})"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else repr(value)


def _described(like: torch.Tensor, shape: tuple[int, ...]) -> str:
    order = _order(like)
    layout = "" if order == sorted(order) else f" as {order}"
    return f"{str(like.dtype).removeprefix('torch.')}{list(shape)}{layout}"


def standalone(
    work: Work, shapes: Shapes, device: torch.device
) -> Callable[[], Callable[[], Any]] | None:
    """What makes the call on random tensors of these shapes; None where it does not run.

    It makes the tensors, and gives the call as a function. Numbers among the arguments that count
    positions (sizes of a view, the groups of a depthwise convolution, a norm's shape) become those
    of the shapes, if the call does not run without.
    """
    node = work.call.node

    def made(resize: Callable[[Any], Any], where: torch.device) -> Callable[[], Any]:
        tensors = {n: _tensor(like, shapes[n], where) for n, like in work.tensors.items()}
        args, kwargs = _resized(node, resize, tensors, where)
        return lambda: node.target(*args, **kwargs)  # type: ignore[operator]

    expected = [shapes[each] for each in work.outputs]
    for resize in (lambda value: value, _resizer(work, shapes)):
        try:  # on the meta device, where an attempt that fails costs nothing
            result = made(resize, torch.device("meta"))()
        except Exception:  # whatever a call says of sizes that do not fit
            continue
        found = [tuple(tensor.shape) for tensor in tensors_in(result)]
        if not found or found[: len(expected)] == expected:  # x[i] = y gives nothing
            return partial(made, resize, device)
    return None


def _resized(
    node: fx.Node,
    resize: Callable[[Any], Any],
    tensors: Mapping[fx.Node, torch.Tensor],
    device: torch.device,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments(node, tensors.__getitem__, device)
    sizes = args[1:]
    if sizes and all(type(value) is int for value in sizes):  # view(x, 2, 3)
        return (args[0], *resize(sizes)), kwargs
    return tuple(map(resize, args)), {name: resize(value) for name, value in kwargs.items()}


def _resizer(work: Work, shapes: Shapes) -> Callable[[Any], Any]:
    """What makes of the numbers among a call's arguments those for other shapes."""
    nodes = [*work.tensors, *work.outputs]
    wholes = [(node.meta["shape"], shapes[node]) for node in (*work.outputs, *work.tensors)]
    single: dict[int, set[int]] = {}
    for node in nodes:
        for before, after in zip(node.meta["shape"], shapes[node], strict=True):
            single.setdefault(before, set()).add(after)

    def resize(value: Any) -> Any:
        if type(value) is int:
            new = single.get(value, set()) - {value}
            return new.pop() if len(new) == 1 else value
        if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            return _resized_sizes(value, wholes) or type(value)(map(resize, value))
        return value

    return resize


def _resized_sizes(
    value: Sequence[int], wholes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[int, ...]:
    """Sizes that are the last ones of a tensor's shape, with -1 for any; () where there is none."""
    for before, after in wholes:
        last = before[len(before) - len(value) :] if len(value) <= len(before) else ()
        if last and all(v in (-1, b) for v, b in zip(value, last, strict=True)):
            kept = after[len(after) - len(value) :]
            return tuple(v if v == -1 else a for v, a in zip(value, kept, strict=True))
    return ()


def _order(like: torch.Tensor) -> list[int]:
    """The axes from the outermost to the innermost in memory."""
    return sorted(range(like.dim()), key=lambda axis: -like.stride()[axis])


def _tensor(like: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A tensor of this shape with the dtype and the layout of another: numbers in [0, 1)."""
    order = _order(like)
    back = [order.index(axis) for axis in range(len(order))]
    expanded = [stride == 0 and size > 1 for stride, size in zip(like.stride(), shape, strict=True)]
    stored = [1 if expanded[axis] else shape[axis] for axis in order]
    if like.dtype.is_floating_point or like.dtype.is_complex:
        tensor = torch.rand(stored, device=device).to(like.dtype)
    else:  # an index, or a mask that hides nothing
        tensor = torch.full(stored, int(like.dtype == torch.bool), dtype=like.dtype, device=device)
    return tensor.permute(back).expand(shape)
