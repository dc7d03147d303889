"""The table of functions: each between two layers, of which it lets masked channels go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import MaskDict, check_exact, masked_copy, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from compress import ModelSpeedup
from compress.errors import SpeedupError

CHANNELS, GONE = 8, [1, 5]
HEADS = {2: nn.Linear, 3: lambda c, n: nn.Conv1d(c, n, 1), 4: lambda c, n: nn.Conv2d(c, n, 1),
         5: lambda c, n: nn.Conv3d(c, n, 1)}  # fmt: skip


class Sandwich(nn.Module):
    """conv - norm - ``middle`` - head; the middle may be a module or a function."""

    def __init__(self, middle: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
        self.module = middle if isinstance(middle, nn.Module) else nn.Identity()
        self.function = middle
        x = torch.rand(2, CHANNELS, 6, 6)
        with torch.no_grad():
            shape = middle(x).shape
        self.head = HEADS[len(shape)](shape[1], 5)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y = self.module(y) if self.function is self.module else self.function(y)
        return self.head(y)


def channels_masked(module: nn.Module, gone: list[int], axis: int = 0) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in module.named_parameters(recurse=False):
        keep = torch.ones_like(parameter, dtype=torch.bool)
        keep.movedim(axis if parameter.dim() > 1 else 0, 0)[gone] = False
        masks[name] = keep
    return masks


def squeezed(
    middle: Callable[..., Tensor], gone: Sequence[int] = GONE
) -> tuple[Sandwich, ModelSpeedup]:
    """The network around ``middle`` with some channels masked, cut and held against the masked."""
    torch.manual_seed(0)
    model = Sandwich(middle)
    masks: MaskDict = {n: channels_masked(getattr(model, n), gone) for n in ("first", "norm")}
    return model, check_exact(model, torch.randn(2, 3, 6, 6).double(), masks)


def flat(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of (N, C, places), its result flat."""
    return lambda x: function(x.flatten(2)).flatten(1)


