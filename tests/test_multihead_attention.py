"""``nn.MultiheadAttention`` and torch's transformers: heads, head dims and hidden units go."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from oracle import MaskDict, check_exact, randomise
from torch import Tensor, nn

from compress import ModelSpeedup
from compress.errors import VerificationError
from compress.graph.channels import ChannelGraph
from compress.modules import MultiheadAttention, standing_in

WIDTH, HEADS = 16, 4

# -- the stand-in computes what torch's module does ----------------------------------------


def drawn_attention(draw: random.Random) -> tuple[nn.MultiheadAttention, tuple[object, ...]]:
    """A module and the arguments of a call, each option drawn."""
    yes = [draw.random() < 0.5 for _ in range(10)]
    batch_first, bias, extra, zero, weights, mean, cross, batched, other, padded = yes
    width = 5 if cross and other else 8
    module = nn.MultiheadAttention(
        8, 2, bias=bias, kdim=width, vdim=width, add_bias_kv=extra, add_zero_attn=zero,
        batch_first=batch_first,
    ).double().eval()  # fmt: skip
    randomise(module)
    batch, places, keys = 3, 4, 5 if cross else 4

    def drawn(size: int, features: int) -> Tensor:
        lead = ((batch, size) if batch_first else (size, batch)) if batched else (size,)
        return torch.randn(*lead, features).double()

    query = drawn(places, 8)
    key, value = (drawn(keys, width), drawn(keys, width)) if cross else (query, query)
    mask = draw.choice([
        None,
        torch.rand(places, keys) > 0.7,
        torch.randn((batch if batched else 1) * 2, places, keys).double(),
    ])  # fmt: skip
    padding = None
    if padded:
        boolean = mask is None or mask.dtype == torch.bool
        padding = torch.rand(batch, keys) > 0.8 if boolean else torch.randn(batch, keys).double()
        padding = padding if batched else padding[0]
    causal = mask is not None and draw.random() < 0.3
    return module, (query, key, value, padding, weights, mask, mean, causal)


@pytest.mark.parametrize("seed", range(40))
def test_the_stand_in_computes_the_same(seed):
    torch.manual_seed(seed)
    module, arguments = drawn_attention(random.Random(seed))
    before = dict(vars(module))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it gives 0, not NaN, where all is masked
    try:
        expected = module(*arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    with standing_in([module]):
        assert type(module) is MultiheadAttention
        got = module(*arguments)
    assert type(module) is nn.MultiheadAttention
    assert vars(module) == before
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_the_hint_of_causality_needs_a_mask():
    module, x = nn.MultiheadAttention(8, 2), torch.rand(3, 1, 8)
    with standing_in([module]), pytest.raises(RuntimeError, match="pass the attn_mask"):
        module(x, x, x, is_causal=True)


# -- heads and head dims -------------------------------------------------------------------


class Block(nn.Module):
    """Attention of an input to itself, or to a context, with a residual."""

    def __init__(self, cross: bool, need_weights: bool = True, **options: object) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.context = nn.Linear(WIDTH, options.get("kdim", WIDTH)) if cross else None
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        context = x if self.context is None else self.context(x)
        return x + self.attention(x, context, context, need_weights=self.need_weights)[0]


def heads_masked(
    module: nn.MultiheadAttention, heads: list[int], dims: tuple[int, ...] = (), parts: str = "qkv"
) -> dict[str, Tensor]:
    """Masks of heads, and of dims in every head, in some of queries, keys and values."""
    keep = torch.ones(HEADS, WIDTH // HEADS, dtype=torch.bool)
    keep[heads] = False
    keep[:, list(dims)] = False
    every = torch.ones_like(keep)
    rows = {part: (keep if part in parts else every).flatten() for part in "qkv"}
    rows["in"] = torch.cat([rows[part] for part in "qkv"])
    masks = {}
    for name, parameter in module.named_parameters(recurse=False):
        axis = parameter.dim() - 1 if name.startswith("bias_") else 0
        kept = rows[name.partition("_")[0] if axis == 0 else name[-1]]
        shape = [1] * parameter.dim()
        shape[axis] = -1
        masks[name] = kept.view(shape).expand(parameter.shape).clone()
    return masks


def sizes(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    return module.num_heads, module.head_dim, module.out_proj.in_features


KINDS = [(False, {}), (True, {}), (True, {"kdim": 12, "vdim": 12})]
OPTIONS = [
    {},
    {"need_weights": False},
    {"batch_first": True, "bias": False},
    {"add_bias_kv": True, "need_weights": False},
    {"add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("cross", "widths"), KINDS, ids=["self", "cross", "widths"])
def test_heads_and_head_dims_go(cross, widths, options):
    x = torch.randn(3, 5, WIDTH).double()
    model = Block(cross, **widths, **options)
    check_exact(model, x, {"attention": heads_masked(model.attention, [1], parts="v")})
    assert sizes(model.attention) == (3, 4, 12)
    model = Block(cross, **widths, **options)
    check_exact(model, x, {"attention": heads_masked(model.attention, [0, 3], dims=(2,))})
    assert sizes(model.attention) == (2, 3, 6)
    model = Block(cross, **widths, **options)
    unread = torch.ones(WIDTH, WIDTH, dtype=torch.bool)
    unread[:, 4:8] = False
    speedup = check_exact(model, x, {"attention.out_proj": {"weight": unread}})
    assert sizes(model.attention) == (3, 4, 12)
    assert type(model.attention) is MultiheadAttention
    assert [each.module for each in speedup.plan.replacements] == ["attention"]
    assert isinstance(model.attention, nn.MultiheadAttention)


def test_mean_weights_that_are_used_keep_the_heads():
    class Shown(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x)

    model = Shown(False)
    masks = {"attention": heads_masked(model.attention, [1])}
    speedup = check_exact(model, torch.randn(3, 5, WIDTH).double(), masks)
    assert model.attention.num_heads == HEADS
    assert "mean works over" in next(iter(speedup.report.layers[0].kept))


def test_a_small_model_is_cut_again_copied_and_pickled():
    model, x = Block(False), torch.randn(3, 5, WIDTH).double()
    check_exact(model, x, {"attention": heads_masked(model.attention, [1])})
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x), model(x))
    unread = torch.ones(WIDTH, 12, dtype=torch.bool)
    unread[:, :4] = False
    check_exact(model, x, {"attention.out_proj": {"weight": unread}})
    assert sizes(model.attention) == (2, 4, 8)
    assert model.attention.scale == 0.5


def test_a_cut_that_is_undone_gives_the_class_back():
    class Restless(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) + type(self).calls

    model = Restless(False)
    before = copy.deepcopy(vars(model.attention))
    masks: MaskDict = {"attention": heads_masked(model.attention, [1])}
    with pytest.raises(VerificationError):
        ModelSpeedup(model, torch.randn(3, 5, WIDTH).double(), masks).speedup_model()
    assert type(model.attention) is nn.MultiheadAttention
    assert vars(model.attention).keys() == before.keys()
    assert sizes(model.attention) == (HEADS, 4, WIDTH)
    assert model.attention._qkv_same_embed_dim


def test_a_subclass_of_the_users_own_stays_as_it_is():
    class Own(nn.MultiheadAttention):
        pass

    model = Block(False)
    model.attention = Own(WIDTH, HEADS).double()
    masks = {"attention": heads_masked(model.attention, [1])}
    check_exact(model, torch.randn(3, 5, WIDTH).double(), masks)
    assert type(model.attention) is Own
    assert model.attention.num_heads == HEADS


def test_tracing_leaves_the_modules_as_they_were():
    model = Block(False)
    graph = ChannelGraph(model, torch.randn(3, 5, WIDTH).double())
    assert "multi_head_attention_forward" not in {n.meta["name"] for n in graph.trace.nodes}
    assert type(model.attention) is nn.MultiheadAttention
    assert "scale" not in vars(model.attention)


# -- torch's transformers ------------------------------------------------------------------


def transformer_masks(model: nn.Module) -> MaskDict:
    """Two heads of every attention, six hidden units of every feed-forward block."""
    masks = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            masks[path] = heads_masked(module, [1, 2])
        if path.endswith("linear1"):
            keep = torch.arange(module.out_features) >= 6
            masks[path] = {"weight": keep[:, None].expand(module.weight.shape)}
            if module.bias is not None:
                masks[path]["bias"] = keep
    return masks


class Encoder(nn.Module):
    def __init__(self, padded: bool, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, **options)
        nested = not options.get("norm_first", False) and options.get("bias", True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.padded = padded
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[-1:, -2:] = True
        return self.encoder(x, src_key_padding_mask=padding if self.padded else None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str
)
def test_encoders_lose_heads_and_hidden_units(options, padded):
    model = Encoder(padded, **options)
    check_exact(model, torch.randn(3, 5, WIDTH).double(), transformer_masks(model))
    for layer in model.encoder.layers:
        assert sizes(layer.self_attn) == (2, 4, 8)
        assert layer.linear1.out_features == layer.linear2.in_features == 18
        assert layer.norm1.normalized_shape == (WIDTH,)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cut", [0, 1])
def test_layers_that_are_not_cut_keep_their_fast_kernel(cut):
    model = Encoder(True)
    path = f"encoder.layers.{cut}.self_attn"
    check_exact(model, torch.randn(3, 5, WIDTH).double(), {path: transformer_masks(model)[path]})
    assert model.encoder.layers[cut].self_attn.num_heads == 2
    assert type(model.encoder.layers[1 - cut].self_attn) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_and_decoder(batch_first):
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Transformer(WIDTH, HEADS, 1, 1, 24, batch_first=batch_first)
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            places = x.shape[1 if batch_first else 0]
            mask = self.body.generate_square_subsequent_mask(places)
            return self.body(x, x * 0.5, tgt_mask=mask, tgt_is_causal=True)

    model = Translator()
    check_exact(model, torch.randn(3, 5, WIDTH), transformer_masks(model))
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [sizes(m) for m in attentions] == [(2, 4, 8)] * 3
