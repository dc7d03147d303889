"""Convolutional networks drawn at random, for the oracle.

`draw_network` builds one step by step out of `OPERATIONS`: each picks values that exist, adds
layers that take them, and what it gives can be taken by later ones. Adding an operation is one
function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Choices, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

# -- the network ---------------------------------------------------------------------------


class Network(nn.Module):
    """Layers in the order in which they run, and the values that each of them takes.

    Value 0 is the input; a layer that returns several tensors makes several values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.order: list[tuple[int, tuple[int, ...]]] = []
        self.outputs: tuple[int, ...] = ()
        self.as_dict = False

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for layer, sources in self.order:
            result = self.layers[layer](*[values[s] for s in sources])
            values.extend(result if isinstance(result, (tuple, list)) else (result,))
        if self.as_dict:
            return {f"value_{i}": values[i] for i in self.outputs}
        if len(self.outputs) == 1:
            return values[self.outputs[0]]
        return tuple(values[i] for i in self.outputs)

    def extra_repr(self) -> str:
        return f"order={self.order}, outputs={self.outputs}"


class Apply(nn.Module):
    """A function without parameters; the numbers in it are literals of the code."""

    def __init__(self, text: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.text, self.function = text, function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)

    def extra_repr(self) -> str:
        return self.text


class Gate(nn.Module):
    """Squeeze and excite: a channel times what the picture's means say about it."""

    def __init__(self, channels: int, rank: int, squeeze: int, linear: bool) -> None:
        super().__init__()
        self.rank = rank
        make = nn.Linear if linear else {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        extra = () if linear else (1,)
        self.down, self.up = make(channels, squeeze, *extra), make(squeeze, channels, *extra)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(tuple(range(2, 2 + self.rank)), keepdim=not self.linear)
        gate = torch.sigmoid(self.up(F.relu(self.down(mean))))
        return x * (gate.reshape(gate.shape[0], -1, *[1] * self.rank) if self.linear else gate)


class OwnParameter(nn.Module):
    """A parameter that meets the input in one operation."""

    def __init__(self, shape: Sequence[int], text: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(tuple(shape)))
        self.text, self.function = text, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale)

    def extra_repr(self) -> str:
        return f"{self.text}, {tuple(self.scale.shape)}"


class OwnBuffer(nn.Module):
    """A buffer with an entry for each channel."""

    def __init__(self, shape: Sequence[int], multiply: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(tuple(shape)))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table if self.multiply else x + self.table

    def extra_repr(self) -> str:
        return f"{'*' if self.multiply else '+'} buffer {tuple(self.table.shape)}"


class OwnConvolution(nn.Module):
    """A functional convolution on parameters of its own, perhaps standardised first."""

    def __init__(self, ins: int, outs: int, rank: int, bias: bool, standardised: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outs, ins, *[3] * rank))
        self.shift = nn.Parameter(torch.randn(outs)) if bias else None
        self.rank, self.standardised = rank, standardised

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel
        if self.standardised:
            kernel = kernel - kernel.mean(tuple(range(1, kernel.dim())), keepdim=True)
        return getattr(F, f"conv{self.rank}d")(x, kernel, self.shift, padding=1)

    def extra_repr(self) -> str:
        return f"{tuple(self.kernel.shape)}, shift={self.shift is not None}, {self.standardised}"


class Attention(nn.Module):
    """Places attend to each other, in heads."""

    def __init__(self, channels: int, heads: int, width: int, by_hand: bool) -> None:
        super().__init__()
        self.heads, self.width, self.by_hand = heads, width, by_hand
        self.qkv = nn.Linear(channels, 3 * heads * width)
        self.out = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        n, length, _ = places.shape
        qkv = self.qkv(places).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.by_hand:
            mixed = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        flat = mixed.transpose(1, 2).reshape(n, length, -1)
        return self.out(flat).transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, width={self.width}, by_hand={self.by_hand}"


class GainedConvolution(nn.Module):
    """A kernel computed from parameters, norms of one's own with buffers, a gain read in Python."""

    def __init__(self, ins: int, outs: int, rank: int, kind: str) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outs, ins, *[1] * rank))
        self.gain = nn.Parameter(torch.rand(outs, *[1] * (rank + 1)))
        self.register_buffer("running_mean", torch.zeros(outs))
        self.register_buffer("running_var", torch.ones(outs))
        self.rank, self.kind = rank, kind

    def forward(self, x: Tensor) -> Tensor:
        convolve = getattr(F, f"conv{self.rank}d")
        if self.kind == "product":
            return convolve(x, self.kernel * self.gain)
        if self.kind == "norm":
            y = convolve(x, self.kernel)
            return F.batch_norm(y, self.running_mean, self.running_var, self.gain.flatten())
        if self.kind == "transposed":
            return (x.movedim(1, -1) @ self.kernel.flatten(1).t()).movedim(-1, 1)
        if self.kind == "einsum":
            return torch.einsum("nc...,oc->no...", x, self.kernel.flatten(1))
        if self.kind == "number":
            return convolve(x, self.kernel) * self.gain.mean().item()
        return convolve(x, self.kernel[: self.kernel.shape[0] // 2 + 1])

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.kernel.shape)}"