def pooled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of (N, C)."""
    return lambda x: function(x.mean((2, 3)))


def attended(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2) @ x.flatten(2)


def part_of_new(x: Tensor) -> Tensor:
    """The upper half of a new tensor is written through a view of it."""
    y = torch.zeros_like(x)
    y[:, :, :3].copy_(x[:, :, 3:])
    return y


def added_to_part(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 1:4] += x[..., :3] * 2
    y[:, :, 2].mul_(0.5)
    return y


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x).mean((1, 2))


def sampled(x: Tensor) -> Tensor:
    square = torch.eye(2, 3, dtype=x.dtype)[None].repeat(len(x), 1, 1)
    grid = F.affine_grid(square, [len(x), 1, 4, 4], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


# What is masked goes with its channels through all of these.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # movement
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(torch.cat([x, x], 1), 2),
    "shuffle by view": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "copy": lambda x: torch.zeros_like(x).copy_(x),
    "copy to a part": lambda x: part_of_new(x).clone(),
    "add to a part": lambda x: added_to_part(x),
    "index_add": lambda x: x.clone().index_add(3, torch.tensor([0, 0, 4]), x[..., 1:4]),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(2, torch.tensor([3, 5]), x[:, :, 2:4]),
    "baddbmm by name": lambda x: torch.baddbmm(
        x[..., 0].new_zeros(1, 1, 6), batch1=x.flatten(2), batch2=torch.ones(len(x), 36, 6).to(x)
    ),
    "roll places": lambda x: x.roll((1, 2), (2, 3)),
    "flip": lambda x: x.flip(1, 2),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "triu": lambda x: x.triu(),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "chunk": lambda x: torch.cat(torch.cat([x, x], 1).chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat([x, x * 2], 1).split(x.shape[1], 1)[1],
    "unbind": lambda x: sum(x.unbind(2)),
    "larger of two": lambda x: torch.max(x, x * 0.5) + torch.min(x.relu(), x.exp() - 1),
    "stack": lambda x: torch.stack([x, x * 2], 2).flatten(2, 3),
    "stack to channels": lambda x: torch.stack([x, x * 2], 2).flatten(1, 2),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1).repeat_interleave(2, dim=-1),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2),
    "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "pad zeros": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=2.0),
    # taking places
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 1])),
    "index": lambda x: x[:, :, torch.tensor([3, 1])],
    "index two axes": lambda x: x[..., torch.tensor([3, 1]), torch.tensor([0, 2])],
    "narrow": lambda x: x.narrow(2, 1, 3).select(3, 2),
    "gather": lambda x: x.flatten(2).gather(2, x.flatten(2).argsort(2)),
    "take_along_dim": lambda x: x.take_along_dim(x.argmax(2, keepdim=True), 2),
    "unfold": lambda x: F.unfold(x, 2),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 2), (6, 6), 2),
    "windows": lambda x: x.unfold(2, 2, 2).sum(-1),
    # products
    "einsum": lambda x: torch.einsum("nchw,nchv->ncwv", x, x),
    "einsum implicit": lambda x: torch.einsum("nchw,hw", x, x.new_ones(x.shape[2:])).t(),
    "einsum ellipsis": lambda x: torch.einsum("nc...,nc...->n...c", x, x).permute(0, 3, 1, 2),
    "places times places": lambda x: x * attended(x).mean((1, 2))[:, None, None, None],
    "gram matrix": flat(lambda x: x @ x.transpose(1, 2)),
    "bmm": flat(lambda x: torch.bmm(x, x.transpose(1, 2))),
    "baddbmm": flat(lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5)),
    "outer": pooled(lambda x: (x[:, :, None] * x[:, None, :]).flatten(1)),
    "cosine_similarity": lambda x: x * F.cosine_similarity(x, x * x, 1)[:, None],
    "cdist of places": lambda x: (
        x * torch.cdist(*[x.flatten(2).mT] * 2).mean((1, 2)).view(-1, 1, 1, 1)
    ),
    # activations and gates
    "glu": lambda x: F.glu(torch.cat([x, x * 2], 1), 1),
    "maxout": lambda x: torch.cat([x, -x], 1).unflatten(1, (2, -1)).amax(1),
    "clamp": lambda x: x.clamp(-1, 1),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "mask": lambda x: x * (x > 0.1).to(x.dtype),
    "heaviside": lambda x: x * torch.heaviside(x, x),
    "rrelu": lambda x: F.rrelu(x),
    # along lanes of places
    "softmax": flat(lambda x: x.softmax(-1)),
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "norm": lambda x: x / x.norm(dim=(2, 3), keepdim=True).add(1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "normalize places": lambda x: F.normalize(x.flatten(2), dim=2),
    "std": lambda x: torch.cat([x.std((2, 3)), x.var((2, 3))], 1),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, (2, 3)), 1),
    "cumsum": lambda x: x.cumsum(2),
    "sort": flat(lambda x: x.sort(-1)[0]),
    "topk": flat(lambda x: x.topk(3, -1)[0]),
    "kthvalue": lambda x: x.flatten(2).kthvalue(2, -1)[0],
    "median": lambda x: x.flatten(2).median(-1)[0],
    "quantile": lambda x: x.flatten(2).quantile(0.3, -1),
    "argmax": lambda x: x * x.flatten(2).argmax(-1)[..., None, None],
    "diff": lambda x: x.diff(dim=2),
    # over the channels themselves: what is 0 adds nothing
    "sum of channels": lambda x: x * x.sum(1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "linalg.norm of channels": lambda x: x * torch.linalg.norm(x, dim=1, keepdim=True),
    "norm of channels": lambda x: x * x.norm(dim=1, keepdim=True).add(1).reciprocal(),
    # complex numbers
    "rfft2": lambda x: torch.fft.rfft2(x).abs(),
    "fft and back": lambda x: torch.fft.ifft(torch.fft.fft(x)).real,
    "complex": lambda x: torch.view_as_real(torch.complex(x, x * 2)).sum(-1),
    "complex product": lambda x: (torch.complex(x, -x) * torch.polar(x.abs(), x)).abs(),
    # pooling and sampling
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "lp_pool": lambda x: F.lp_pool2d(x, 2, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "nearest": lambda x: F.interpolate(x, size=(9, 9)),
    "grid_sample": sampled,
    "instance_norm": lambda x: F.instance_norm(x),
}

# These mix the channels, or take them by numbers in the code: they stay, and the report says why.
STAY: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "roll": (lambda x: x.roll(3, 1), "changes places in roll"),
    "index_select": (lambda x: x.index_select(1, torch.tensor([7, 1, 4])), "is picked from"),
    "index": (lambda x: x[:, [7, 1, 4]], "is indexed with a tensor"),
    "slice": (lambda x: torch.cat([x[:, :5], x[:, 5:] * 2], 1), "sliced at a fixed position"),
    "split": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), "number in the code"),
    "softmax": (lambda x: x.softmax(1), "softmax works over"),
    "max": (lambda x: x * x.amax(1, keepdim=True), "amax works over"),
    "cumsum": (lambda x: x.cumsum(1), "cumsum works over"),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), "takes its statistics over"),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1), value=2.0), "is read by head"),
    "quotient": (lambda x: x / x.norm(dim=1, keepdim=True), "is read by head"),
    "unknown": (lambda x: torch.special.bessel_j0(x), "has no rule"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_channels_go_through(name):
    model, _ = squeezed(FUNCTIONS[name])
    assert model.first.out_channels == CHANNELS - len(GONE)


@pytest.mark.parametrize("name", STAY)
def test_masked_channels_that_stay(name):
    function, why = STAY[name]
    model, speedup = squeezed(function)
    assert model.first.out_channels == CHANNELS
    assert why in " ".join(reason for layer in speedup.report.layers for reason in layer.kept)


# -- modules -------------------------------------------------------------------------------


class Gain(nn.Module):
    """LayerScale, and a buffer of channel size."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(CHANNELS, 1, 1))
        self.register_buffer("shift", torch.ones(1, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + x * self.shift


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Volume(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None])


class Line(Volume):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(2))


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, options.pop("out", CHANNELS), 3, **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: Line(nn.Conv1d(CHANNELS, 6, 3)),
    "Conv3d": lambda: Volume(nn.Conv3d(CHANNELS, 6, (1, 3, 3))),
    "grouped Conv2d": lambda: conv(groups=2),
    "depthwise multiplier": lambda: conv(out=2 * CHANNELS, groups=CHANNELS),
    "ConvTranspose1d": lambda: Line(nn.ConvTranspose1d(CHANNELS, 6, 3, stride=2)),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, 6, 3, padding=1),
    "grouped ConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, 12, 3, groups=2),
    "depthwise ConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, groups=CHANNELS),
    "ConvTranspose3d": lambda: Volume(nn.ConvTranspose3d(CHANNELS, 6, 2)),
    "PReLU": lambda: nn.PReLU(CHANNELS),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
    "LayerScale and buffer": Gain,
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "old weight_norm": lambda: old_weight_norm(conv()),
    "old spectral_norm": lambda: nn.utils.spectral_norm(conv()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("name", MODULES)
def test_masked_channels_go_through_modules(name):
    model, _ = squeezed(MODULES[name]())
    assert model.first.out_channels == (8 if "_norm" in name else 6)


def test_group_norm_loses_whole_groups():
    model, _ = squeezed(nn.Sequential(nn.GroupNorm(4, CHANNELS), nn.ReLU()), gone=[2, 3, 5])
    assert (model.first.out_channels, model.module[0].num_groups) == (6, 3)
    assert model.module[0].num_channels == 6


@pytest.mark.parametrize(
    "layer", [lambda: StandardisedConv(CHANNELS, 8, 1), lambda: old_weight_norm(conv())]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_filters_with_computed_weights_go(layer):
    torch.manual_seed(0)
    model = Sandwich(layer())
    masks = channels_masked(model.module, GONE)
    masks.pop("weight_v", None)  # a direction of length 0 has none
    check_exact(model, torch.randn(2, 3, 6, 6).double(), {"module": masks})
    assert model.head.in_channels == 6


class Lookup(nn.Module):
    """A table, in bags or not, and a head that may be the table itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        table = nn.EmbeddingBag if kind in ("sum", "mean", "max") else nn.Embedding
        self.table = table(9, CHANNELS, **({} if table is nn.Embedding else {"mode": kind}))
        self.mix = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, 9)
        if kind == "tied":
            self.head.weight = self.table.weight
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.table((x.abs() * 3).long().clamp(max=8)))))


@pytest.mark.parametrize("kind", ["plain", "sum", "mean", "max"])
def test_features_of_embeddings_go(kind):
    model = Lookup(kind)
    masks = {"table": channels_masked(model.table, GONE, axis=1)}
    masks["mix"] = channels_masked(model.mix, [0])
    check_exact(model, torch.randn(3, 4), masks)
    assert model.table.weight.shape == (9, 6)
    assert (model.table.embedding_dim, model.mix.in_features, model.head.in_features) == (6, 6, 7)


def test_features_of_a_tied_table_go_from_both_ends():
    model = Lookup("tied")
    masks = {"table": channels_masked(model.table, GONE, axis=1)}
    masks["mix"] = channels_masked(model.mix, GONE)
    check_exact(model, torch.randn(3, 4), masks)
    assert model.table.weight is model.head.weight
    assert model.table.weight.shape == (9, 6)
    assert (model.mix.in_features, model.mix.out_features) == (6, 6)


def test_bilinear_loses_inputs_and_outputs():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 8), nn.Linear(5, 7)
            self.both, self.head = nn.Bilinear(8, 7, 6), nn.Linear(6, 3)
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.both(self.left(x), self.right(x))))

    model = Pair()
    masks = {name: channels_masked(getattr(model, name), [2]) for name in ("left", "both")}
    masks["both"]["weight"][:, :, [0, 4]] = False
    check_exact(model, torch.randn(4, 5), masks)
    assert model.both.weight.shape == (5, 7, 5)
    assert (model.both.in1_features, model.both.in2_features, model.both.out_features) == (7, 5, 5)
    assert (model.left.out_features, model.right.out_features) == (7, 5)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_go_through_a_table_of_relative_positions(heads):
    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.table = nn.Parameter(torch.randn(7, heads))
            index = torch.arange(4)[:, None] - torch.arange(4) + 3
            self.register_buffer("index", index)
            randomise(self.qkv)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).unflatten(-1, (3, -1, 16 // heads)).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
            weights = (q @ k.transpose(-2, -1) * 0.5 + bias.contiguous().unsqueeze(0)).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    model = Window()
    keep = torch.ones(3, heads, 16 // heads, dtype=torch.bool)
    keep[2, 1] = False
    keep = keep.flatten()
    masks = {"qkv": {"weight": keep[:, None].expand(48, 16), "bias": keep}}
    check_exact(model, torch.randn(2, 4, 16), masks)
    assert model.table.shape == (7, heads - 1)
    assert model.qkv.out_features == 48 - 48 // heads


# -- whole models of unusual kinds ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(dtype):
    model = Sandwich(conv()).to(dtype)
    masks = {n: channels_masked(getattr(model, n), GONE) for n in ("first", "norm")}
    check_exact(model, torch.randn(2, 3, 6, 6).to(dtype), masks)
    assert model.first.out_channels == 6


def test_several_inputs_and_named_outputs():
    @dataclass
    class Result:
        logits: Tensor
        extra: dict[str, Tensor]

    class Several(Sandwich):
        def forward(self, x: Tensor, scale: Tensor) -> Result:
            y = self.norm(self.first(x)) * scale
            return Result(self.head(y), {"sum": y.sum((1, 2, 3))})

    model = Several(nn.Identity())
    masks = {n: channels_masked(getattr(model, n), GONE) for n in ("first", "norm")}
    masked = masked_copy(model, masks).eval()
    x, scale = torch.randn(2, 3, 6, 6).double(), torch.randn(1, 1, 6, 6).double()
    ModelSpeedup(model, {"x": x, "scale": scale}, masks).speedup_model()
    assert model.first.out_channels == 6
    small, expected = model.eval()(x, scale), masked(x, scale)
    torch.testing.assert_close(small.logits, expected.logits)
    torch.testing.assert_close(small.extra, expected.extra)


def test_graph_modules_of_fx():
    model = torch.fx.symbolic_trace(Sandwich(conv()))
    masks = {n: channels_masked(getattr(model, n), GONE) for n in ("first", "norm")}
    check_exact(model, torch.randn(2, 3, 6, 6).double(), masks)
    assert model.first.out_channels == 6


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_refused(wrap):
    model = wrap(Sandwich(conv()))
    with pytest.raises(SpeedupError, match=r"around your model; pass model\."):
        ModelSpeedup(model, torch.randn(2, 3, 6, 6), {})


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(SpeedupError, match=r"0: is quantised .* before it is quantised"):
        ModelSpeedup(quantised, torch.randn(2, 4), {})


class Single(nn.Module):
    """One unit of two, by itself: functions take an axis of size 1 for a broadcast."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, _ = self.b(self.a(x)).split(1, -1)
        return self.c(self.function(one))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(-1, 1).expand(-1, 5), lambda x: x * torch.ones(5, dtype=x.dtype),
        lambda x: x.expand(-1, 5), lambda x: torch.cat([x, x.expand(-1, 4)], -1),
        lambda x: x @ torch.ones(1, 5, dtype=x.dtype),
        lambda x: x.squeeze(-1)[:, None].repeat(1, 5),
    ],
)  # fmt: skip
def test_a_part_of_one_unit_is_read(function: Callable[[Tensor], Tensor]) -> None:
    model = Single(function).double()
    keep = torch.tensor([True, False, True, False])
    masks = {"a": {"weight": keep[:, None].expand(4, 3), "bias": keep}}
    check_exact(model, torch.randn(2, 3, dtype=torch.float64), masks)
    assert model.a.out_features == 2


