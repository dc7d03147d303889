"""The size attributes of torch's own modules, for the shapes that their tensors take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import nn


class Cut(Protocol):
    """What is kept of a tensor, as a plan's ``Slice`` has it."""

    @property
    def keep(self) -> Sequence[np.ndarray | None]: ...

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]: ...


def sizes_after(
    path: str, module: nn.Module, cuts: Mapping[str, Cut], groups: int | None
) -> list[tuple[str, int]]:
    """The size attributes of a torch module at ``path`` once ``cuts`` (by path) are carried out."""
    prefix = f"{path}." if path else ""
    shapes = {
        name: cuts[prefix + name].shape(tuple(tensor.shape))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and prefix + name in cuts
    }
    return module_sizes(module, shapes.get("weight"), shapes, groups)


def module_sizes(
    module: nn.Module,
    weight: tuple[int, ...] | None,
    shapes: dict[str, tuple[int, ...]],
    groups: int | None,
) -> list[tuple[str, int]]:
    """The size attributes of a torch module whose tensors take new shapes."""
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        near, far = weight[0], weight[1] * (groups or module.groups)
        names = ("in_channels", "out_channels")
        return list(zip(names, (near, far) if module.transposed else (far, near), strict=True))
    if isinstance(module, nn.Linear) and weight is not None:
        return [("in_features", weight[1]), ("out_features", weight[0])]
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and shapes:
        name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        return [(name, next(iter(shapes.values()))[0])]
    if isinstance(module, nn.Bilinear) and weight is not None:
        return list(zip(("out_features", "in1_features", "in2_features"), weight, strict=True))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and weight is not None:
        return [("num_embeddings", weight[0]), ("embedding_dim", weight[1])]
    if isinstance(module, nn.PReLU) and weight is not None:
        return [("num_parameters", weight[0])]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and shapes:
        return _recurrent_sizes(module, shapes)
    return []


def _recurrent_sizes(
    module: nn.RNNBase | nn.RNNCellBase, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[str, int]]:
    """The sizes of a recurrent module, from the weights of its first layer."""
    layer = "_l0" if isinstance(module, nn.RNNBase) else ""
    after = {
        name: shapes.get(f"weight_{name}{layer}", getattr(module, f"weight_{name}{layer}").shape)
        for name in ("ih", "hh", "hr")
        if hasattr(module, f"weight_{name}{layer}")
    }
    gates = getattr(module, f"weight_ih{layer}").shape[0] // module.hidden_size
    sizes = [("input_size", after["ih"][1]), ("hidden_size", after["hh"][0] // gates)]
    return sizes + ([("proj_size", after["hr"][0])] if "hr" in after else [])


def attention_sizes(
    module: nn.MultiheadAttention, cuts: Mapping[str, Cut]
) -> list[tuple[str, int]]:
    """The sizes of an attention module: heads are left of which any value is."""
    packed = module.in_proj_weight is not None
    values, parts = ("in_proj_weight", 3) if packed else ("v_proj_weight", 1)
    weights = dict(module.named_parameters())
    shapes = {n: cuts[n].shape(t.shape) if n in cuts else t.shape for n, t in weights.items()}
    rows, heads = weights[values].shape[0], module.num_heads
    cut = cuts.get(values)
    if cut is not None and cut.keep[0] is not None:
        per_head = rows // (parts * heads)
        rows, heads = len(cut.keep[0]), len(np.unique(cut.keep[0] // per_head)) // parts
    keys = "in_proj_weight" if packed else "k_proj_weight"
    return [
        ("num_heads", heads),
        ("head_dim", rows // (parts * heads)),
        ("embed_dim", shapes["out_proj.weight"][0]),
        ("kdim", shapes[keys][1]),
        ("vdim", shapes[values][1]),
    ]
