"""Layers that take the place of torch's where only a new one can compute the same function."""

from __future__ import annotations

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function


def layer_norm(
    input: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    count: int,
) -> torch.Tensor:
    """``F.layer_norm`` over ``count`` features, of which only the first are given: the rest are 0.

    ``input`` is (…, n) and ``normalized_shape`` is (n,), with n <= count. Half precision is
    computed in float32, as torch does. Other function modes see one call, ``layer_norm``.
    """
    if has_torch_function((input,)):
        arguments = (input, normalized_shape, weight, bias, eps, count)
        return handle_torch_function(layer_norm, (input,), *arguments)
    half = input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if half else input
    mean = x.sum(-1, keepdim=True) / count
    centered = x - mean
    # Each of the missing zeros is mean away from the mean.
    squares = centered.square().sum(-1, keepdim=True)
    variance = (squares + (count - normalized_shape[0]) * mean.square()) / count
    result = centered * torch.rsqrt(variance + eps)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result.to(input.dtype)


class CountedLayerNorm(nn.LayerNorm):
    """A LayerNorm that lost features which were always 0, and still counts them.

    mean = Σx / N and var = (Σ(x - mean)² + (N - n) mean²) / N over the n features that are left,
    with the ``count`` N of before: what a LayerNorm over all N gives at these n.
    ``channels_first``: the features lie along axis 1, (batch, n, …), else along the last.

    A speedup makes it of the user's own module, which stays the same object with the same
    parameters, hooks and names.
    """

    count: int
    channels_first: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rank = input.dim()
        if self.channels_first:
            input = input.permute(0, *range(2, rank), 1)
        shape = tuple(self.normalized_shape)
        result = layer_norm(input, shape, self.weight, self.bias, self.eps, self.count)
        if self.channels_first:
            result = result.permute(0, rank - 1, *range(1, rank - 1))
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, count={self.count}"