class Aggregated(nn.Module):
    """Features of several branches, weighted branch by branch by a convolution over (N, 3, C)."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, CHANNELS) for _ in range(3))
        self.layer = layer
        self.head = nn.Linear(outputs * CHANNELS, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([branch(x) for branch in self.branches], dim=1)
        return self.head(self.layer(y).flatten(1))


@pytest.mark.parametrize(
    ("layer", "outputs", "left"),
    [
        (nn.Conv1d(3, 1, 1), 1, CHANNELS - len(GONE)),
        (nn.Conv1d(3, 2, 1, bias=False), 2, CHANNELS - len(GONE)),
        (nn.ConvTranspose1d(3, 2, 1), 2, CHANNELS - len(GONE)),
        (nn.Conv1d(3, 2, 3, padding=1), 2, CHANNELS),
        (nn.ConvTranspose1d(3, 1, 1, padding=1, output_padding=0, stride=1), None, CHANNELS),
    ],
)
def test_a_convolution_of_extent_1_leaves_places_as_they_are(layer, outputs, left):
    torch.manual_seed(0)
    model = Aggregated(layer, outputs or 1)
    if outputs is None:
        model.head = nn.Linear(CHANNELS - 2, 2)
    randomise(model)
    masks = {f"branches.{i}": channels_masked(model.branches[i], GONE) for i in range(3)}
    check_exact(model.double(), torch.randn(2, 5).double(), masks)
    assert model.branches[0].out_features == left
