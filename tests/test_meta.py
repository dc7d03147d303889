"""What `compress.graph.meta` answers on the meta device is what torch would have answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.graph.meta import quick_result
from compress.graph.watch import function_name

Build = Callable[..., Tensor]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


class Held(TorchFunctionMode):
    """Hold the quick answers to a run's calls against torch's; note which calls had one."""

    def __init__(self) -> None:
        super().__init__()
        self.quick: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        result = quick_result(name, func, args, kwargs)
        expected = func(*args, **kwargs)
        if result is not None:
            self.quick.append(name)
            assert (result is args[0]) == (expected is args[0])
            assert result.shape == expected.shape
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
        return expected


x = new(2, 6, 9, 9)
bias6 = new(6)
qkv = new(2, 4, 7, 8)

ANSWERED: dict[str, Callable[[], Any]] = {
    "linear": lambda: F.linear(new(3, 5, 8), new(4, 8), new(4)),
    "linear of a vector": lambda: F.linear(new(8), new(4, 8)),
    "conv1d": lambda: F.conv1d(new(2, 6, 9), new(4, 6, 3), None, 2, 1, 2),
    "conv2d": lambda: torch.nn.Conv2d(6, 4, 3, 2, 1, device="meta")(x),
    "conv2d, uneven": lambda: F.conv2d(x, new(4, 6, 3, 2), new(4), (2, 1), (0, 2), (1, 2)),
    "conv2d, groups": lambda: F.conv2d(x, new(12, 2, 3, 3), None, 1, 1, 1, 3),
    "conv2d by keyword": lambda: F.conv2d(x, new(4, 6, 3, 3), padding=1),
    "conv3d": lambda: F.conv3d(new(1, 2, 5, 6, 7), new(3, 2, 2, 2, 2), new(3), (1, 2, 2)),
    "batch_norm": lambda: torch.nn.BatchNorm2d(6, device="meta").eval()(x),
    "batch_norm, channels last": lambda: torch.nn.BatchNorm2d(6, device="meta").eval()(last(x)),
    "layer_norm": lambda: F.layer_norm(new(2, 5, 8), (8,), new(8), new(8)),
    "group_norm": lambda: F.group_norm(x, 3, bias6, bias6),
    "relu": lambda: F.relu(x),
    "relu in place": lambda: F.relu(new(3), inplace=True),
    "hardtanh": lambda: F.hardtanh(x, 0.0, 6.0),
    "gelu": lambda: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda: x.sigmoid(),
    "softmax": lambda: F.softmax(x, dim=-1),
    "softmax as a method": lambda: x.softmax(1),
    "add": lambda: x + x,
    "broadcast": lambda: x * new(2, 6, 1, 1),
    "broadcast to more axes": lambda: bias6.reshape(6, 1, 1) + x,
    "with a number": lambda: x * 2,
    "a number first": lambda: 1 - x,
    "divided": lambda: x / new(9),
    "matmul": lambda: qkv @ qkv.transpose(-2, -1),
    "attention": lambda: F.scaled_dot_product_attention(qkv, qkv, qkv),
    "attention with a mask": lambda: F.scaled_dot_product_attention(
        qkv, qkv, qkv, attn_mask=new(2, 1, 7, 7), dropout_p=0.0, scale=0.5
    ),
    "adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d, one axis": lambda: F.adaptive_avg_pool2d(x, (3, None)),
    "interpolate": lambda: F.interpolate(x, size=(5, 4), mode="bilinear", align_corners=False),
    "mean": lambda: x.mean((2, 3), keepdim=True),
    "mean over one": lambda: x.mean(-1),
    "sum": lambda: x.sum((0, -1)),
    "linear of transposed features": lambda: F.linear(new(3, 8, 5).mT, new(4, 8), new(4)),
    "a power": lambda: x**2,
    "a root": lambda: x.pow(0.5),
    "dropout": lambda: F.dropout(x, 0.1),
    "embedding": lambda: F.embedding(new(2, 5, dtype=torch.int64), new(9, 4), padding_idx=1),
    "weight_norm": lambda: torch._weight_norm(new(4, 3, 5), new(1, 1, 5), 2),
    "cat": lambda: torch.cat([x, new(2, 1, 9, 9)], 1),
    "cat, with strides": lambda: torch.cat((new(1, 1, 4).expand(2, 1, 4), new(2, 4, 3).mT), dim=1),
}

LEFT: dict[str, Callable[[], Any]] = {
    "other layout": lambda: F.conv2d(last(x), new(4, 6, 3, 3)),
    "padding by name": lambda: F.conv2d(x, new(4, 6, 3, 3), None, 1, "same"),
    "in place": lambda: new(3).add_(1),
    "integers": lambda: new(3, dtype=torch.int64) / 2,
    "whole numbers times a fraction": lambda: new(3, dtype=torch.int64) * 0.5,
    "softmax to another dtype": lambda: F.softmax(new(3).half(), dim=0, dtype=torch.float32),
    "softmax to another dtype by place": lambda: new(3).half().softmax(0, torch.float32),
    "promoted": lambda: new(3).half() + new(3),
    "rounded": lambda: torch.div(new(3), new(3), rounding_mode="floor"),
    "complex": lambda: new(3, dtype=torch.complex64).abs(),
    "mean of all": lambda: x.mean(),
    "transposed": lambda: x.transpose(1, 2).mean(1),
    "mean of a number": lambda: new().mean(-1),
    "sum of truths": lambda: new(3, 2, dtype=torch.bool).sum(1),
    "dropout in eval mode": lambda: F.dropout(x, 0.1, training=False),
    "dropout of nothing": lambda: F.dropout(x, 0.0),
    "dropout in place": lambda: F.dropout(new(3), 0.1, inplace=True),
    "embedding, renormalised": lambda: F.embedding(
        new(2, dtype=torch.int64), new(9, 4), max_norm=1.0
    ),
    "a power of each": lambda: x ** new(9),
    "cat of another layout": lambda: torch.cat([last(x), last(x)], 1),
    "cat with an empty one": lambda: torch.cat([new(0), new(2, 3)], 1),
    "cat, promoted": lambda: torch.cat([new(3).half(), new(3)]),
}


@pytest.mark.parametrize("build", ANSWERED.values(), ids=ANSWERED.keys())
def test_quick_answers_are_torchs(build: Build) -> None:
    with Held() as held:
        build()
    assert held.quick


@pytest.mark.parametrize("build", LEFT.values(), ids=LEFT.keys())
def test_the_unusual_is_left_to_torch(build: Build) -> None:
    with Held() as held:
        build()
    assert not held.quick


@pytest.mark.parametrize(
    "build",
    [
        lambda: F.linear(new(2, 5), new(4, 8)),
        lambda: F.conv2d(x, new(4, 5, 3, 3), None, 1, 0, 1, 1),
        lambda: F.conv2d(x, new(4, 6, 30, 30), None, 1, 0, 1, 1),
        lambda: F.batch_norm(x, new(5), new(5), training=False),
        lambda: F.layer_norm(x, (8,)),
        lambda: x + new(5),
        lambda: qkv @ qkv,
        lambda: torch.cat([new(2, 3), new(3, 3)], 1),
        lambda: F.linear(new(3, 8, 5).mT, new(4, 7)),
        lambda: x.sum(4),
    ],
)
def test_what_does_not_fit_raises_torchs_error(build: Build) -> None:
    with pytest.raises((RuntimeError, IndexError)), Held():
        build()
