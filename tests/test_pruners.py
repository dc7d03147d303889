"""The one-shot pruners, from config_list to a model that computes with masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from compress import ModelSpeedup
from compress.errors import CompressError, ConfigError, MaskError
from compress.masks import Masks, applied_masks, suspend_masks
from compress.pruners import (
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    Pruner,
    RandomFilterPruner,
)
from compress.pruners.dependency import Trial

HALF = [{"sparsity": 0.5, "op_types": ["default"]}]
FILTER_PRUNERS = (L1FilterPruner, L2FilterPruner, FPGMPruner, RandomFilterPruner)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 49, 5),
    )


def linear(*rows: list[float]) -> nn.Linear:
    """A layer with these filters and a bias of ones."""
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight.data = torch.tensor(rows)
    layer.bias.data = torch.ones(len(rows))
    return layer


def kept(masks: Masks, layer: str = "") -> list[int]:
    """Which filters of a layer of one kind stay, as the mask of the bias says."""
    return masks[layer]["bias"].int().tolist()


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- golden masks


@pytest.mark.parametrize(
    ("pruner", "rows", "expected"),
    [
        (L1FilterPruner, [[3.0, 3.0], [0.0, 5.0], [1.0, 1.0], [0.0, 0.0]], [1, 1, 0, 0]),
        (L2FilterPruner, [[3.0, 3.0], [0.0, 5.0], [1.0, 1.0], [4.0, 2.0]], [0, 1, 0, 1]),
        # Duplicates are replaceable, however large; the small one is not.
        (FPGMPruner, [[0.0, 1.0], [9.0, 9.0], [9.0, 9.0], [-9.0, 9.0]], [1, 0, 0, 1]),
        (L1FilterPruner, [[1.0], [1.0], [1.0], [1.0], [1.0]], [0, 0, 1, 1, 1]),
        (L1FilterPruner, [[0.0], [0.0]], [0, 1]),
        (L1FilterPruner, [[2.0]], [1]),
    ],
)
def test_golden(pruner: type[Pruner], rows: list[list[float]], expected: list[int]) -> None:
    model = linear(*rows)
    _, masks = pruner(model, HALF).compress()
    assert kept(masks) == expected
    assert masks[""]["weight"].int().tolist() == [[k] * len(rows[0]) for k in expected]
    assert model(torch.ones(1, len(rows[0])))[0].ne(0).tolist() == [bool(k) for k in expected]


def test_level_golden_leaves_the_bias() -> None:
    model = linear([1.0, -2.0], [3.0, -1.0])
    _, masks = LevelPruner(model, HALF).compress()
    assert masks == Masks({"": {"weight": torch.tensor([[0, 1], [1, 0]])}})


def test_filter_pruners_take_embeddings_that_are_named() -> None:
    model = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 2))
    assert LevelPruner(model, HALF).calc_masks().sparsity_per_layer == {"0": 0.5, "1": 0.5}
    assert list(L1FilterPruner(model, HALF).calc_masks()) == ["1"]
    by_pattern = [{"sparsity": 0.5, "op_names_re": "."}]
    assert list(L1FilterPruner(model, by_pattern).calc_masks()) == ["1"]
    for entry in ({"op_names": ["0"]}, {"op_types": ["Embedding"]}):
        masks = L1FilterPruner(model, [{"sparsity": 0.5, **entry}]).calc_masks()
        assert masks["0"]["weight"].sum(0).tolist().count(0) == 3  # features, not entries
    with pytest.raises(
        ConfigError, match=r"masks whole filters of Conv1d.*BatchNorm1d '0' has none"
    ):
        L1FilterPruner(nn.Sequential(nn.BatchNorm1d(3)), [{"sparsity": 0.5, "op_names": ["0"]}])


class TinyLanguageModel(nn.Module):
    """Embeddings, one attention block with rotated queries and keys, and a head tied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norms = nn.ModuleList(nn.RMSNorm(16, eps=1e-3) for _ in range(3))
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(32, 16)
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y, shape = self.norms[0](x), (*tokens.shape, -1, 8)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (torch.cat([t[..., 4:], -t[..., :4]], -1) for t in (q, k))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))  # two heads of queries share one
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x))


def test_a_language_model_loses_width_heads_and_hidden_units() -> None:
    torch.manual_seed(0)
    model = TinyLanguageModel().double().eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    tokens = torch.randint(0, 11, (2, 7))
    config_list = [
        {"sparsity": 0.5, "op_types": ["default", "Embedding"]},
        {"exclude": True, "op_names": ["head"]},
    ]
    pruner = L1FilterPruner(model, config_list, mode="dependency_aware", dummy_input=tokens)
    _, masks = pruner.compress()
    expected = model(tokens)
    speedup = ModelSpeedup(model, tokens, masks)
    speedup.speedup_model()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)
    assert all(not layer.kept for layer in speedup.report.layers)
    assert model.embed.weight.shape == (11, 8)
    assert model.head.weight is model.embed.weight
    assert model.q.weight.shape == (16, 8)  # two of four heads, which share one of two key heads
    assert model.k.weight.shape == model.v.weight.shape == (8, 8)
    assert model.down.weight.shape == (8, 10)


