"""Attention whose code counts the heads' dims by the width: ``c // heads`` of ``x.shape``.

Both can shrink, if they shrink so that the quotient stays a size that fits.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from oracle import check_exact, masked_copy, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner, ModelSpeedup
from compress.pruners import base
from compress.speedup import cut


class WindowAttention(nn.Module):
    """As Swin and its kin write it."""

    def __init__(self, width: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.kernel = heads, kernel
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kernel == "queries":
            y = (q * (c // self.num_heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = (q @ k.transpose(-2, -1) / (c // self.num_heads) ** 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Windows(nn.Module):
    """Two blocks on a residual stream, which a convolution makes and a linear layer reads."""

    def __init__(self, kernel: str, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(WindowAttention(width, heads, kernel) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))


def coupled_masks(model: nn.Module, x: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
    config = [
        {"sparsity": 0.5, "op_types": ["default"]},
        {"exclude": True, "op_names": ["head"]},
    ]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
    return pruner.calc_masks()


@pytest.mark.parametrize("kernel", ["sdpa", "queries", "scores"])
def test_width_and_heads_shrink_together(kernel: str) -> None:
    torch.manual_seed(0)
    model = Windows(kernel).double()
    randomise(model)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    masks = coupled_masks(model, x)
    speedup = check_exact(model, x, masks, trains=False)
    # One of three heads of 8 goes, and so 8 of the width of 24, where 12 might.
    assert not any(layer.kept for layer in speedup.report.layers)
    assert [block.num_heads for block in model.blocks] == [2, 2]
    assert model.blocks[0].qkv.weight.shape == (48, 16)
    assert model.head.weight.shape == (5, 16)


def test_few_runs_tell_how_width_and_heads_hang_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Windows("sdpa")
    x = torch.rand(2, 3, 6, 6)
    monkeypatch.setattr(base, "MOST_TRIALS", 1)  # half of the width, and a third of the heads
    masks, runs = coupled_masks(model, x), []
    replay = cut.replay
    monkeypatch.setattr(cut, "replay", lambda *args: runs.append(1) or replay(*args))
    ModelSpeedup(model, x, masks).speedup_model()
    assert len(runs) == 2


class Biased(nn.Module):
    """Attention with a table of biases, which a part of it turns into one for each head."""

    class Table(nn.Module):
        def __init__(self, heads: int, places: int) -> None:
            super().__init__()
            self.num_heads, self.bias_shape = heads, (places, places, heads)
            self.table = nn.Parameter(torch.randn(2 * places - 1, heads))
            where = torch.arange(places)
            self.register_buffer("index", where[:, None] - where + places - 1)

        def bias(self) -> Tensor:  # no module is called, so the run shows the caller's path
            rows = self.table[self.index.view(-1)].view(-1, self.num_heads)
            return rows.view(self.bias_shape).permute(2, 0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 4, 8, 8**-0.5
        self.table = Biased.Table(4, 5)
        self.qkv, self.proj = nn.Linear(24, 96), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.transpose(-2, -1) + self.table.bias()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def test_attributes_of_a_part_count_too() -> None:
    torch.manual_seed(0)
    model = Biased().double()
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    keep = torch.ones(3, 4, 8, dtype=torch.bool)
    keep[:, 1:3] = False
    keep = keep.reshape(-1)
    table = torch.ones_like(model.table.table, dtype=torch.bool)
    table[:, 1:3] = False
    weight = keep[:, None].expand(model.qkv.weight.shape).clone()
    masks = {"qkv": {"weight": weight, "bias": keep}, "table": {"table": table}}
    expected = masked_copy(model, masks)(x)
    ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert (model.num_heads, model.table.num_heads, model.table.bias_shape) == (2, 2, (5, 5, 2))
    assert model.head_dim == 8


class HeldScale(nn.Module):
    """The scale is an attribute, or a number that no size changes: head dims may go."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dim = 8**-0.5, 8
        self.q, self.k, self.v = (nn.Linear(12, 32) for _ in range(3))
        self.out = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def test_head_dims_go_where_the_scale_is_an_attribute() -> None:
    torch.manual_seed(0)
    model = HeldScale().double()
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    keep = torch.ones(4, 8, dtype=torch.bool)
    keep[:, ::2] = False
    keep = keep.reshape(-1)
    masks = {
        path: {"weight": keep[:, None].expand(32, 12).clone(), "bias": keep.clone()}
        for path in ("q", "k", "v")
    }
    check_exact(model, x, masks, trains=False)
    assert model.q.weight.shape == (16, 12)


