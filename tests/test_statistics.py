"""Norms and other statistics over the axis that shrinks: exact, though they count its positions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from oracle import check_exact, outputs, randomise
from test_speedup import filters
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner, ModelSpeedup
from compress.errors import VerificationError
from compress.modules import CountedLayerNorm
from compress.speedup import verify

WIDTH = 16


class MeanSquareNorm(nn.Module):
    """RMSNorm as most language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


class OffsetNorm(nn.Module):
    """RMSNorm with its weight around 0: (1 + w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = 1e-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class ReciprocalNorm(MeanSquareNorm):
    """RMSNorm that multiplies with one over the root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return x * (1 / root) * self.weight


class PlacesNorm(nn.LayerNorm):
    """LayerNorm over axis 1, as convolutional models have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 2, 1)


class LengthNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) * self.weight


class Residual(nn.Module):
    """A residual stream of ``WIDTH`` features with a norm before each branch."""

    def __init__(self, norm: Callable[[int], nn.Module], channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.embed = nn.Linear(7, WIDTH)
        self.position = nn.Parameter(torch.rand(1, 5, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def normed(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            return self.norms[i](x.transpose(1, 2)).transpose(1, 2)
        return self.norms[i](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + down(F.gelu(up(self.normed(i, x))))
        return self.head(self.normed(2, x).mean(1))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "layer_norm_without_bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer_norm_over_axis_1": PlacesNorm,
    "rms_norm": lambda width: nn.RMSNorm(width, eps=1e-2),
    "rms_norm_default_eps": nn.RMSNorm,
    "mean_square": MeanSquareNorm,
    "offset_weight": OffsetNorm,
    "one_over_the_root": ReciprocalNorm,
    "length": LengthNorm,
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = Residual(NORMS[name], channels_first=name == "layer_norm_over_axis_1")
    randomise(model)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model.double().eval(), torch.rand(2, 5, 7, dtype=torch.float64)


def prune(model: nn.Module, x: torch.Tensor, sparsity: float = 0.5) -> ModelSpeedup:
    """Mask every layer but the head, shrink, and compare with the masked model."""
    config_list = [
        {"sparsity": sparsity, "op_types": ["Linear"]},
        {"exclude": True, "op_names": ["head"]},
    ]
    pruner = L1FilterPruner(model, config_list, mode="dependency_aware", dummy_input=x)
    model, masks = pruner.compress()
    expected = outputs(model, x)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    for one, other in zip(expected, outputs(model, x), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    return speedup


@pytest.mark.parametrize("name", NORMS)
def test_the_residual_width_shrinks_through_norms(name):
    model, x = build(name)
    speedup = prune(model, x)
    assert model.embed.weight.shape == (WIDTH // 2, 7)
    assert model.position.shape == (1, 5, WIDTH // 2)
    assert model.down[1].weight.shape == (WIDTH // 2, 12)
    assert model.norms[2].weight.shape == (WIDTH // 2,)
    assert all(not layer.kept for layer in speedup.report.layers)
    assert outputs(model, torch.rand(3, 5, 7, dtype=torch.float64))[0].shape == (3, 3)


@pytest.mark.parametrize("name", NORMS)
def test_a_small_model_shrinks_again(name):
    model, x = build(name)
    prune(model, x)
    prune(model, x)
    assert model.embed.out_features == WIDTH // 4


def test_a_counted_norm_is_the_norm_over_the_zeros_too():
    norm = nn.LayerNorm(10).double()
    randomise(norm)
    x = torch.randn(4, 10, dtype=torch.float64) * 3 + 2
    x[:, 6:] = 0
    expected = norm(x)[:, :6]
    counted = CountedLayerNorm(6, eps=norm.eps).double()
    counted.count, counted.channels_first = 10, False
    counted.weight.data, counted.bias.data = norm.weight.data[:6], norm.bias.data[:6]
    torch.testing.assert_close(counted(x[:, :6]), expected, rtol=1e-12, atol=1e-12)
    assert "count=10" in repr(counted)
    half = counted.bfloat16()(x[:, :6].bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=5e-2, atol=5e-2)


def test_the_users_own_module_becomes_the_counted_one():
    model, x = build("layer_norm")
    norm, calls = model.norms[0], []
    norm.register_forward_hook(lambda *args: calls.append(args))
    prune(model, x)
    assert model.norms[0] is norm
    assert type(norm) is CountedLayerNorm
    assert norm.normalized_shape == (WIDTH // 2,)
    calls.clear()
    model(x)
    assert len(calls) == 1
    expected = outputs(model, x)[0]
    torch.testing.assert_close(outputs(copy.deepcopy(model), x)[0], expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "offset_weight"])
def test_a_refused_speedup_puts_the_norms_back(name, monkeypatch):
    model, x = build(name)
    config_list = [{"sparsity": 0.5, "op_names": ["embed", "down.0", "down.1"]}]
    pruner = L1FilterPruner(model, config_list, mode="dependency_aware", dummy_input=x)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    before = copy.deepcopy(model)
    monkeypatch.setattr(verify.Verifier, "compare", lambda self: (float("inf"), "is refused"))
    monkeypatch.setattr(verify, "in_float64", lambda *args: None)
    with pytest.raises(VerificationError, match="is refused"):
        ModelSpeedup(model, x, masks).speedup_model()
    for old, new in zip(before.norms, model.norms, strict=True):
        assert type(new) is type(old)
        assert repr(new) == repr(old)
        assert vars(new).keys() == vars(old).keys()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)


class LiteralEpsilon(MeanSquareNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


class HandWrittenLayerNorm(MeanSquareNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


class TwiceUsedWeight(MeanSquareNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.weight


@pytest.mark.parametrize("norm", [LiteralEpsilon, HandWrittenLayerNorm, TwiceUsedWeight])
def test_a_mean_that_nothing_can_correct_keeps_its_axis(norm):
    torch.manual_seed(0)
    model = Residual(norm).double().eval()
    randomise(model)
    x = torch.rand(2, 5, 7, dtype=torch.float64)
    with pytest.warns(UserWarning, match="what mean works over"):
        prune(model, x)
    assert model.embed.out_features == WIDTH
    assert model.up[0].out_features == 12


def test_a_sum_over_channels_reads_what_is_not_zero():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            return torch.stack([x.sum(-1), x.norm(dim=-1), x.norm(p=1, dim=-1)])

    model = Sums().double()
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    mask = keep[:, None].expand(8, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    model.one.weight.data *= mask
    expected = model(x)
    ModelSpeedup(model, x, {"one": {"weight": mask}}).speedup_model()
    assert model.one.out_features == 5
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_training_goes_on_while_the_last_loss_is_alive():
    model, x = build("rms_norm")
    loss = model(x).square().sum()
    loss.backward()
    prune(model, x)
    model.zero_grad()
    model(x).square().sum().backward()
    assert model.embed.weight.grad.shape == (WIDTH // 2, 7)
    assert loss.isfinite()


class EpsilonElsewhere(MeanSquareNorm):
    """Its epsilon is added to something else, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (x.sum(-1, keepdim=True) + self.variance_epsilon)