def test_a_tied_head_says_that_the_embedding_decides_about_it() -> None:
    tokens = torch.randint(0, 11, (2, 7))
    config_list = [{"sparsity": 0.5, "op_names": ["head", "gate"]}]
    options = {"mode": "dependency_aware", "dummy_input": tokens}
    with pytest.warns(UserWarning) as caught:
        L1FilterPruner(TinyLanguageModel(), config_list, **options).calc_masks()
    told = [str(each.message) for each in caught]
    assert any("'head': it shares its weight with 'embed', which decides" in each for each in told)


@pytest.mark.parametrize("pruner", FILTER_PRUNERS)
def test_every_kind_of_layer_loses_half_of_its_outputs(pruner: type[Pruner]) -> None:
    model = net()
    _, masks = pruner(model, HALF).compress()
    assert [int(masks[name]["bias"].sum()) for name in masks] == [3, 2, 3]
    silent = model[3](torch.rand(2, 6, 6, 6)).abs().sum((0, 2, 3)) == 0
    assert torch.equal(~silent, masks["3"]["bias"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.integers(1, 4))
def test_counts_are_exact(units: int, percent: int, min_channels: int) -> None:
    model = nn.Linear(2, units)
    config_list = [{"sparsity": percent / 100, "op_types": ["Linear"]}]
    masks = L1FilterPruner(model, config_list, min_channels=min_channels).calc_masks()
    assert sum(kept(masks)) == max(units - units * percent // 100, min(min_channels, units))


def test_round_to() -> None:
    masks = L1FilterPruner(nn.Linear(2, 20), HALF, round_to=8).calc_masks()
    assert sum(kept(masks)) == 16


# --- modes


def test_global_ranks_all_layers_together() -> None:
    model = nn.Sequential(linear([1.0], [2.0], [3.0]), linear([9.0, 9.0, 9.0], [8.0, 8.0, 8.0]))
    config_list = [{"total_sparsity": 2 / 9, "op_types": ["Linear"]}]
    masks = L1FilterPruner(model, config_list, mode="global").calc_masks()
    assert kept(masks, "0") == [0, 0, 1]
    assert kept(masks, "1") == [1, 1]
    config_list[0]["max_sparsity_per_layer"] = {"0": 0.4}
    with pytest.raises(ConfigError, match=r"total_sparsity 0\.9 .*: at most 0\.4444 can be masked"):
        L1FilterPruner(
            model, [{**config_list[0], "total_sparsity": 0.9}], mode="global"
        ).calc_masks()


def test_global_level_is_exact_and_mixes_with_per_layer_entries() -> None:
    model = net()
    config_list: list[dict[str, Any]] = [
        {"total_sparsity": 0.4, "op_types": ["default"]},
        {"sparsity": 0.9, "op_types": ["Linear"]},
    ]
    masks = LevelPruner(model, config_list, mode="global").calc_masks()
    convs = Masks({"0": masks["0"], "3": masks["3"]})
    total = model[0].weight.numel() + model[3].weight.numel()
    assert convs.sparsity == pytest.approx(0.4, abs=0.5 / total)
    assert masks.sparsity_per_layer["5"] == 882 / 980


@pytest.mark.parametrize(
    ("options", "config_list", "expected"),
    [
        ({"mode": "local"}, HALF, "mode: got 'local'; L1FilterPruner has normal, global, depend"),
        ({"mode": "global"}, HALF, "no entry of the config_list that selects a layer has one"),
        (
            {},
            [{"total_sparsity": 0.5, "op_types": ["default"]}],
            "config_list[0]: total_sparsity is one ranking over several layers",
        ),
        ({"dependency_aware": True}, HALF, "dummy_input: got None; mode 'dependency_aware' runs"),
        ({"mode": "global", "dependency_aware": True}, HALF, "choose one"),
        ({"round_to": 0}, HALF, "round_to: got 0; expected a whole number ≥ 1"),
        ({"min_channels": 1.5}, HALF, "min_channels: got 1.5; expected a whole number ≥ 1"),
        ({"round_to": True}, HALF, "round_to: got True"),
    ],
)
def test_wrong_arguments(
    options: dict[str, Any], config_list: list[dict[str, Any]], expected: str
) -> None:
    model = net()
    with pytest.raises(ConfigError) as caught:
        L1FilterPruner(model, config_list, **options)
    assert expected in str(caught.value)
    assert not parametrize.is_parametrized(model[0])


def test_no_model() -> None:
    with pytest.raises(ConfigError, match=r"model: got int; expected a torch\.nn\.Module"):
        L1FilterPruner(3, HALF)  # type: ignore[arg-type]


# --- the life of a masked model


@pytest.mark.parametrize("pruner", [*FILTER_PRUNERS, LevelPruner])
def test_nothing_is_touched_until_compress(pruner: type[Pruner]) -> None:
    model = net()
    before, rng = state(model), torch.get_rng_state()
    one = pruner(model, HALF)
    planned = one.calc_masks()
    assert_same(model.state_dict(), before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert one.masks == Masks({})
    returned, masks = one.compress()
    assert returned is model
    assert masks == planned == one.masks == applied_masks(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training


def test_the_masks_returned_are_the_users_own() -> None:
    model = net()
    pruner = L1FilterPruner(model, HALF)
    _, masks = pruner.compress()
    copied = Masks(masks)
    masks["0"]["weight"].zero_()
    assert pruner.masks == copied == applied_masks(model)
    pruner.masks["0"]["bias"].zero_()
    assert pruner.masks == copied
    with torch.no_grad():
        model[0].parametrizations.weight.original.neg_().add_(1)
    _, later = pruner.compress()
    assert later != copied
    assert not masks["0"]["weight"].any()


@pytest.mark.parametrize("pruner", [*FILTER_PRUNERS, LevelPruner])
def test_compress_again_gives_the_same_masks(pruner: type[Pruner]) -> None:
    one = pruner(net(), HALF)
    assert one.compress()[1] == one.compress()[1]


def test_compress_again_follows_the_weights() -> None:
    model = linear([1.0], [2.0])
    pruner = L1FilterPruner(model, HALF)
    assert kept(pruner.compress()[1]) == [0, 1]
    with torch.no_grad():
        model.parametrizations.weight.original.copy_(torch.tensor([[3.0], [2.0]]))
    assert kept(pruner.compress()[1]) == [1, 0]


def test_masks_from_before_stay() -> None:
    model = linear([4.0], [3.0], [2.0], [1.0])
    L1FilterPruner(model, [{"sparsity": 0.25, "op_types": ["Linear"]}]).compress()
    Masks({"": {"weight": torch.tensor([[0], [1], [1], [1]])}}).apply(model)
    pruner = L1FilterPruner(model, HALF)
    for _ in range(2):
        _, masks = pruner.compress()
        # Two are masked already, so that they are the half that goes.
        assert masks[""]["weight"].flatten().int().tolist() == [0, 1, 1, 0]
        assert masks == applied_masks(model)


def test_a_failing_compress_leaves_the_model() -> None:
    model = net()
    pruner = L1FilterPruner(model, HALF)
    with torch.no_grad():
        model[3].weight[0] = torch.nan
    before = state(model)
    with pytest.raises(MaskError, match="NaN or infinite scores: '3'"):
        pruner.compress()
    assert [name for name, t in model.state_dict().items() if t.shape != before[name].shape] == []
    assert list(model.state_dict()) == list(before)


def test_unwrap_gives_the_plain_masked_model() -> None:
    model = net()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    pruner = L1FilterPruner(model, HALF)
    pruner.compress()
    model.eval()
    x = torch.rand(2, 3, 8, 8)
    masked = model(x)
    assert pruner.unwrap_model() is model
    assert pruner.unwrap_model() is model
    assert torch.equal(model(x), masked)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model[0]) is nn.Conv2d


def test_shared_and_tied_layers_are_masked_once_and_alike() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    model["again"] = model["a"]
    _, masks = L1FilterPruner(model, HALF).compress()
    assert list(masks) == ["a", "b"]
    assert torch.equal(masks["a"]["weight"], masks["b"]["weight"])
    assert torch.equal(masks["a"]["bias"], masks["b"]["bias"])
    assert torch.equal(model["a"].weight, model["b"].weight)
    with suspend_masks(model):
        assert model["b"].weight is model["a"].weight


def test_random_has_its_own_seed() -> None:
    model = nn.Linear(2, 40)
    masks = [RandomFilterPruner(model, HALF, seed=seed).calc_masks() for seed in (3, 3, 4)]
    assert masks[0] == masks[1] != masks[2]


def test_half_precision_model() -> None:
    model = net().to(torch.bfloat16)
    for pruner in (*FILTER_PRUNERS, LevelPruner):
        assert pruner(model, HALF).calc_masks().sparsity == pytest.approx(0.5, abs=0.1)


# --- export


def test_export(tmp_path: Path) -> None:
    model = net()
    pruner = L1FilterPruner(model, HALF)
    with pytest.raises(CompressError, match=r"call compress\(\) first"):
        pruner.export_model(tmp_path / "weights.pt")
    _, masks = pruner.compress()
    model.eval()
    x = torch.rand(2, 3, 8, 8)
    masked, before = model(x), state(model)
    pruner.export_model(tmp_path / "weights.pt", tmp_path / "masks.safetensors")
    assert_same(model.state_dict(), before)
    plain = net().eval()
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(plain(x), masked)
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.safetensors", "weights.pt"]
    pruner.unwrap_model()
    pruner.export_model(str(tmp_path / "after.pt"))
    assert_same(torch.load(tmp_path / "after.pt", weights_only=True), dict(plain.state_dict()))


def test_onnx_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = L1FilterPruner(net(), HALF)
    pruner.compress()
    with pytest.raises(ConfigError, match="onnx_path without input_shape"):
        pruner.export_model(tmp_path / "w", onnx_path=tmp_path / "m.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"pip install compress-torch\[onnx\]"):
        pruner.export_model(tmp_path / "w", onnx_path=tmp_path / "m.onnx", input_shape=(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")  # the exporter's own deprecations
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = net()
    pruner = L1FilterPruner(model, HALF)
    pruner.compress()
    before = state(model)
    pruner.export_model(
        tmp_path / "w", onnx_path=tmp_path / "m.onnx", input_shape=(1, 3, 8, 8), device="cpu"
    )
    assert_same(model.state_dict(), before)
    assert model.training
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "w"]


# --- the seam to the graph


def test_dependency_aware_asks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    x = torch.rand(1, 3, 8, 8)
    calls: list[dict[str, Any]] = []

    class Coupling:
        def __init__(
            self, model: nn.Module, targets: Any, scores: Any, dummy_input: Any, **options: Any
        ) -> None:
            assert not parametrize.is_parametrized(model[0])
            calls.append({"scores": scores, "input": dummy_input, **options})
            self.kept = {target.name: scores[target.name] > 0 for target in targets}

        def choose(self) -> str:
            return "gone"

        def keep(self, gone: str) -> dict[str, Tensor]:
            assert gone == "gone"
            return self.kept

        def following(self, gone: str) -> Masks:
            return Masks({"1": {"weight": torch.zeros(6), "bias": torch.zeros(6)}})

        def tried(self, model: nn.Module, dummy_input: Any, masks: Masks, gone: str) -> Trial:
            assert list(masks) == ["0", "3", "5", "1"]
            return Trial(masked=9, stayed={}, learned=False)

        def warn_of_untouched(self, gone: str) -> None:
            assert gone == "gone"

    monkeypatch.setattr("compress.pruners.dependency.Coupling", Coupling)
    pruner = L1FilterPruner(model, HALF, dependency_aware=True, dummy_input=x, round_to=2)
    assert pruner.mode == "dependency_aware"
    for _ in range(2):
        _, masks = pruner.compress()
    assert list(masks) == ["0", "3", "5", "1"]
    assert not masks["1"]["weight"].any()
    assert calls[0]["input"] is x
    assert calls[0]["round_to"] == 2
    assert calls[0]["min_channels"] == 1
    assert list(calls[0]["scores"]) == ["0", "3", "5"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    ],
)
def test_fine_tuning_keeps_the_masked_filters_silent(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    model = net()
    optimizer = make(model.parameters())
    _, masks = L1FilterPruner(model, HALF).compress()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        for name, parameters in masks.items():
            for key, mask in parameters.items():
                assert (getattr(model.get_submodule(name), key)[~mask] == 0).all()


class Padded(nn.Module):
    """Of one layer nothing can go: its zeros are unknown behind a padding of another value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.first(x), (1, 1, 1, 1), value=2.0)
        return self.head(self.second(x))


def test_what_stays_in_a_trial_is_not_masked() -> None:
    torch.manual_seed(0)
    model, x = Padded(), torch.rand(1, 3, 4, 4)
    config = [*HALF, {"exclude": True, "op_names": ["head"]}]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="nothing of 'first': it is read by second"):
        masks = pruner.calc_masks()
    assert bool(masks["first"]["weight"].all())
    assert int(masks["second"]["bias"].sum()) == 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(x.removed == 4 for x in ModelSpeedup(model, x, masks).report.layers)


class Picking(nn.Module):
    """Which places it goes on with depends on its parameters, as in a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(4, 8), nn.Linear(8, 1)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        chosen = (self.score(y)[:, 0] > 0).nonzero()[:, 0]
        return self.head(self.inner(y[chosen]))


def test_a_model_that_looks_at_its_data_is_masked_untried() -> None:
    torch.manual_seed(0)
    model, x = Picking(), torch.randn(40, 4)
    config = [*HALF, {"exclude": True, "op_names": ["head", "score"]}]
    masks = L1FilterPruner(model, config, dependency_aware=True, dummy_input=x).calc_masks()
    ModelSpeedup(model, x, masks).speedup_model()
    assert (model.body.out_features, model.inner.out_features) == (4, 4)
