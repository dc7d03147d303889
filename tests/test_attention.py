"""Attention by the general mechanism: heads, head dims, and the attributes that count them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from oracle import check_exact
from torch import nn
from torch.nn import functional as F

from compress import ModelSpeedup


class SelfAttention(nn.Module):
    """Self-attention as libraries write it, with one qkv layer or three, and a residual."""

    def __init__(self, fused: bool, kernel: str, heads: int = 4, head_dim: int = 8) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kernel = heads, head_dim, kernel
        self.scale = head_dim**-0.5
        inner, width = heads * head_dim, 24
        self.qkv = nn.Linear(width, 3 * inner) if fused else None
        if not fused:
            self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        if self.qkv is not None:
            qkv = self.qkv(x).view(b, n, 3, self.heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
        else:
            parts = (layer(x).view(b, n, -1, self.head_dim) for layer in (self.q, self.k, self.v))
            q, k, v = (part.transpose(1, 2) for part in parts)
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        elif self.kernel == "matmul":
            y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, -1))


def rows(module: nn.Linear, gone: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masks of a linear layer of which the outputs ``gone`` (bool) are masked."""
    keep = ~gone.reshape(-1)
    return {"weight": keep[:, None].expand(module.weight.shape), "bias": keep}


def shrunk(model: nn.Module, masks: dict[str, dict[str, torch.Tensor]]) -> ModelSpeedup:
    """Speed a copy up, and hold it against the masked model at another batch size."""
    masked, small = deepcopy(model), deepcopy(model)
    for path, parameters in masks.items():
        for name, mask in parameters.items():
            getattr(masked.get_submodule(path), name).data.mul_(mask)
    speedup = ModelSpeedup(small, torch.rand(2, 5, 24, dtype=torch.float64), masks)
    speedup.speedup_model()
    x = torch.rand(3, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-10)
    return speedup


