"""Quick answers on the meta device, where torch would run a long Python decomposition.

On meta only shapes count. These functions make up most of a network; what they return is told by
the shapes of their arguments, and making it takes a tenth of the time. Whatever is unusual about a
call (other dtypes, layouts, arguments that do not fit) is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Quick = Callable[..., "Tensor | None"]

_QUICK: dict[str, Quick] = {}


def quick_result(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a call on meta tensors (in place: its first argument); None: run the call.

    ``name`` is the plain one: ``add`` for ``add_`` and ``__add__``, too.
    """
    quick = _QUICK.get(name)
    if quick is None or not args:
        return None
    first = args[0][0] if isinstance(args[0], (tuple, list)) and args[0] else args[0]
    if not isinstance(first, Tensor) or not first.is_meta:
        return None
    own = getattr(func, "__name__", "")
    if own[-1:] == "_" and own[-2:] != "__":  # in place
        return None
    try:
        return quick(*args, **kwargs)
    except TypeError:  # a form of the call that is not foreseen here
        return None


def _quick(*names: str) -> Callable[[Quick], Quick]:
    def register(function: Quick) -> Quick:
        _QUICK.update(dict.fromkeys(names, function))
        return function

    return register


def _new(like: Tensor, shape: Iterable[int]) -> Tensor:
    """Of its dtype; ``new_empty`` takes three times as long."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _alike(*tensors: Any) -> bool:
    """Whether all (but None) are on meta and of the first one's dtype."""
    dtype = tensors[0].dtype
    return all(
        isinstance(t, Tensor) and t.is_meta and t.dtype == dtype for t in tensors if t is not None
    )


def _plain(*tensors: Any) -> bool:
    """Whether all (but None) are alike and in torch's default layout."""
    return _alike(*tensors) and all(t.is_contiguous() for t in tensors if t is not None)


# -- as long as the input ------------------------------------------------------------------


@_quick("relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "elu", "leaky_relu",
        "mish", "selu", "celu")  # fmt: skip
def _activation(first: Tensor, *rest: Any, inplace: bool = False, **_: Any) -> Tensor | None:
    if any(value is True for value in rest):  # F.relu(x, True): in place, by position
        return None
    return first.zero_() if inplace else first.clone()  # it counts as written


@_quick("batch_norm", "instance_norm")
def _channel_norm(first: Tensor, *rest: Any, **options: Any) -> Tensor | None:
    fits = first.dim() > 1 and _vectors((*rest, *options.values()), first.shape[1:2])
    return first.clone() if fits else None