class ChannelLast(nn.Module):
    """A layer over the channels, moved to the end and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class AttributeView(nn.Module):
    """A view whose channel count is an attribute of the module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.channels, *x.shape[2:]).tanh()


@dataclass
class Builder:
    """A network under construction, with the values that its layers gave on the input."""

    choices: Choices
    network: Network
    values: list[Tensor]
    shared: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def chance(self, percent: int) -> bool:
        return self.choices.integer(0, 99) >= 100 - percent

    def value(self, fits: Callable[[Tensor], bool] = lambda t: t.dim() > 2) -> int | None:
        """A value of a kind, the newest more often; None if there is none."""
        found = [i for i, v in enumerate(self.values) if fits(v) and 0 < v.numel() < 4096]
        if not found:
            return None
        return found[-1] if not self.chance(40) else self.choices.pick(found)

    def add(self, layer: nn.Module, *sources: int) -> int | None:
        """Let ``layer`` take values; the (first) index of what it gives, None if it cannot."""
        layer.to(self.values[0].dtype).eval()
        self.network.layers.append(layer)
        return self._run(len(self.network.layers) - 1, sources)

    def again(self, layer: int, sources: tuple[int, ...]) -> int | None:
        return self._run(layer, sources)

    def _run(self, layer: int, sources: tuple[int, ...]) -> int | None:
        module = self.network.layers[layer]
        try:
            with torch.no_grad():
                result = module(*[self.values[s] for s in sources])
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            if not any(index == layer for index, _ in self.network.order):
                del self.network.layers[layer]
            return None
        several = result if isinstance(result, (tuple, list)) else (result,)
        if any(t.numel() == 0 for t in several):
            if not any(index == layer for index, _ in self.network.order):
                del self.network.layers[layer]
            return None
        self.network.order.append((layer, sources))
        self.shared.append((layer, sources))
        self.values.extend(several)
        return len(self.values) - len(several)

    def apply(self, text: str, function: Callable[..., Any], *sources: int) -> int | None:
        return self.add(Apply(text, function), *sources)

    def is_input(self, index: int) -> bool:
        """Whether the value lies in the input's memory, so that nothing may write on it."""
        mine, its = self.values[0].untyped_storage(), self.values[index].untyped_storage()
        return mine.data_ptr() == its.data_ptr()


Operation = Callable[[Builder], Any]
OPERATIONS: list[Operation] = []


def operation(weight: int = 1) -> Callable[[Operation], Operation]:
    """Register an operation; it is drawn ``weight`` times as often as others."""

    def register(function: Operation) -> Operation:
        OPERATIONS.extend([function] * weight)
        return function

    return register


def rank_of(value: Tensor) -> int:
    return value.dim() - 2


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


# -- layers --------------------------------------------------------------------------------

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def draw_groups(b: Builder, channels: int) -> tuple[int, int]:
    """(groups, outputs) of a convolution: dense, depthwise (with a multiplier) or in between."""
    kind = b.choices.pick(["dense", "dense", "depthwise", "groups"])
    if kind == "dense":
        return 1, b.choices.integer(1, 8)
    groups = channels if kind == "depthwise" else b.choices.pick(divisors(channels))
    return groups, groups * b.choices.integer(1, 3)


