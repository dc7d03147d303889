"""Allocations beside normal and global: balanced, N:M, blocks, heads, isomorphic."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from oracle import check_exact, randomise
from test_attention import SelfAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from compress import L1FilterPruner, L2FilterPruner, LevelPruner, Masks, ModelSpeedup
from compress.errors import ConfigError, MaskError
from compress.pruners.patterns import (
    as_matrix,
    from_matrix,
    inputs_first,
    join_blocks,
    split_blocks,
)

HALF = [{"sparsity": 0.5, "op_types": ["default"]}]
TOTAL = [{"total_sparsity": 0.5, "op_types": ["default"]}]

LAYERS = [
    nn.Linear(8, 4),
    nn.Conv2d(8, 4, 3),
    nn.Conv2d(16, 8, (1, 3), groups=4),
    nn.ConvTranspose2d(8, 4, 3),
    nn.ConvTranspose1d(16, 8, 3, groups=4),
    nn.Embedding(4, 8),
    nn.Bilinear(8, 3, 4),
]


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data = torch.tensor(weight)
    return layer


def mask_of(pruner: Any, name: str = "") -> list[list[int]]:
    return pruner.calc_masks()[name]["weight"].int().tolist()


# -- the matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_the_matrix_of_a_weight_and_back(layer: nn.Module) -> None:
    torch.manual_seed(0)
    weight, where = layer.weight.detach(), inputs_first(layer)
    matrix = as_matrix(weight, *where)
    assert torch.equal(from_matrix(matrix, weight, *where), weight)
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.ConvTranspose1d)):
        outputs, groups = layer.out_channels, layer.groups
        assert matrix.shape == (outputs, weight.numel() // outputs)
        inputs = layer.in_channels // groups
        own = weight if not where[0] else weight.reshape(groups, inputs, outputs // groups, -1)
        last = own[-1, :, ..., -1] if not where[0] else own[-1, :, -1, -1]
        last = last.reshape(inputs, -1)[:, -1]
        assert torch.equal(matrix[-1, -inputs:], last)  # the neighbours at the end are inputs


def test_blocks_of_a_matrix_and_back() -> None:
    matrix = torch.arange(24).reshape(4, 6)
    blocks = split_blocks(matrix, 2, 3)
    assert blocks.tolist()[1] == [3, 4, 5, 9, 10, 11]
    assert torch.equal(join_blocks(blocks, 4, 2, 3), matrix)


# -- single weights ------------------------------------------------------------------------


def test_balanced_rows_lose_the_same_number() -> None:
    model = linear([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0], [40.0, 30.0, 20.0, 10.0]])
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]
    assert mask_of(LevelPruner(model, HALF, mode="balanced")) == expected
    assert mask_of(LevelPruner(model, HALF)) != expected


def test_balanced_regions() -> None:
    model = linear([[1.0, 2.0, 9.0, 9.0], [3.0, 4.0, 9.0, 8.0]])
    pruner = LevelPruner(model, HALF, mode="balanced", balance=(2, 2))
    assert mask_of(pruner) == [[0, 0, 0, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_n_of_m_is_exact_in_every_run_of_inputs(layer: nn.Module, n: int, m: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": deepcopy(layer)})
    model.layer.weight.data = torch.randint(0, 3, layer.weight.shape).float()  # many are equal
    config_list = [{"sparsity": 1 - n / m, "op_types": ["default"]}]
    pruner = LevelPruner(model, config_list, mode="balanced", balance=f"{n}:{m}")
    mask = pruner.calc_masks()["layer"]["weight"]
    kept = as_matrix(mask, *inputs_first(layer)).reshape(-1, m)
    assert kept.sum(1).tolist() == [n] * len(kept)
    values = as_matrix(model.layer.weight.detach(), *inputs_first(layer)).reshape(-1, m)
    lowest_kept = values.masked_fill(~kept, 9).amin(1)
    assert bool((values.masked_fill(kept, -9).amax(1) <= lowest_kept).all())


def test_n_of_m_where_the_sparsity_has_no_exact_number() -> None:
    model = nn.Linear(6, 2)
    config_list = [{"sparsity": 0.3333333, "op_types": ["Linear"]}]
    pruner = LevelPruner(model, config_list, mode="balanced", balance="2:3")
    assert pruner.calc_masks()[""]["weight"].reshape(-1, 3).sum(1).tolist() == [2] * 4


def test_an_nm_model_trains_and_keeps_its_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = LevelPruner(model, HALF, mode="balanced", balance="2:4")
    model, _ = pruner.compress()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.rand(5, 8)).square().sum().backward()
        optimizer.step()
    pruner.unwrap_model()
    for layer in (model[0], model[2]):
        assert (layer.weight.reshape(-1, 4) != 0).sum(1).tolist() == [2] * (
            layer.weight.numel() // 4
        )


def test_blocks_go_whole_and_the_weakest_first() -> None:
    weight = torch.ones(4, 4)
    weight[:2, 2:], weight[2:, :2] = 0.1, 5.0
    weight[2, 2] = 100.0  # lifts the mean of its block
    model = linear(weight.tolist())
    pruner = LevelPruner(model, HALF, block_size=(2, 2))
    assert mask_of(pruner) == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    balanced = LevelPruner(model, HALF, block_size=(2, 2), mode="balanced")
    assert mask_of(balanced) == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("mode", ["normal", "global", "balanced"])
def test_the_number_of_masked_blocks_is_exact(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 8, 2))
    config_list = TOTAL if mode == "global" else HALF
    masks = LevelPruner(model, config_list, block_size=(4, 4), mode=mode).calc_masks()
    assert masks.sparsity == 0.5
    for name, each in masks.items():
        where = inputs_first(model.get_submodule(name))
        blocks = split_blocks(as_matrix(each["weight"], *where), 4, 4)
        assert set(blocks.sum(1).tolist()) <= {0, 16}


def test_masks_from_before_count_in_a_pattern() -> None:
    model = linear([[9.0, 8.0, 7.0, 6.0]])
    Masks({"": {"weight": torch.tensor([[0, 1, 1, 1]])}}).apply(model)
    pruner = LevelPruner(model, HALF, mode="balanced", balance="2:4")
    assert mask_of(pruner) == [[0, 1, 1, 0]]


# -- filters -------------------------------------------------------------------------------


def test_neighbouring_filters_go_together() -> None:
    model = linear([[1.0], [9.0], [4.0], [4.0], [3.0], [3.0], [8.0], [8.0]])
    masks = L1FilterPruner(model, HALF, block_size=2).calc_masks()
    assert masks[""]["bias"].int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    least = L1FilterPruner(model, HALF, block_size=2, min_channels=5).calc_masks()
    assert int(least[""]["bias"].sum()) == 6
    rounded = L1FilterPruner(model, HALF, block_size=2, round_to=3).calc_masks()
    assert int(rounded[""]["bias"].sum()) == 6


def test_blocks_of_filters_in_one_ranking_count_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1))
    pruner = L1FilterPruner(model, TOTAL, mode="global", block_size=4)
    masks = pruner.calc_masks()
    total = sum(layer.weight.numel() for layer in model)
    gone = sum(int((~each["weight"]).sum()) for each in masks.values())
    assert abs(gone - total / 2) <= 4 * 8 * 9 / 2  # half of the largest block
    for each in masks.values():
        assert set(each["bias"].reshape(-1, 4).sum(1).tolist()) <= {0, 4}


class Residual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv2(self.conv1(x).relu())
        return self.head(x.mean((2, 3)))


ALL_BUT_HEAD = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


def test_coupled_layers_lose_whole_blocks() -> None:
    torch.manual_seed(0)
    model = Residual()
    randomise(model)
    x = torch.rand(2, 3, 8, 8)
    pruner = L2FilterPruner(
        model, ALL_BUT_HEAD, mode="dependency_aware", dummy_input=x, block_size=4
    )
    masks = pruner.calc_masks()
    for name in ("stem", "conv1", "conv2"):
        assert sorted(masks[name]["bias"].reshape(-1, 4).sum(1).tolist()) == [0, 0, 4, 4]
    assert torch.equal(masks["stem"]["bias"], masks["conv2"]["bias"])
    check_exact(model.eval(), x, {k: dict(v) for k, v in masks.items()})
    assert model.stem.out_channels == model.conv1.out_channels == 8


# -- heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "matmul", "einsum"])
@pytest.mark.parametrize("heads", ["auto", None])
def test_whole_heads_go_where_asked(fused: bool, kernel: str, heads: str | None) -> None:
    torch.manual_seed(0)
    model = SelfAttention(fused, kernel).double()
    with torch.no_grad():  # heads 1 and 2 are weak in all, and a few dims of heads 0 and 3
        for layer in [model.qkv] if model.qkv else [model.q, model.k, model.v]:
            layer.weight.view(-1, 4, 8, 24)[:, 1:3] *= 0.5
            layer.weight.view(-1, 4, 8, 24)[:, :, ::3] *= 0.2
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    names = ["qkv"] if fused else ["q", "k", "v"]
    pruner = L2FilterPruner(
        model, [{"sparsity": 0.5, "op_names": names}], mode="dependency_aware", dummy_input=x,
        heads=heads,
    )  # fmt: skip
    _, masks = pruner.compress()
    for name in names:
        kept = masks[name]["bias"].reshape(-1, 4, 8).sum(2)
        whole = [8, 0, 0, 8] if heads else [4, 4, 4, 4]
        assert kept.tolist() == [whole] * len(kept)
    expected = model(x)
    ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(model(x), expected)
    assert model.head_dim == (8 if heads else 4)
    assert model.out.in_features == 16


def test_heads_by_hand_without_a_run() -> None:
    torch.manual_seed(0)
    model = SelfAttention(False, "sdpa").double()
    with torch.no_grad():
        model.v.weight[8:16] *= 0.1
    config_list = [{"sparsity": 0.25, "op_names": ["v"]}]
    _, masks = L1FilterPruner(model, config_list, heads={"v": 4}).compress()
    assert masks["v"]["bias"].reshape(4, 8).sum(1).tolist() == [8, 0, 8, 8]
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    expected = model(x)
    ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(model(x), expected)
    assert model.q.out_features == 24  # without its values, nothing reads the head


OLD = torch.__version__.startswith("2.4")


class SharedKeys(nn.Module):
    """Four heads of queries, two of keys and values: as a flag of the kernel, or repeated."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.flag = nn.Linear(32, 16), flag

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, 8)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.flag:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        else:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
            y = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(True, marks=pytest.mark.skipif(OLD, reason="enable_gqa is of torch 2.5")),
        False,
    ],
)
def test_heads_that_share_keys_go_with_them(flag: bool) -> None:
    torch.manual_seed(0)
    model, x = SharedKeys(flag).double(), torch.rand(2, 5, 16, dtype=torch.float64)
    config_list = [{"sparsity": 0.5, "op_names": ["q", "k", "v"]}]
    pruner = L2FilterPruner(
        model, config_list, mode="dependency_aware", dummy_input=x, heads="auto"
    )
    _, masks = pruner.compress()
    expected = model(x)
    ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(model(x), expected)
    assert (model.q.out_features, model.k.out_features, model.v.out_features) == (16, 8, 8)