class NormedHeads(nn.Module):
    """Queries, keys and values normalised within their head, with a weight or without."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 3 * 32), nn.Linear(32, 6)
        self.q_norm = nn.LayerNorm(8, elementwise_affine=affine)
        self.k_norm = nn.RMSNorm(8, elementwise_affine=affine)
        self.v_norm = nn.RMSNorm(8, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), self.v_norm(v))
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("affine", [True, False])
def test_a_head_goes_that_is_normalised_by_itself(affine: bool) -> None:
    torch.manual_seed(0)
    model = NormedHeads(affine).double()
    randomise(model)
    keep = torch.ones(3, 4, 8, dtype=torch.bool)
    keep[:, [0, 2]] = False
    keep = keep.reshape(-1)
    masks = {"qkv": {"weight": keep[:, None].expand(96, 12).clone(), "bias": keep}}
    check_exact(model, torch.rand(2, 5, 12, dtype=torch.float64), masks, trains=False)
    assert model.qkv.out_features == 48


class Disentangled(nn.Module):
    """Attention between contents and positions, as DeBERTa's.

    The code computes the scale from the dims, repeats an index for each head, and uses the table of
    positions without calling it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.words, self.places = nn.Embedding(20, 32), nn.Embedding(8, 32)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 3)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        n = x.shape[1]
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        places = self.split(self.k(self.norm(self.places.weight)[None]))
        places = places.repeat(q.size(0) // self.heads, 1, 1)
        index = (torch.arange(n)[:, None] - torch.arange(n)).clamp(-4, 3) + 4
        index = index.expand(q.size(0), -1, -1)
        scores = q @ k.transpose(-1, -2) + (q @ places.transpose(-1, -2)).gather(-1, index)
        scores = scores / torch.sqrt(torch.tensor(q.size(-1)) * 2)
        y = (scores.softmax(-1) @ v).unflatten(0, (-1, self.heads))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x)


def test_all_goes_that_the_coupled_pruner_masks() -> None:
    torch.manual_seed(0)
    model = Disentangled().double()
    randomise(model)
    x = torch.randint(0, 20, (1, 6))
    config = [
        {"sparsity": 0.5, "op_types": ["Linear", "Embedding"]},
        {"exclude": True, "op_names": ["head"]},
    ]
    masks = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x).calc_masks()
    masked = masked_copy(model, {path: dict(each) for path, each in masks.items()})
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    others = torch.randint(0, 20, (3, 9))
    torch.testing.assert_close(model(others), masked(others), rtol=1e-10, atol=1e-10)
    assert not any(layer.kept for layer in speedup.report.layers)
    assert (model.heads, model.places.weight.shape, model.q.weight.shape) == (2, (8, 16), (16, 16))


class TwoEncoders(nn.Module):
    """The size of one is counted for a scale before the other one runs (RAFT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = (y @ y.transpose(-1, -2)) / torch.sqrt(torch.tensor(y.shape[-1]))
        z = self.second(x)
        assert z.shape[-1] > 1
        return y.mean(-1, keepdim=True) + self.head(z)


def test_a_size_that_is_read_later_is_not_what_was_counted() -> None:
    torch.manual_seed(0)
    model = TwoEncoders().double()
    keep = torch.arange(8) % 2 == 0
    masks = {
        path: {"weight": keep[:, None].expand(8, 5).clone(), "bias": keep.clone()}
        for path in ("first", "second")
    }
    x = torch.rand(2, 4, 5, dtype=torch.float64)
    speedup = check_exact(model, x, masks, trains=False)
    assert (model.first.out_features, model.second.out_features) == (8, 4)
    assert "tensor computes with another number at the model's forward" in str(
        speedup.why("first", 1)
    )


class CountedScale(nn.Module):
    """The scale is counted off an attribute at each call, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.q, self.k, self.v = (nn.Linear(12, 32) for _ in range(3))
        self.out = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, -1, self.dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=1 / self.dim**0.5)
        return self.out(y.transpose(1, 2).flatten(2))


def test_whole_heads_go_where_the_scale_is_counted_at_each_call() -> None:
    torch.manual_seed(0)
    model = CountedScale().double()
    randomise(model)
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    config = [{"sparsity": 0.5, "op_names": ["q", "k", "v"]}]
    masks = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x).calc_masks()
    check_exact(model, x, {path: dict(each) for path, each in masks.items()}, trains=False)
    assert (model.q.weight.shape, model.dim) == ((16, 12), 8)
    assert model.out.weight.shape == (6, 16)