def test_an_epsilon_that_counts_elsewhere_stays():
    torch.manual_seed(0)
    model = Residual(EpsilonElsewhere).double().eval()
    randomise(model)
    x = torch.rand(2, 5, 7, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        prune(model, x)
    assert model.norms[0].variance_epsilon == 1e-2


class RootsToo(nn.Module):
    """Gives the roots of its mean squares as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.last(x * root * self.weight), root


def test_a_root_that_is_an_output_is_the_one_of_before():
    model = RootsToo().double()
    randomise(model)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    masks = {"first": {"weight": keep[:, None].expand(8, 4), "bias": keep}}
    check_exact(model, torch.randn(3, 4, dtype=torch.float64), masks)
    assert model.first.out_features == 8


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.LPPool2d(2, 4)])
def test_what_is_known_place_by_place_is_pooled(pool: nn.Module) -> None:
    """A table of positions is added: of its masked channels all places are 0, of others none."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.table, self.pool = nn.Parameter(torch.zeros(1, 6, 8, 8)), pool

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.body(x) + self.table))

    torch.manual_seed(0)
    model = Placed().double().eval()
    randomise(model)
    keep = torch.ones(1, 6, 8, 8)
    keep[:, [1, 4]] = 0
    masks = {"": {"table": keep}, "body": filters(model.body, 1, 4)}
    check_exact(model, torch.rand(2, 3, 8, 8).double(), masks)
    assert model.head.in_channels == 4