@_quick("layer_norm")
def _layer_norm(
    first: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    fits = tuple(first.shape[-len(normalized_shape) :]) == tuple(normalized_shape)
    fits = fits and _vectors((weight, bias), normalized_shape)
    return first.clone() if fits else None


@_quick("group_norm")
def _group_norm(
    first: Tensor, num_groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    fits = first.dim() > 1 and first.shape[1] % num_groups == 0
    fits = fits and _vectors((weight, bias), first.shape[1:2])
    return first.clone() if fits else None


def _vectors(values: Iterable[Any], shape: Sequence[int]) -> bool:
    """Whether every tensor among the arguments of a norm has this shape."""
    return all(tuple(v.shape) == tuple(shape) for v in values if isinstance(v, Tensor))


@_quick("sigmoid", "tanh", "gelu", "exp", "sqrt", "rsqrt", "softplus", "neg", "abs", "square")
def _unary(first: Tensor, *_: Any, approximate: str = "none") -> Tensor | None:
    return first.clone() if first.dtype.is_floating_point else None


@_quick("pow")
def _power(first: Tensor, exponent: Any) -> Tensor | None:
    given = isinstance(exponent, (int, float)) and first.dtype.is_floating_point
    return first.clone() if given else None


@_quick("dropout")
def _dropout(
    first: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """A new tensor where something is dropped; else torch returns the same one."""
    return first.clone() if training and not inplace and 0 < p < 1 and first.numel() else None


@_quick("weight_norm")
def _weight_norm(first: Tensor, size: Any, dim: int = 0) -> Tensor | None:
    return first.clone() if _plain(first, size) and first.dim() == size.dim() else None


@_quick("softmax", "log_softmax")
def _softmax(
    first: Tensor, dim: Any = None, *rest: Any, dtype: Any = None, _stacklevel: int = 3
) -> Tensor | None:
    fits = isinstance(dim, int) and not rest and dtype in (None, first.dtype)
    fits = fits and first.dtype.is_floating_point and _plain(first)
    return first.clone() if fits else None


@_quick("add", "sub", "mul", "truediv", "div", "radd", "rmul", "rsub")
def _binary(first: Tensor, other: Any) -> Tensor | None:
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return first.clone() if first.dtype.is_floating_point else None
    if not isinstance(other, Tensor) or first.dtype != other.dtype or not other.is_meta:
        return None
    if not first.dtype.is_floating_point:
        return None
    if first.shape == other.shape:
        return first.clone()
    shape = _broadcast(first.shape, other.shape)
    return None if shape is None or not _plain(first, other) else _new(first, shape)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    if len(a) < len(b):
        a, b = b, a
    shape = list(a)
    for i, size in enumerate(b, len(a) - len(b)):
        if shape[i] != size:
            if size != 1 and shape[i] != 1:
                return None
            shape[i] = max(size, shape[i]) if 0 not in (size, shape[i]) else 0
    return shape


# -- products ------------------------------------------------------------------------------


@_quick("linear")
def _linear(first: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or not _alike(first, weight, bias) or first.shape[-1:] != weight.shape[1:]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return _new(first, (*first.shape[:-1], weight.shape[0]))


@_quick("matmul")
def _matmul(first: Tensor, other: Tensor) -> Tensor | None:
    a, b = first.shape, other.shape
    if len(a) != len(b) or len(a) < 2 or a[:-2] != b[:-2] or a[-1] != b[-2]:
        return None
    if first.dtype != other.dtype or not other.is_meta:
        return None
    return _new(first, (*a[:-1], b[-1]))


@_quick("scaled_dot_product_attention")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    q, k, v = query.shape, key.shape, value.shape
    if len(q) != 4 or len(k) != 4 or k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        return None
    if q[1] != k[1] and not (enable_gqa and q[1] % k[1] == 0):
        return None
    if not query.dtype == key.dtype == value.dtype or not (key.is_meta and value.is_meta):
        return None
    scores = [*q[:3], k[2]]
    if attn_mask is not None and _broadcast(scores, attn_mask.shape) != scores:
        return None
    # The kernels that run on real tensors lay the output out as the query, which torch's own answer
    # on meta does not tell.
    return query.clone() if v[3] == q[3] else _new(query, (*q[:3], v[3]))


@_quick("conv1d", "conv2d", "conv3d")
def _conv(
    first: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    places = weight.dim() - 2
    if isinstance(padding, str) or first.dim() != weight.dim() or not _plain(first, weight, bias):
        return None
    if first.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            first.shape[2:], weight.shape[2:],
            *(_each(value, places) for value in (stride, padding, dilation)), strict=True,
        )
    ]  # fmt: skip
    if min(sizes) < 1 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return _new(first, (first.shape[0], weight.shape[0], *sizes))


# -- places --------------------------------------------------------------------------------


@_quick("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive(first: Tensor, output_size: Any) -> Tensor | None:
    given = (output_size,) if isinstance(output_size, int) else tuple(output_size)
    places = first.dim() - 2
    sizes = given * places if len(given) == 1 else given
    if places < 1 or len(sizes) != places or not _plain(first):
        return None
    kept = (s if size is None else size for size, s in zip(sizes, first.shape[2:], strict=True))
    return _new(first, (*first.shape[:2], *kept))


@_quick("interpolate")
def _interpolate(
    first: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Tensor | None:  # fmt: skip
    whole = isinstance(size, (tuple, list)) and all(isinstance(s, int) and s > 0 for s in size)
    if not whole or len(size) != first.dim() - 2 or scale_factor is not None or not _plain(first):
        return None
    return _new(first, (*first.shape[:2], *size))


@_quick("embedding")
def _embedding(
    first: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor | None:  # fmt: skip
    if not isinstance(weight, Tensor) or not weight.is_meta or weight.dim() != 2:
        return None
    if first.dtype not in (torch.int64, torch.int32) or max_norm is not None:
        return None
    return _new(weight, (*first.shape, weight.shape[1]))


@_quick("cat")
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    rank = first.dim()
    # Images of another layout keep it; of other ranks torch lays out the result anew.
    fits = _plain(*tensors) if rank in (4, 5) else _alike(*tensors)
    if not fits or any(t is None or t.dim() != rank for t in tensors) or not -rank <= dim < rank:
        return None
    axis, shape = dim % rank, list(first.shape)
    if any(t.shape[i] != shape[i] for t in tensors for i in range(rank) if i != axis):
        return None
    shape[axis] = sum(t.shape[axis] for t in tensors)
    return _new(first, shape)


@_quick("mean", "sum")
def _reduced(first: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, (tuple, list)) or not dims or not _plain(first):
        return None
    rank = first.dim()
    if not first.dtype.is_floating_point or not all(-rank <= d < rank for d in dims):
        return None
    gone = {d % first.dim() for d in dims}
    sizes = (1 if i in gone else s for i, s in enumerate(first.shape) if keepdim or i not in gone)
    return _new(first, tuple(sizes))


def _each(value: Any, places: int) -> tuple[int, ...]:
    return (value,) * places if isinstance(value, int) else tuple(value) * (places // len(value))
