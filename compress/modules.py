"""Modules of our own that stand in for torch's, where torch's cannot be made smaller.

A stand-in is a subclass that computes the same from the same parameters, of ordinary functions, and
takes its sizes from them. Every recorded run sees it in place of torch's module, and a module that
a speedup cuts becomes it: the object, its hooks and the names in its ``state_dict`` stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with any number of heads and any head dims.

    torch's own takes both from ``embed_dim``, the width of its output, and refuses weights of
    another inner width. Same arguments and results. ``scale`` is what the products of queries and
    keys are multiplied by: head_dim ** -0.5, with the head_dim that the module was made with.
    """

    scale: float

    @staticmethod
    def state_of(module: nn.MultiheadAttention) -> dict[str, Any]:
        """The attributes that this class adds to torch's module, or changes.

        Where ``_qkv_same_embed_dim`` is false, torch's transformer layers call the module instead
        of a kernel that computes with its weights.
        """
        return {"scale": module.head_dim**-0.5, "_qkv_same_embed_dim": False}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint on attn_mask: pass the attn_mask as well")
        if query.is_nested:
            return self._nested(query), None
        q, k, v = (self._by_batch(t, query) for t in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        q, k, v = (self._by_head(t, -1).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = q * self.scale @ k.transpose(-2, -1)
            weights = (weights if mask is None else weights + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal, scale=self.scale
            )
        y = F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return self._as_given(y, query), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """Queries, keys, values, (…, heads · head_dim); in one product where one input is all."""
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            yield from F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            return
        weights: tuple[Tensor, ...]
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        for each, weight, own in zip((query, key, value), weights, biases, strict=True):
            yield F.linear(each, weight, own)

    def _by_batch(self, tensor: Tensor, query: Tensor) -> Tensor:
        """(batch, places, features), whatever the order that the module takes."""
        if query.dim() == 2:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _by_head(self, tensor: Tensor, axis: int) -> Tensor:
        """Heads as an axis of their own: before the head dims, or after the batch."""
        sizes = (-1, self.num_heads) if axis == 0 else (self.num_heads, -1)
        return tensor.unflatten(axis, sizes)  # type: ignore[no-untyped-call,no-any-return]

    def _as_given(self, tensor: Tensor, query: Tensor) -> Tensor:
        if query.dim() == 2:
            return tensor.squeeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, length: int
    ) -> Tensor | None:
        """What is added to the scores: broadcasts to (batch, heads, queries, keys)."""
        if attn_mask is not None and attn_mask.dim() == 3:  # one for each head of each sample
            attn_mask = self._by_head(attn_mask, 0)
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            padding = padding[:, None, None]
        given = [mask for mask in (attn_mask, padding) if mask is not None]
        parts = [_additive(mask, q.dtype, length) for mask in given]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _nested(self, query: Tensor) -> Tensor:
        """Self-attention within sequences of several lengths, as torch's encoders pack them."""
        lengths = torch.tensor([len(each) for each in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        beyond = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        y = self(padded, padded, padded, beyond, need_weights=False)[0]
        return torch._nested_tensor_from_mask(y, ~beyond, mask_check=False)


def _additive(mask: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """A mask as numbers to add (true: minus infinity), open to keys that the module adds."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    added = length - mask.shape[-1]
    return F.pad(mask, (0, added)) if added else mask


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> Tensor:
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

    It is made of the user's own module, which stays the same object.
    """

    count: int
    channels_first: bool

    def forward(self, input: Tensor) -> Tensor:
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


# By the exact class: a subclass of the user's own is recorded as it is.
STAND_INS: dict[type[nn.Module], type[MultiheadAttention]] = {
    nn.MultiheadAttention: MultiheadAttention
}


@dataclass(frozen=True)
class ReplacementKind:
    """What of torch's classes may become which one of ours, and the attributes that this adds."""

    replaces: type[nn.Module]
    becomes: type[nn.Module]
    state: dict[str, type]


# All that a plan may name, by the name in it.
REPLACEMENTS = {
    "MultiheadAttention": ReplacementKind(
        nn.MultiheadAttention, MultiheadAttention, {"scale": float, "_qkv_same_embed_dim": bool}
    ),
    "CountedLayerNorm": ReplacementKind(
        nn.LayerNorm, CountedLayerNorm, {"count": int, "channels_first": bool}
    ),
}


def replace_class(
    module: nn.Module, kind: type[nn.Module], state: dict[str, Any]
) -> Callable[[], None]:
    """Give a module another class and some attributes; returns what undoes it."""
    before, members = type(module), vars(module)
    old = {name: members[name] for name in state if name in members}

    def undo() -> None:
        module.__class__ = before
        for name in state.keys() - old.keys():
            members.pop(name, None)  # undoing twice does no harm
        members.update(old)

    module.__class__ = kind
    members.update(state)
    return undo


def stand_in_state(module: nn.Module) -> dict[str, Any]:
    """What a module's stand-in holds besides what the module does; nothing where it has none."""
    kind = STAND_INS.get(type(module))
    return {} if kind is None else kind.state_of(module)  # type: ignore[arg-type]


@contextmanager
def standing_in(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Stand-ins in place of all modules that have one."""
    undo = [
        replace_class(module, kind, stand_in_state(module))
        for module in modules
        if (kind := STAND_INS.get(type(module))) is not None
    ]
    try:
        yield
    finally:
        for each in undo:
            each()