# -- isomorphic ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(False, "sdpa")
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.down(self.up(x).relu())


def planted() -> nn.Sequential:
    """Attention with weights a hundredth of the MLPs', and a second block weaker than the first."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    with torch.no_grad():
        for index, block in enumerate(model):
            for name, parameter in block.named_parameters():
                parameter.normal_()
                parameter.mul_(0.01 if "attention" in name else 1.0)
                parameter.mul_(0.7 if index else 1.0)
    return model


INNER = [{"total_sparsity": 0.5, "op_partial_names": ["attention.", "up"]}]


def lost(masks: Masks, model: nn.Module, part: str) -> list[float]:
    return [
        1 - float(masks[name]["bias"].double().mean()) if name in masks else 0.0
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(part)
    ]


def test_isomorphic_compares_only_what_is_alike() -> None:
    model, x = planted(), torch.rand(2, 5, 24)
    config_list = [*INNER, {"exclude": True, "op_partial_names": [".out"]}]
    options: dict[str, Any] = {"dummy_input": x}
    whole = L2FilterPruner(model, config_list, mode="global").calc_masks()
    alike = L2FilterPruner(model, config_list, mode="isomorphic", **options).calc_masks()
    # One ranking empties attention first and leaves the MLPs alone; by structure each loses half,
    assert sum(lost(whole, model, ".q")) / 2 > 0.6 and lost(whole, model, ".up") == [0, 0]
    for part in (".q", ".k", ".v", ".up"):
        assert sum(lost(alike, model, part)) / 2 == pytest.approx(0.5, abs=0.04)
    # but the weaker block more of it, which a ratio for every layer cannot say.
    first, second = lost(alike, model, ".up")
    assert first < 0.35 and second > 0.65


def test_isomorphic_is_exact_after_the_speedup() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual2(8), Residual2(8))
    randomise(model)
    x = torch.rand(2, 3, 8, 8)
    config_list = [{"total_sparsity": 0.5, "op_partial_names": ["inner"]}]
    pruner = L2FilterPruner(model, config_list, mode="isomorphic", dummy_input=x)
    masks = pruner.calc_masks()
    kept = [int(masks[f"{i}.inner"]["bias"].sum()) if f"{i}.inner" in masks else 12 for i in (1, 2)]
    assert sum(kept) == 12
    check_exact(model.eval(), x, {k: dict(v) for k, v in masks.items()})


class Residual2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.norm(self.inner(x)).relu())


# -- shared weights ------------------------------------------------------------------------


class Tied(nn.Module):
    """A layer used twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.twice = (nn.Linear(8, 8) for _ in range(4))
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)).relu()).relu()
        return self.head(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        (LevelPruner, {}),
        (LevelPruner, {"mode": "global"}),
        (LevelPruner, {"mode": "balanced"}),
        (LevelPruner, {"mode": "balanced", "balance": "2:4"}),
        (LevelPruner, {"block_size": (4, 4)}),
        (L1FilterPruner, {}),
        (L1FilterPruner, {"mode": "global"}),
        (L1FilterPruner, {"block_size": 4}),
        (L1FilterPruner, {"heads": {"a": 2, "twice": 2}}),
        (L1FilterPruner, {"mode": "dependency_aware"}),
        (L1FilterPruner, {"mode": "dependency_aware", "block_size": 2}),
        (L1FilterPruner, {"mode": "isomorphic"}),
    ],
)
def test_a_shared_weight_is_one_unit_in_all_modes(pruner: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Tied().double(), torch.rand(3, 8, dtype=torch.float64)
    total = options.get("mode") in ("global", "isomorphic")
    key = "total_sparsity" if total else "sparsity"
    if options.get("mode") in ("dependency_aware", "isomorphic"):
        options = {**options, "dummy_input": x}
    config_list = [{key: 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["head"]}]
    _, masks = pruner(model, config_list, **options).compress()
    assert torch.equal(masks["a"]["weight"], masks["b"]["weight"])
    masked = sum(int((~masks[name]["weight"]).sum()) for name in ("a", "stem", "twice"))
    assert masked == 96  # a and b count once
    raw = [m.parametrizations.weight.original for m in (model.a, model.b)]
    assert raw[0] is raw[1] and parametrize.is_parametrized(model.twice)
    expected = model(x)
    small = ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(small(x), expected)
    assert small.a.weight is small.b.weight


# -- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruner", "options", "message"),
    [
        (LevelPruner, {"balance": "2:4"}, "balance: got '2:4'; it is an option of mode='balanced'"),
        (LevelPruner, {"mode": "balanced", "balance": "4:2"}, "expected 'n:m' with n < m"),
        (LevelPruner, {"mode": "balanced", "balance": 4}, "balance: got 4; expected 'n:m'"),
        (
            LevelPruner,
            {"mode": "balanced", "balance": "1:4"},
            r"'0': got sparsity 0\.5; balance masks 0\.75",
        ),
        (
            LevelPruner,
            {"mode": "balanced", "balance": "3:6"},
            "'0': its 8 inputs are no multiple of 6, which balance asks for; exclude it",
        ),
        (LevelPruner, {"block_size": 4}, r"block_size: got 4; expected \(outputs, inputs\)"),
        (
            LevelPruner,
            {"block_size": (3, 4)},
            r"'0': its 4 outputs are no multiple of 3, of block_size=\(3, 4\); exclude it",
        ),
        (L1FilterPruner, {"block_size": 0}, "block_size: got 0; expected a whole number"),
        (L1FilterPruner, {"block_size": 3}, "'0': its 4 filters are no multiple of block_size=3"),
        (L1FilterPruner, {"heads": 4}, "heads: got 4; expected 'auto' or"),
        (L1FilterPruner, {"heads": {"1": 2}}, "heads: got '1', no layer of the config_list"),
        (L1FilterPruner, {"heads": {"0": 3}}, "got 3; expected a divisor of 4, its number"),
        (L1FilterPruner, {"heads": {"0": 0}}, r"heads\['0'\]: got 0; expected a whole number"),
        (
            L1FilterPruner,
            {"heads": {"0": 2}, "mode": "dependency_aware", "dummy_input": torch.rand(1, 8)},
            "mode 'dependency_aware' finds them by itself; pass heads='auto'",
        ),
        (L1FilterPruner, {"heads": "auto"}, "heads='auto' finds the heads by running the model"),
        (L1FilterPruner, {"mode": "balanced"}, "L1FilterPruner has normal, global"),
        (L1FilterPruner, {"mode": "isomorphic"}, "mode 'isomorphic' runs the model"),
        (
            L1FilterPruner,
            {"mode": "isomorphic", "dummy_input": torch.rand(1, 8)},
            "mode='isomorphic' is one ranking under a total_sparsity",
        ),
    ],
)
def test_refused_before_anything_is_touched(pruner: Any, options: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ConfigError, match=message):
        pruner(model, HALF, **options)


def test_balanced_takes_no_total_and_names_layers_with_nan() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ConfigError, match="mode='balanced' takes every layer by itself"):
        LevelPruner(model, TOTAL, mode="balanced")
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"'0' \(1 of 32 units\)"):
        LevelPruner(model, HALF, mode="balanced").calc_masks()