@operation(6)
def convolution(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    groups, outs = draw_groups(b, x.shape[1])
    kernel = b.choices.pick([1, 3, 2])
    mode = b.choices.pick(["zeros", "zeros", "circular", "reflect"])
    padding: Any = b.choices.pick([kernel // 2, 0, "same"])
    layer = CONVOLUTIONS[rank_of(x)](
        x.shape[1], outs, kernel,
        stride=1 if padding == "same" else b.choices.pick([1, 1, 2]),
        padding=padding, dilation=b.choices.pick([1, 1, 2]), groups=groups, bias=b.chance(60),
        padding_mode=mode,
    )  # fmt: skip
    return b.add(layer, source)


@operation(5)
def conv_norm_act(b: Builder) -> None:
    source = b.value()
    if source is None:
        return
    x = b.values[source]
    groups, outs = draw_groups(b, x.shape[1])
    kernel = b.choices.pick([1, 3])
    layer = CONVOLUTIONS[rank_of(x)](
        x.shape[1], outs, kernel, padding=kernel // 2, groups=groups, bias=b.chance(30)
    )
    added = b.add(layer, source)
    if added is not None:
        added = b.add(BATCH_NORMS[rank_of(x)](outs), added)
    if added is not None:
        b.add(nn.ReLU(inplace=b.chance(50)), added)


@operation(2)
def transposed(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    groups, outs = draw_groups(b, x.shape[1])
    stride = b.choices.pick([1, 2])
    layer = TRANSPOSED[rank_of(x)](
        x.shape[1], outs, b.choices.pick([2, 3, 1]), stride=stride, groups=groups,
        padding=b.choices.pick([0, 1]), output_padding=stride - 1, bias=b.chance(60),
    )  # fmt: skip
    return b.add(layer, source)


@operation(2)
def own_convolution(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    outs = b.choices.integer(1, 6)
    return b.add(OwnConvolution(x.shape[1], outs, rank_of(x), b.chance(50), b.chance(30)), source)


@operation()
def parametrised_convolution(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    layer = CONVOLUTIONS[rank_of(x)](x.shape[1], b.choices.integer(1, 6), 3, padding=1)
    return b.add(parametrizations.weight_norm(layer), source)


@operation()
def tied_convolution(b: Builder) -> int | None:
    """Two convolutions with one weight, one after the other or on any two values."""
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    outs = b.choices.pick([x.shape[1], 4])
    make = CONVOLUTIONS[rank_of(x)]
    one, two = (make(x.shape[1], outs, 3, padding=1) for _ in range(2))
    two.weight = one.weight
    first = b.add(one, source)
    fitting = b.value(lambda t: t.dim() == x.dim() and t.shape[1] == x.shape[1])
    second = first if outs == x.shape[1] and b.chance(50) else fitting
    return None if first is None or second is None else b.add(two, second)


@operation(4)
def batch_norm(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    layer = BATCH_NORMS[rank_of(x)](
        x.shape[1], affine=b.chance(80), track_running_stats=b.chance(85)
    )
    return b.add(layer, source)


@operation(2)
def other_norm(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    channels = x.shape[1]
    kind = b.choices.pick(["group", "group", "instance", "layer", "whole layer", "response"])
    if kind == "group":
        groups = b.choices.pick(divisors(channels))
        layer: nn.Module = nn.GroupNorm(groups, channels, affine=b.chance(70))
    elif kind == "instance":
        layer = INSTANCE_NORMS[rank_of(x)](
            channels, affine=b.chance(60), track_running_stats=b.chance(50)
        )
    elif kind == "layer":
        layer = ChannelLast(nn.LayerNorm(channels, elementwise_affine=b.chance(70)))
    elif kind == "whole layer":
        layer = nn.LayerNorm(x.shape[1:])
    else:
        layer = nn.LocalResponseNorm(b.choices.pick([2, 3]))
    return b.add(layer, source)


@operation(2)
def linear_head(b: Builder) -> None:
    source = b.value()
    if source is None:
        return
    kind = b.choices.pick(["flatten", "mean", "max", "channels last", "reshape", "unflatten"])
    outs = b.choices.integer(1, 6)
    x = b.values[source]
    if kind == "channels last":
        b.add(ChannelLast(nn.Linear(x.shape[1], outs, bias=b.chance(60))), source)
        return
    flat = {
        "flatten": lambda t: torch.flatten(t, 1),
        "mean": lambda t: t.flatten(2).mean(-1),
        "max": lambda t: t.amax(tuple(range(2, t.dim()))),
        "reshape": lambda t: t.reshape(t.shape[0], -1),
        "unflatten": lambda t: t.flatten(1).unflatten(1, (x.shape[1], -1)).flatten(1),
    }[kind]
    head = b.apply(kind, flat, source)
    if head is not None:
        b.add(nn.Linear(b.values[head].shape[1], outs, bias=b.chance(60)), head)


@operation()
def flat_layer(b: Builder) -> None:
    source = b.value(lambda t: t.dim() == 2)
    if source is None:
        return
    width = b.values[source].shape[1]
    kind = b.choices.pick(["linear", "norm", "act", "layer_norm", "view"])
    if kind == "linear":
        b.add(nn.Linear(width, b.choices.integer(1, 8), bias=b.chance(60)), source)
    elif kind == "norm":
        b.add(nn.BatchNorm1d(width), source)
    elif kind == "layer_norm":
        b.add(nn.LayerNorm(width), source)
    elif kind == "act":
        b.add(nn.ReLU(), source)
    else:
        side = b.choices.pick(divisors(width))
        b.apply(f"unflatten {side}", lambda t: t.reshape(t.shape[0], side, -1), source)


@operation(2)
def gate(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    return b.add(Gate(x.shape[1], rank_of(x), b.choices.integer(1, 4), b.chance(50)), source)


@operation(2)
def own_parameter(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    channels, ones = x.shape[1], [1] * rank_of(x)
    shape = b.choices.pick(
        [[channels, *ones], [1, channels, *ones], list(x.shape[1:]), [1], [1, 1, *x.shape[2:]], []]
    )
    text, function = b.choices.pick(
        [
            ("*", lambda t, p: t * p),
            ("+", lambda t, p: t + p),
            ("p - t", lambda t, p: p - t),
            ("t / (1 + p²)", lambda t, p: t / (1 + p * p)),
            ("cat", lambda t, p: torch.cat([t, p.expand_as(t)], 1)),
            ("lerp", lambda t, p: torch.lerp(t, p.expand_as(t), 0.3)),
            ("addcmul", lambda t, p: torch.addcmul(t, t, p)),
        ]
    )
    return b.add(OwnParameter(shape, text, function), source)


@operation()
def attention(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    channels, heads = b.values[source].shape[1], b.choices.integer(1, 3)
    return b.add(Attention(channels, heads, b.choices.integer(1, 3), b.chance(50)), source)


@operation(2)
def gained_convolution(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    kind = b.choices.pick(["product", "norm", "transposed", "einsum", "number", "half"])
    return b.add(GainedConvolution(x.shape[1], b.choices.integer(1, 6), rank_of(x), kind), source)


@operation()
def new_tensors(b: Builder) -> int | None:
    """Tensors made in the forward, with sizes that are read or written down."""
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    channels, ones = x.shape[1], [1] * rank_of(x)
    text, function = b.choices.pick(
        [
            ("new_zeros", lambda t: t + t.new_zeros(t.shape)),
            ("ones of C", lambda t: t * torch.full((t.shape[1], *ones), 0.5, dtype=t.dtype)),
            ("literal C", lambda t: t * torch.full((channels, *ones), 0.5, dtype=t.dtype)),
            ("arange C", lambda t: t * torch.arange(t.shape[1], dtype=t.dtype).view(-1, *ones)),
            ("pad to", lambda t: torch.cat([t, t.new_zeros(len(t), 2, *t.shape[2:])], 1)),
            ("shortcut", lambda t: F.pad(t, [0, 0] * len(ones) + [0, t.shape[1]])),
            ("mean of C", lambda t: t.sum(1, keepdim=True) / t.shape[1] + t),
            ("sqrt C", lambda t: t * t.size(1) ** -0.5),
            ("if C", lambda t: t * 2 if t.shape[1] > 2 else t),
            ("range C", lambda t: torch.stack([t[:, i] for i in range(t.shape[1])], 1)),
            ("range groups", lambda t: torch.cat([t[:, i : i + 1] for i in range(t.shape[1])], 1)),
            ("len", lambda t: torch.stack([each * 2 for each in t])),
        ]
    )
    return b.apply(text, function, source)


@operation()
def own_buffer(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    shape = b.choices.pick([[x.shape[1], *[1] * rank_of(x)], list(x.shape[1:]), [1]])
    return b.add(OwnBuffer(shape, b.chance(50)), source)


@operation(2)
def shared_layer(b: Builder) -> int | None:
    """A layer that has run before, once more on other values of the same shapes."""
    if not b.shared:
        return None
    layer, sources = b.choices.pick(b.shared)
    if isinstance(b.network.layers[layer], Apply):
        return None
    shape = b.values[sources[0]].shape
    source = b.value(lambda t: t.dim() == len(shape) and t.shape[1] == shape[1])
    if source is None or len(sources) > 1 or _writes(b.network.layers[layer], b, source):
        return None
    return b.again(layer, (source,))


def _writes(layer: nn.Module, b: Builder, source: int) -> bool:
    return bool(getattr(layer, "inplace", False)) and b.is_input(source)


# -- functions -----------------------------------------------------------------------------

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.Sigmoid, nn.Softplus, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ReLU6, nn.SiLU,
    nn.ELU, nn.Tanh, nn.Mish, nn.Hardsigmoid, nn.PReLU, nn.Softsign, nn.LogSigmoid, nn.CELU,
    nn.SELU, nn.Tanhshrink, nn.Softshrink, nn.Hardtanh,
]  # fmt: skip


@operation(4)
def activation(b: Builder) -> int | None:
    source = b.value(lambda t: t.dim() > 1)
    if source is None:
        return None
    make = b.choices.pick(ACTIVATIONS)
    if make is nn.PReLU:
        return b.add(nn.PReLU(b.choices.pick([1, b.values[source].shape[1]])), source)
    return b.add(make(), source)


@operation(2)
def in_place(b: Builder) -> int | None:
    source = b.value(lambda t: t.dim() > 1)
    if source is None or b.is_input(source):
        return None
    text, function = b.choices.pick(
        [
            ("relu_", lambda t: t.relu_()),
            ("mul_ 0.5", lambda t: t.mul_(0.5)),
            ("add_ 1", lambda t: t.add_(1.0)),
            ("sigmoid_", lambda t: torch.sigmoid_(t)),
            ("first channel = 0", _zero_first),
            ("chunk.relu_", lambda t: (t.chunk(2, 1)[0].relu_(), t)[1]),
            ("view.mul_", lambda t: (t.view(-1).mul_(0.3), t)[1]),
            ("clamp_", lambda t: t.clamp_(-0.5, 0.7)),
        ]
    )
    return b.apply(text, function, source)


def _zero_first(t: Tensor) -> Tensor:
    t[:, 0] = 0.0
    return t


@operation(2)
def arithmetic(b: Builder) -> int | None:
    source = b.value(lambda t: t.dim() > 1)
    if source is None:
        return None
    text, function = b.choices.pick(
        [
            ("* 2", lambda t: t * 2.0),
            ("+ 1", lambda t: t + 1.0),
            ("1 -", lambda t: 1.0 - t),
            ("-", lambda t: -t),
            ("² / 4", lambda t: t**2 / 4),
            ("abs", lambda t: t.abs()),
            ("1 / (1 + exp)", lambda t: 1.0 / (1.0 + torch.exp(-t.clamp(-3, 3)))),
            ("cos", lambda t: torch.cos(t)),
            ("zeros_like", lambda t: t + torch.zeros_like(t)),
            ("ones_like", lambda t: t - torch.ones_like(t)),
            ("where", lambda t: torch.where(t > 0, t, 0.1 * t)),
            ("where other", lambda t: torch.where(t > 0, 0.5, t)),
            ("masked_fill", lambda t: t.masked_fill(t > 0.3, 0.2)),
            ("threshold", lambda t: F.threshold(t, 0.1, -1.0)),
            ("glu", lambda t: F.glu(t, 1)),
            ("softmax", lambda t: t.softmax(1)),
            ("normalize", lambda t: F.normalize(t, dim=1)),
            ("mean 1", lambda t: t - t.mean(1, keepdim=True)),
            ("numel", lambda t: t / t[0].numel()),
            ("channels", lambda t: t / t.shape[1]),
            ("dropout", lambda t: F.dropout(t, 0.5, training=False)),
            ("clone", lambda t: t.clone()),
            ("float", lambda t: t.to(t.dtype).contiguous()),
            ("cumsum", lambda t: t.cumsum(1)),
            ("pow -", lambda t: torch.pow(2.0, t.clamp(-2, 2))),
        ]
    )
    return b.apply(text, function, source)


@operation()
def dropout(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    by_rank = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}[rank_of(b.values[source])]
    return b.add(b.choices.pick([nn.Dropout, by_rank, nn.AlphaDropout])(0.3), source)


def _same_shape(b: Builder, source: int) -> int | None:
    """Another value of the shape, after a convolution where none has it."""
    x = b.values[source]
    found = [i for i, v in enumerate(b.values) if i != source and v.shape == x.shape]
    if found and b.chance(60):
        return b.choices.pick(found)
    other = b.value(lambda t: t.dim() == x.dim() and t.shape[2:] == x.shape[2:])
    if other is None:
        return None
    layer = CONVOLUTIONS[rank_of(x)](b.values[other].shape[1], x.shape[1], 1, bias=b.chance(60))
    return b.add(layer, other)


@operation(5)
def combine(b: Builder) -> int | None:
    source = b.value()
    other = None if source is None else _same_shape(b, source)
    if source is None or other is None:
        return None
    text, function = b.choices.pick(
        [
            ("+", lambda a, c: a + c),
            ("+", lambda a, c: a + c),
            ("*", lambda a, c: a * c),
            ("-", lambda a, c: a - c),
            ("add alpha", lambda a, c: torch.add(a, c, alpha=0.5)),
            ("maximum", torch.maximum),
            ("a / (1 + c²)", lambda a, c: a / (1 + c * c)),
            ("stack sum", lambda a, c: torch.stack([a, c]).sum(0)),
            ("stack mean", lambda a, c: torch.stack([a, c], 1).mean(1)),
            ("where", lambda a, c: torch.where(c > 0, a, c)),
            ("a * sigmoid", lambda a, c: a * torch.sigmoid(c)),
        ]
    )
    return b.apply(text, function, source, other)


@operation()
def combine_in_place(b: Builder) -> int | None:
    source = b.value()
    other = None if source is None else _same_shape(b, source)
    if source is None or other is None or b.is_input(source):
        return None
    text, function = b.choices.pick(
        [
            ("+=", lambda a, c: a.add_(c)),
            ("*=", lambda a, c: a.mul_(c)),
            ("copy_", lambda a, c: a.copy_(c)),
            ("[:, :1] =", _set_first),
        ]
    )
    return b.apply(text, function, source, other)


def _set_first(a: Tensor, c: Tensor) -> Tensor:
    a[:, :1] = c[:, :1]
    return a


@operation(4)
def join(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    sizes = x.shape[2:]
    fitting = [i for i, v in enumerate(b.values) if v.dim() == x.dim() and v.shape[2:] == sizes]
    others = [b.choices.pick(fitting) for _ in range(b.choices.integer(1, 2))]
    if b.chance(80):
        return b.apply("cat", lambda *t: torch.cat(t, 1), source, *others)
    alike = [i for i in others if b.values[i].shape == x.shape]
    return b.apply("cat 2", lambda *t: torch.cat(t, 2), source, *alike)


@operation(3)
def cut(b: Builder) -> int | None:
    source = b.value(lambda t: t.dim() > 1 and t.shape[1] > 1)
    if source is None:
        return None
    channels = b.values[source].shape[1]
    at, parts = b.choices.integer(1, channels - 1), b.choices.pick([2, 3])
    text, function = b.choices.pick(
        [
            (f"chunk {parts}", lambda t: t.chunk(parts, 1)),
            (f"split {at}", lambda t: t.split(at, 1)),
            (f"split [{at}, …]", lambda t: t.split([at, t.shape[1] - at], 1)),
            ("split half", lambda t: torch.split(t, t.shape[1] // 2, 1)),
            (f"[:, :{at}]", lambda t: t[:, :at]),
            (f"[:, {at}:]", lambda t: t[:, at:]),
            ("[:, : C // 2]", lambda t: t[:, : t.shape[1] // 2]),
            ("[:, ::2]", lambda t: t[:, ::2]),
            (f"[:, -{at}:]", lambda t: t[:, -at:]),
            (f"[:, {at}]", lambda t: t[:, at].unsqueeze(1)),
            (f"narrow {at}", lambda t: t.narrow(1, 0, at)),
            ("flip", lambda t: t.flip(1)),
            ("roll", lambda t: t.roll(1, 1)),
            ("reversed", lambda t: t[:, list(range(t.shape[1] - 1, -1, -1))]),
            (f"tensor_split {parts}", lambda t: t.tensor_split(parts, 1)),
            ("unbind", lambda t: torch.stack(t.unbind(1)[::-1], 1)),
            ("index_select", lambda t: t.index_select(1, torch.tensor([0, at, 0]))),
            ("x[0:1]", lambda t: t[..., :1] + t),
            ("repeat", lambda t: t.repeat(1, 2, *[1] * (t.dim() - 2))),
            ("repeat_interleave", lambda t: t.repeat_interleave(2, 1)),
        ]
    )
    return b.apply(text, function, source)


@operation(2)
def shuffle(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    groups = b.choices.pick(divisors(b.values[source].shape[1]))

    def by_view(t: Tensor) -> Tensor:
        n, c = t.shape[:2]
        return t.view(n, groups, c // groups, *t.shape[2:]).transpose(1, 2).reshape(t.shape)

    text, function = b.choices.pick(
        [
            (f"shuffle by view {groups}", by_view),
            (f"channel_shuffle {groups}", lambda t: F.channel_shuffle(t, groups)),
            ("pixel_shuffle", lambda t: F.pixel_shuffle(t, 2)),
            ("pixel_unshuffle", lambda t: F.pixel_unshuffle(t, 2)),
            ("group mean", lambda t: t.unflatten(1, (groups, -1)).mean(2)),
            ("group norm by hand", lambda t: _standardise(t, groups)),
            ("group first", lambda t: t.unflatten(1, (groups, -1))[:, :, 0]),
            ("group flip", lambda t: t.unflatten(1, (groups, -1)).flip(1).flatten(1, 2)),
            ("group scale", lambda t: (t.unflatten(1, (groups, -1)) * 2).flatten(1, 2)),
        ]
    )
    return b.apply(text, function, source)


def _standardise(t: Tensor, groups: int) -> Tensor:
    parts = t.reshape(t.shape[0], groups, -1)
    mean = parts.mean(2, keepdim=True)
    return ((parts - mean) / (1 + parts.var(2, keepdim=True, unbiased=False))).reshape(t.shape)


@operation(3)
def pool(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    rank = rank_of(b.values[source])
    name = b.choices.pick(
        ["max", "avg", "adaptive_avg", "adaptive_max", "lp", "pad_avg", "mean", "ceil"]
    )
    function: Callable[..., Any]
    if name in ("max", "avg"):
        pooling = getattr(F, f"{name}_pool{rank}d")
        stride = b.choices.pick([1, 2])
        function = lambda t: pooling(t, 2, stride)  # noqa: E731
    elif name == "lp":
        function = lambda t: getattr(F, f"lp_pool{rank}d")(t.abs() + 0.1, 2.0, 2)  # noqa: E731
    elif name in ("pad_avg", "ceil"):
        pooling = getattr(F, f"avg_pool{rank}d")
        include = b.chance(50)
        function = lambda t: pooling(t, 3, 2, 1, name == "ceil", include)  # noqa: E731
    elif name == "mean":
        function = lambda t: t.mean(-1, keepdim=True) + t  # noqa: E731
    else:
        size = b.choices.pick([1, 2])
        function = lambda t: getattr(F, f"{name}_pool{rank}d")(t, size)  # noqa: E731
    return b.apply(f"{name} pool", function, source)


@operation()
def resize(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank_of(b.values[source])]
    text, function = b.choices.pick(
        [
            ("nearest", lambda t: F.interpolate(t, scale_factor=2)),
            (mode, lambda t: F.interpolate(t, scale_factor=1.5, mode=mode)),
            ("to shape", lambda t: F.interpolate(t, size=t.shape[2:], mode=mode) * 0.5),
            ("pad", lambda t: F.pad(t, (1, 1))),
            ("pad 0.5", lambda t: F.pad(t, (1, 0), value=0.5)),
            ("replicate", lambda t: F.pad(t, (1, 1) * (t.dim() - 2), mode="replicate")),
            ("pad channels", lambda t: F.pad(t, (0, 0) * (t.dim() - 2) + (1, 1))),
            ("crop", lambda t: t[..., 1:] if t.shape[-1] > 1 else t * 1),
            ("transpose", lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)),
        ]
    )
    return b.apply(text, function, source)


@operation(2)
def tabled(b: Builder) -> int | None:
    """Functions that are rarer, each with a rule of its own."""
    source = b.value()
    if source is None:
        return None
    x = b.values[source]
    ones = [1] * rank_of(x)
    text, function = b.choices.pick(
        [
            ("glu", lambda t: F.glu(torch.cat([t, t * -2], 1), 1)),
            ("where", lambda t: torch.where(t > 0, t, t * 0.1)),
            ("masked_fill", lambda t: t.masked_fill(t < 0.1, 0.5)),
            ("mask", lambda t: t * (t > 0.1).to(t.dtype)),
            ("repeat_interleave", lambda t: t.repeat_interleave(2, 1)),
            ("repeat", lambda t: t.repeat(1, 2, *ones)),
            ("stack channels", lambda t: torch.stack([t, t * 2], 2).flatten(1, 2)),
            ("maxout", lambda t: torch.stack([t, -t], 0).amax(0)),
            ("sum of channels", lambda t: t * t.sum(1, keepdim=True) * 0.1),
            ("normalize", lambda t: F.normalize(t, dim=1)),
            ("cosine", lambda t: t * F.cosine_similarity(t, t * t, 1).unsqueeze(1)),
            ("cumsum", lambda t: t.cumsum(-1)),
            ("softmax", lambda t: t.softmax(-1)),
            ("std of places", lambda t: t.std(-1, keepdim=True) * t),
            ("sort places", lambda t: t.sort(-1)[0]),
            ("roll places", lambda t: t.roll(1, -1)),
            ("index places", lambda t: t[..., torch.tensor([0, 2])]),
            ("gather", lambda t: t.gather(-1, t.argsort(-1))),
            ("diff", lambda t: t.diff(dim=-1)),
            ("rfft", lambda t: torch.fft.rfft(t).abs()),
            ("complex", lambda t: (torch.complex(t, t * 2) * torch.polar(t.abs(), t)).imag),
            ("zeros", lambda t: t + torch.zeros(t.shape[1], *ones, dtype=t.dtype)),
            ("ones", lambda t: t * t.new_ones(t.shape[1], *ones)),
            ("pad channels", lambda t: F.pad(t, [0, 0] * len(ones) + [1, 2], value=0.5)),
            ("flat gram", lambda t: torch.einsum("n...i,n...i->n...", t, t).unsqueeze(-1)),
            ("bmm", lambda t: (t.flatten(2).mT @ t.flatten(2)).unsqueeze(1)),
        ]
    )  # fmt: skip
    return b.apply(text, function, source)


class RecurrentOverPlaces(nn.Module):
    """A recurrent network along the places: (N, C, …) to (N, features, places)."""

    def __init__(self, kind: type[nn.RNNBase], channels: int, *sizes: int, both: bool) -> None:
        super().__init__()
        self.network = kind(channels, *sizes, bidirectional=both, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)


@operation(2)
def recurrent(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    kind = b.choices.pick([nn.LSTM, nn.GRU, nn.RNN])
    sizes = b.values[source].shape[1], b.choices.integer(1, 4), b.choices.integer(1, 2)
    return b.add(RecurrentOverPlaces(kind, *sizes, both=b.chance(40)), source)


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` over the places, to themselves or to every second one."""

    def __init__(self, heads: int, width: int, channels: int, cross: bool, weights: bool) -> None:
        super().__init__()
        self.first = nn.Linear(channels, heads * width)
        self.attention = nn.MultiheadAttention(heads * width, heads, batch_first=True)
        self.cross, self.weights = cross, weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(2).transpose(1, 2))
        keys = y[:, ::2] if self.cross else y
        return (y + self.attention(y, keys, keys, need_weights=self.weights)[0]).transpose(1, 2)


@operation(2)
def torch_attention(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    sizes = b.choices.integer(1, 3), b.choices.integer(1, 3), b.values[source].shape[1]
    return b.add(TorchAttention(*sizes, b.chance(50), b.chance(50)), source)


@operation()
def opaque(b: Builder) -> int | None:
    source = b.value()
    if source is None:
        return None
    text, function = b.choices.pick(
        [
            ("fft", lambda t: torch.fft.fft(t, dim=1).real),
            ("bessel", lambda t: torch.special.bessel_j0(t)),
            ("sort", lambda t: t.sort(1)[0]),
            ("max of two", lambda t: t.max(dim=1, keepdim=True)[0] + t),
            ("std", lambda t: t / (1 + t.std(1, keepdim=True, unbiased=False))),
            ("gram", lambda t: t.flatten(2) @ t.flatten(2).transpose(1, 2)),
            ("einsum", lambda t: torch.einsum("nc...,nc...->n...", t, t).unsqueeze(1)),
            ("unfold", lambda t: t.unfold(1, 1, 1).squeeze(-1)),
            ("branch", lambda t: t * 2 if t.sum().item() > 0 else t),
            ("view attribute", None),
            ("literal view", None),
        ]
    )
    channels = b.values[source].shape[1]
    if text == "view attribute":
        return b.add(AttributeView(channels), source)
    if text == "literal view":
        return b.apply(text, lambda t: t.reshape(-1, channels, *t.shape[2:]), source)
    return b.apply(text, function, source)


# -- drawing whole networks ----------------------------------------------------------------


def draw_network(
    choices: Choices, steps: int, dtype: torch.dtype = torch.float64
) -> tuple[Network, Tensor]:
    """A network of about ``steps`` operations, and an input of batch size 2 for it."""
    rank = choices.pick([2, 2, 2, 1, 3])
    torch.manual_seed(choices.integer(0, 10**6))
    sizes = [choices.integer(5, 6) if rank < 3 else 4 for _ in range(rank)]
    x = torch.randn(2, choices.integer(1, 4), *sizes, dtype=dtype)
    network = Network().to(dtype).eval()
    builder = Builder(choices, network, [x])
    # A few kinds of operation each: a pin in every network would hide what the others do.
    some = [choices.pick(OPERATIONS) for _ in range(choices.integer(2, 8))]
    if choices.integer(0, 3):
        convolution(builder)
    for _ in range(steps):
        choices.pick([*some, convolution, conv_norm_act])(builder)
    randomise(network)
    draw_outputs(builder)
    return network, x


def draw_outputs(b: Builder) -> None:
    """Mostly a head on the last value; sometimes several values, or a dict of them."""
    if len(b.values) == 1 or (b.chance(70) and b.values[-1].dim() > 2):
        x = b.values[-1]
        flat = x.dim() < 3
        b.add(
            nn.Linear(x.shape[1], 2) if flat else CONVOLUTIONS[rank_of(x)](x.shape[1], 2, 1),
            len(b.values) - 1,
        )
    last = len(b.values) - 1
    more = [b.choices.integer(1, last)] if b.chance(15) and last else []
    b.network.outputs = tuple(dict.fromkeys([last, *more]))
    b.network.as_dict = b.chance(10)