@pytest.mark.parametrize("kernel", ["sdpa", "matmul", "einsum"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_head_whose_values_are_masked_goes_with_its_queries_and_keys(fused, kernel):
    model = SelfAttention(fused, kernel).double()
    gone = torch.zeros(3 if fused else 1, 4, 8, dtype=torch.bool)
    gone[-1, 1] = True
    layer = "qkv" if fused else "v"
    speedup = shrunk(model, {layer: rows(model.get_submodule(layer), gone)})
    small = speedup.model
    assert small.out.in_features == 24
    assert small.out.out_features == 24
    assert {x.layer: x.removed for x in speedup.report.layers} == (
        {"qkv": 24} if fused else {"q": 8, "k": 8, "v": 8}
    )
    if fused:
        assert small.heads == 3  # the attribute that the forward counts with


def test_head_dims_that_one_attribute_counts_stay_equally_many():
    model = SelfAttention(False, "matmul").double()
    queries, values = (torch.zeros(4, 8, dtype=torch.bool) for _ in range(2))
    queries[:, 2] = True
    values[:, [2, 5]] = True
    masks = {"q": rows(model.q, queries), "v": rows(model.v, values)}
    speedup = shrunk(model, masks)
    assert speedup.model.head_dim == 7
    assert [speedup.model.get_submodule(n).out_features for n in "qkv"] == [28, 28, 28]
    kept = next(layer.kept for layer in speedup.report.layers if layer.layer == "v")
    assert sum(kept.values()) == 4


def test_the_default_scale_of_attention_keeps_the_query_dims():
    class Plain(SelfAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = (layer(x).unflatten(-1, (4, -1)) for layer in (self.q, self.k, self.v))
            q, k, v = (part.transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(y.transpose(1, 2).flatten(2))

    model = Plain(False, "").double()
    gone = torch.zeros(4, 8, dtype=torch.bool)
    gone[:, 3] = True
    speedup = shrunk(model, {"q": rows(model.q, gone), "v": rows(model.v, gone)})
    assert speedup.model.q.out_features == 32
    assert speedup.model.v.out_features == 28
    kept = next(layer.kept for layer in speedup.report.layers if layer.layer == "q")
    assert "scale of attention" in next(iter(kept))


def test_grouped_query_attention_loses_a_key_head_with_all_its_query_heads():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(24, 32), nn.Linear(24, 32)
            self.out = nn.Linear(32, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q = self.q(x).view(b, n, -1, 8).transpose(1, 2)
            k, v = self.kv(x).chunk(2, -1)
            k, v = (t.view(b, n, -1, 8).transpose(1, 2) for t in (k, v))
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(y.transpose(1, 2).flatten(2))

    model = Grouped().double()
    gone = torch.zeros(2, 2, 8, dtype=torch.bool)
    gone[1, 0] = True  # the values of the first key head
    speedup = shrunk(model, {"kv": rows(model.kv, gone)})
    assert speedup.model.q.out_features == 16
    assert speedup.model.kv.out_features == 16
    assert speedup.model.out.in_features == 16


def test_weights_on_the_right_of_a_product_are_layers_too():
    class RightWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(24, 16))
            self.bias = nn.Parameter(torch.randn(16))
            self.second = nn.Parameter(torch.randn(16, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.addmm(self.bias, x.flatten(0, 1), self.first).sigmoid()
            return (y @ self.second).view(*x.shape[:2], 5)

    model = RightWeights().double()
    keep = torch.arange(16) >= 6
    masks = {"": {"first": keep.expand(24, 16), "bias": keep}}
    masked, small = deepcopy(model), deepcopy(model)
    masked.first.data.mul_(keep)
    masked.bias.data.mul_(keep)
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    ModelSpeedup(small, x, masks).speedup_model()
    torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-10)
    # sigmoid(0) is 0.5, and no bias can take it: one channel stays to carry the others.
    assert small.first.shape == (24, 11)
    assert small.second.shape == (11, 5)


class Strided(nn.Module):
    """Attention with four heads and a stride of four: two numbers that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.stride, self.width = 4, 4, 4
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = len(x)
        x = x.view(b, self.stride, -1, 24).amax(1)
        q, k, v = self.qkv(x).view(b, -1, 3, self.heads, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(b, x.shape[1] * self.stride // self.width, -1))


def test_of_attributes_with_one_value_those_are_set_that_count_heads():
    model = Strided().double()
    gone = torch.zeros(3, 4, 8, dtype=torch.bool)
    gone[:, 1:3] = True
    masks = {"qkv": rows(model.qkv, gone)}
    masked = deepcopy(model)
    for name, mask in masks["qkv"].items():
        getattr(masked.qkv, name).data.mul_(mask)
    x = torch.rand(2, 20, 24, dtype=torch.float64)
    ModelSpeedup(model, x, masks).speedup_model()
    assert (model.heads, model.stride, model.width) == (2, 4, 4)
    assert model.qkv.out_features == 48
    torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [("heads", "head_dim"), ("head_dim", "heads")], ids=str)
@pytest.mark.parametrize("what", ["heads", "head_dim"])
def test_as_many_heads_as_dims_of_a_head(what, order):
    torch.manual_seed(0)
    model = SelfAttention(True, "sdpa", heads=6, head_dim=6).double()
    for name in order:  # which of the two is found first must not matter
        vars(model)[name] = vars(model).pop(name)
    gone = torch.zeros(3, 6, 6, dtype=torch.bool)
    gone[:, 1:3] = what == "heads"
    gone[:, :, 1:3] |= torch.tensor(what == "head_dim")
    small = shrunk(model, {"qkv": rows(model.qkv, gone)}).model
    assert small.qkv.out_features == 3 * 24
    assert {"heads": 6, "head_dim": 6} | {what: 4} == {n: getattr(small, n) for n in order}


class Experts(nn.Module):
    """A mixture of experts as transformers writes it: one grouped product for all of them."""

    def __init__(self, transposed: bool, width: int = 8, inner: int = 16, experts: int = 3) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        self.router = nn.Linear(5, experts)
        self.transposed = transposed
        shapes = {"gate_up": (2 * inner, width), "down": (width, inner)}
        for name, (out, into) in shapes.items():
            shape = (experts, into, out) if transposed else (experts, out, into)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        weight = weight if self.transposed else weight.transpose(-2, -1)
        return F.grouped_mm(x, weight, offs=ends)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1)
        expert, order = self.router(x).argmax(-1).sort()
        counts = torch.histc(expert.float(), bins=3, min=0, max=2)
        ends = counts.cumsum(0, dtype=torch.int32)
        y = self.first(x)
        gate, up = self.grouped(y[order], self.gate_up, ends).chunk(2, -1)
        z = self.grouped(F.silu(gate) * up, self.down, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.head(y + z[back])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("of", ["makers", "readers"])
def test_experts_lose_hidden_units_and_width(transposed, of):
    torch.manual_seed(0)
    model = Experts(transposed)
    out, into = (2, 1) if transposed else (1, 2)
    masks = {"": {n: torch.ones(getattr(model, n).shape) > 0 for n in ("gate_up", "down")}}
    hidden = [1, 3, 6, 7]
    if of == "makers":  # the gate, whose 0 makes the product 0
        masks[""]["gate_up"].movedim(out, 0)[hidden] = False
    else:
        masks[""]["down"].movedim(into, 0)[hidden] = False
    width = [0, 2, 5, 7]  # torch's kernel wants rows of a multiple of 16 bytes
    masks[""]["down"].movedim(out, 0)[width] = False
    masks["first"] = {"weight": torch.ones(8, 5) > 0, "bias": torch.ones(8) > 0}
    masks["first"]["weight"][width] = masks["first"]["bias"][width] = False
    check_exact(model, torch.randn(1, 7, 5), masks, trains=False)
    assert model.gate_up.movedim((out, into), (1, 2)).shape == (3, 24, 4)
    assert model.down.movedim((out, into), (1, 2)).shape == (3, 4, 12)
    assert model.head.in_features == 4


def test_a_unit_that_one_expert_reads_stays():
    torch.manual_seed(0)
    model = Experts(False)
    keep = torch.ones(model.down.shape) > 0
    keep[:2, :, 4] = False
    check_exact(model, torch.randn(1, 7, 5), {"": {"down": keep}}, trains=False)
    assert model.down.shape == (3, 8, 16)
