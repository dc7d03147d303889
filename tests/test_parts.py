"""Pruners of modules with several weights: hidden units of recurrent networks, and heads."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from oracle import SeededChoices, check_exact, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from compress import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ADMMPruner,
    AGPPruner,
    Evaluator,
    FPGMPruner,
    GlobalPruner,
    GraSPPruner,
    IterativePruner,
    L1FilterPruner,
    L2FilterPruner,
    LAMPPruner,
    LevelPruner,
    MovementPruner,
    OBDFilterPruner,
    RandomFilterPruner,
    SlimPruner,
    SNIPFilterPruner,
    SNIPPruner,
    TaylorFOWeightFilterPruner,
    WandaPruner,
    sensitivity_analysis,
)
from compress.errors import ConfigError
from compress.pruners.base import Pruner
from compress.pruners.parts import COMPOUND, row_parts, weight_parts

WORDS, INPUTS, HIDDEN = 12, 6, 8
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


def tokens(x: Tensor) -> Tensor:
    """Words of numbers: what holds a small model against the masked one draws floats."""
    return (x.sigmoid() * WORDS).long()


class Tagger(nn.Module):
    """An embedding, a recurrent module, and a linear layer at each step or of the last state."""

    def __init__(self, kind: type[nn.RNNBase], last: bool = False, **options: Any) -> None:
        super().__init__()
        self.last = last
        self.embedding = nn.Embedding(WORDS, INPUTS)
        self.recurrent = kind(INPUTS, HIDDEN, batch_first=True, **options)
        both = 2 if options.get("bidirectional") and not last else 1
        self.head = nn.Linear(both * (options.get("proj_size") or HIDDEN), 3)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.recurrent(self.embedding(tokens(x)))
        if self.last:
            y = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.head(y)


class Encoder(nn.Module):
    def __init__(self, heads: int = 4, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, heads, 24, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def half(*kinds: str) -> list[dict[str, Any]]:
    return [{"sparsity": 0.5, "op_types": list(kinds)}]


def half_of(model: nn.Module) -> list[dict[str, Any]]:
    """Half of the units of every module that has several weights."""
    names = [name for name, each in model.named_modules() if isinstance(each, COMPOUND)]
    return [{"sparsity": 0.5, "op_names": names}]


def shrunk(model: nn.Module, x: Tensor, kind: type[Pruner], *args: Any, **options: Any) -> Any:
    """The masks of a pruner, after the model is cut by them and held against the masked one."""
    masks = kind(model, *args, **options).calc_masks()
    check_exact(model, x, {path: dict(each) for path, each in masks.items()})
    return masks


# -- scores and masks by hand --------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(GATES))
def test_a_hidden_unit_is_its_rows_of_all_gates(kind, bias):
    module = kind(2, 3, bias=bias)
    model = nn.ModuleDict({"rnn": module})
    end = "_l0" if isinstance(module, nn.RNNBase) else ""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        getattr(module, f"weight_ih{end}")[-2] = 0.1  # unit 1 of the last gate
        getattr(module, f"weight_hh{end}")[2] = 0.3  # unit 2 of the first gate
    pruner = L1FilterPruner(model, [{"sparsity": 0.34, "op_types": [kind.__name__]}])
    (layer,) = pruner._layers(pruner._masks_before()).values()
    gates = GATES[kind]
    expected = [5.0 * gates, 5.0 * gates - 1.8, 5.0 * gates - 2.1]
    torch.testing.assert_close(pruner.score(layer), torch.tensor(expected))
    masks = pruner.calc_masks()["rnn"]
    assert set(masks) == {name for name, _ in module.named_parameters()}
    keep = torch.tensor([True, True, False] * gates)
    for name, mask in masks.items():
        assert mask.shape == getattr(module, name).shape
        rows = mask.reshape(3 * gates, -1)
        assert bool((rows == keep[:, None]).all()), name


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 5}])
def test_a_head_is_its_rows_of_queries_keys_and_values(widths):
    module = nn.MultiheadAttention(4, 2, add_bias_kv=True, **widths)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        values = module.v_proj_weight if widths else module.in_proj_weight[8:]
        values[0] = 0.0  # in head 0
    masks = L1FilterPruner(nn.ModuleDict({"mha": module}), half("MultiheadAttention")).calc_masks()
    masks = masks["mha"]
    keep = torch.tensor([False, False, True, True])
    parts = ("q_proj_weight", "k_proj_weight", "v_proj_weight") if widths else ("in_proj_weight",)
    assert set(masks) == {*parts, "in_proj_bias", "bias_k", "bias_v"}
    for name in parts:
        assert bool((masks[name] == keep.repeat(3 // len(parts))[:, None]).all())
    assert torch.equal(masks["in_proj_bias"], keep.repeat(3))
    assert torch.equal(masks["bias_k"], keep.view(1, 1, 4))
    assert torch.equal(masks["bias_v"], keep.view(1, 1, 4))


def test_parts_cover_all_weights():
    module = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    weights = [name for name, p in module.named_parameters() if p.dim() == 2]
    assert sorted(w for part in weight_parts(module) for w in part.weights) == sorted(weights)
    rows = [p for part in row_parts(module) for p in (*part.weights, *part.biases)]
    every = [name for name, _ in module.named_parameters() if "weight_hr" not in name]
    assert sorted(rows) == sorted(every)
    assert [part.units for part in row_parts(module)] == [4] * 4
    assert [part.weights for part in row_parts(nn.Linear(2, 3))] == [("weight",)]


def test_single_weights_go_of_each_weight_by_itself():
    model = Tagger(nn.LSTM, proj_size=4)
    masks = LevelPruner(model, half_of(model)).calc_masks()["recurrent"]
    assert list(masks) == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    for name, mask in masks.items():
        weight = getattr(model.recurrent, name).abs()
        assert int(mask.sum()) == mask.numel() // 2
        assert weight[mask].min() >= weight[~mask].max()


def test_patterns_of_single_weights():
    model = nn.ModuleDict({"rnn": nn.GRU(4, 8), "mha": nn.MultiheadAttention(8, 2)})
    masks = LevelPruner(model, half_of(model), mode="balanced", balance="2:4").calc_masks().flat()
    assert set(masks) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "mha.in_proj_weight"}
    for mask in masks.values():
        assert set(mask.reshape(-1, 4).sum(1).tolist()) == {2}
    odd = nn.ModuleDict({"rnn": nn.GRU(3, 8)})
    with pytest.raises(ConfigError, match=r"'rnn\.weight_ih_l0': its 3 inputs are no multiple"):
        LevelPruner(odd, half("GRU"), mode="balanced", balance="2:4")


# -- the small model is the masked one -----------------------------------------------------

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_lose_half_of_their_units(kind, options, mode):
    x = torch.randn(3, 5).double()
    model = Tagger(kind, **options)
    masks = shrunk(model, x, L1FilterPruner, half_of(model), mode=mode, dummy_input=x)
    assert model.recurrent.hidden_size == HIDDEN // 2
    assert model.head.in_features == HIDDEN // 2 * (1 + options.get("bidirectional", False))
    assert masks.sparsity_per_layer["recurrent"] == 0.5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
def test_a_projected_lstm_loses_cells(mode):
    x = torch.randn(3, 5).double()
    model = Tagger(nn.LSTM, proj_size=2)
    shrunk(model, x, L2FilterPruner, half_of(model), mode=mode, dummy_input=x)
    assert (model.recurrent.hidden_size, model.recurrent.proj_size) == (4, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_last_states_need_the_same_units_in_all_layers(kind):
    x = torch.randn(3, 5).double()
    model = Tagger(kind, last=True, num_layers=2)
    shrunk(model, x, L1FilterPruner, half_of(model), mode="dependency_aware", dummy_input=x)
    assert model.recurrent.hidden_size == HIDDEN // 2


@pytest.mark.parametrize("seed", range(12))
def test_drawn_networks(seed):
    torch.manual_seed(seed)
    choices = SeededChoices(seed)
    options = choices.pick(OPTIONS)
    last = bool(choices.integer(0, 1)) and not options.get("bidirectional")
    model = Tagger(choices.pick([nn.LSTM, nn.GRU, nn.RNN]), last, **options)
    x = torch.randn(3, 5).double()
    entries = [
        {"sparsity": choices.integer(1, 7) / 8, "op_names": [name]}
        for name in ("recurrent", "embedding")
    ]
    kind = choices.pick([L1FilterPruner, L2FilterPruner, FPGMPruner, RandomFilterPruner])
    mode = choices.pick(["normal", "dependency_aware"])
    shrunk(model, x, kind, entries, mode=mode, dummy_input=x)
    if mode == "dependency_aware":
        units = [HIDDEN, INPUTS]
        gone = [int(entry["sparsity"] * size) for entry, size in zip(entries, units, strict=True)]
        left = [size - lost for size, lost in zip(units, gone, strict=True)]
        assert [model.recurrent.hidden_size, model.recurrent.input_size] == left


class Translator(nn.Module):
    """An encoder whose last state starts a cell, which is called step by step."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, INPUTS)
        self.encoder = nn.GRU(INPUTS, HIDDEN, batch_first=True)
        self.bridge = nn.Linear(HIDDEN, HIDDEN)
        self.cell = kind(INPUTS, HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding(tokens(x))
        state = self.bridge(self.encoder(words)[1][0]).tanh()
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        outputs = []
        for step in words.unbind(1):
            state = self.cell(step, state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop_shrink_with_what_makes_their_first_state(kind):
    x = torch.randn(3, 4).double()
    model = Translator(kind)
    config_list = [*half_of(model), {"sparsity": 0.5, "op_names": ["bridge"]}]
    shrunk(model, x, FPGMPruner, config_list, mode="dependency_aware", dummy_input=x)
    assert (model.encoder.hidden_size, model.cell.hidden_size) == (4, 4)
    assert model.bridge.out_features == 4


def test_layers_of_one_module_go_together_or_not_at_all():
    x = torch.randn(3, 5).double()
    first = [{"sparsity": 0.5, "op_names": ["recurrent.weight_ih_l0"]}]
    model = Tagger(nn.GRU, num_layers=2)
    masks = shrunk(model, x, L1FilterPruner, first)
    assert masks["recurrent"].keys() == {
        f"{w}_{s}_l0" for w in ("weight", "bias") for s in ("ih", "hh")
    }
    assert model.recurrent.hidden_size == HIDDEN
    pruner = L1FilterPruner(model, first, mode="dependency_aware", dummy_input=x)
    with pytest.warns(
        UserWarning, match=r"nothing of 'recurrent\.weight_ih_l0': it is coupled with"
    ):
        assert pruner.calc_masks().sparsity == 0


@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
def test_the_only_unit_and_the_only_head_stay(mode):
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 1, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.head = nn.Linear(5, 2)
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.head(torch.cat([y, self.rnn(x)[0]], -1))

    model, x = Narrow(), torch.randn(2, 3, 4)
    masks = shrunk(model, x, L1FilterPruner, half_of(model), mode=mode, dummy_input=x)
    assert masks.sparsity == 0


def test_a_cell_whose_first_state_is_not_selected_is_left_alone():
    x = torch.randn(3, 4).double()
    pruner = L1FilterPruner(
        Translator(nn.GRUCell), half("GRUCell"), mode="dependency_aware", dummy_input=x
    )
    with pytest.warns(UserWarning, match=r"'cell\.weight_ih': it is coupled with 'bridge'"):
        assert pruner.calc_masks().sparsity == 0


@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}], ids=str)
def test_encoders_lose_heads_and_hidden_units(options, mode):
    x = torch.randn(3, 5, 16).double()
    model = Encoder(**options)
    config_list = [*half_of(model), {"sparsity": 0.5, "op_partial_names": ["linear1"]}]
    shrunk(model, x, L2FilterPruner, config_list, mode=mode, dummy_input=x)
    for layer in model.encoder.layers:
        heads = layer.self_attn
        assert (heads.num_heads, heads.head_dim, heads.embed_dim) == (2, 4, 16)
        assert layer.linear1.out_features == 12


def test_the_masked_encoder_runs_torchs_fast_kernel_with_the_masks():
    x = torch.randn(3, 5, 16).double()
    model = Encoder().eval()
    plain = copy.deepcopy(model)
    model, masks = L1FilterPruner(model, half_of(model)).compress()
    masks.make_permanent(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


def test_a_heads_output_projection_is_a_layer_of_its_own():
    x = torch.randn(3, 5, 16).double()
    model = Encoder()
    config_list = [*half_of(model), {"sparsity": 0.25, "op_partial_names": ["out_proj"]}]
    masks = shrunk(model, x, L1FilterPruner, config_list)
    assert set(masks["encoder.layers.0.self_attn"]) == {"in_proj_weight", "in_proj_bias"}
    out = masks["encoder.layers.0.self_attn.out_proj"]
    assert int((~out["bias"]).sum()) == 4
    assert model.encoder.layers[0].self_attn.num_heads == 2


def test_heads_whose_mean_weights_are_used_stay_with_a_reason():
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x)

    x = torch.randn(2, 3, 8)
    pruner = L1FilterPruner(
        Shown(), half("MultiheadAttention"), mode="dependency_aware", dummy_input=x
    )
    with pytest.warns(UserWarning, match=r"'attention\.in_proj_weight': it .*mean works over"):
        assert pruner.calc_masks().sparsity == 0


class Mixed(nn.Module):
    """A bidirectional LSTM, attention over its outputs, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, INPUTS)
        self.lstm = nn.LSTM(INPUTS, HIDDEN, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(2 * HIDDEN, 4, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 3)
        randomise(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(tokens(x)))
        return self.head(self.attention(y, y, y, need_weights=False)[0].mean(1))


def data() -> Evaluator:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 5, generator=generator).double(), torch.tensor([0, 1, 2, 1]))
        for _ in range(2)
    ]
    return Evaluator(
        batches, nn.functional.cross_entropy, lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )


RANKED = [{"total_sparsity": 0.5, "op_types": ["LSTM", "MultiheadAttention"]}]


@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FPGMPruner, {}),
        (RandomFilterPruner, {"seed": 1}),
        (TaylorFOWeightFilterPruner, {"evaluator": data()}),
        (OBDFilterPruner, {"evaluator": data(), "samples": 1}),
        (SNIPFilterPruner, {"evaluator": data()}),
    ],
)
def test_every_criterion_of_weights_and_gradients(kind, options, mode):
    x = torch.randn(3, 5).double()
    config_list = half("LSTM", "MultiheadAttention")
    pruner = kind(Mixed(), config_list, mode=mode, dummy_input=x, **options)
    masks = pruner.calc_masks()
    assert masks.sparsity_per_layer == {"lstm": 0.5, "attention": 0.5}
    kept = [mask.reshape(4, HIDDEN, -1).any(2) for mask in masks["lstm"].values()]
    assert all(int(gate.sum()) == HIDDEN // 2 for mask in kept for gate in mask)
    rows = masks["attention"]["in_proj_weight"].reshape(3, 4, -1)
    assert bool((rows == rows[:1, :, :1]).all())


@pytest.mark.parametrize("mode", ["normal", "dependency_aware"])
def test_units_and_heads_of_one_network_go(mode):
    x = torch.randn(3, 5).double()
    model = Mixed()
    shrunk(model, x, L2FilterPruner, half_of(model), mode=mode, dummy_input=x)
    assert (model.lstm.hidden_size, model.attention.num_heads) == (4, 2)
    assert (model.attention.embed_dim, model.attention.kdim) == (2 * HIDDEN, HIDDEN)


@pytest.mark.parametrize("mode", ["global", "dependency_aware", "isomorphic"])
def test_one_ranking_over_units_and_heads(mode):
    x = torch.randn(3, 5).double()
    model = Mixed()
    masks = shrunk(model, x, L1FilterPruner, RANKED, mode=mode, dummy_input=x)
    assert 0.3 < masks.sparsity < 0.6
    if mode != "global":  # which sees that both directions lose equally many
        assert not [m for m in masks["lstm"].values() if m.all()]
        rows = [m.reshape(4, HIDDEN, -1)[0, :, 0] for m in masks["lstm"].values() if m.dim() == 2]
        assert len({int(kept.sum()) for kept in rows}) == 1
        assert model.lstm.hidden_size == int(rows[0].sum())


@pytest.mark.parametrize("kind", [LAMPPruner, SNIPPruner, GraSPPruner, MovementPruner])
def test_every_pruner_of_single_weights(kind):
    given = () if kind is LAMPPruner else (data(),)
    config_list = half("LSTM", "MultiheadAttention") if kind is MovementPruner else RANKED
    options = {"training_epochs": 1} if kind is MovementPruner else {}
    _, masks = kind(Mixed(), config_list, *given, **options).compress()
    assert len(masks["lstm"]) == 4  # weights of two directions
    assert list(masks["attention"]) == ["in_proj_weight"]
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_gradient_score_is_the_sum_over_the_rows():
    evaluator, model = data(), Mixed()
    pruner = TaylorFOWeightFilterPruner(model, half("LSTM"), evaluator, training_batches=1)
    pruner.calc_masks()
    x, y = evaluator.train_loader[0]
    model.eval()
    nn.functional.cross_entropy(model(x), y).backward()
    for end in ("_l0", "_l0_reverse"):
        weights = [getattr(model.lstm, f"weight_{kind}{end}") for kind in ("ih", "hh")]
        product = torch.cat([(w * w.grad).square() for w in weights], 1)
        expected = product.view(4, HIDDEN, -1).sum((0, 2)).detach()
        torch.testing.assert_close(pruner._scores[f"lstm.weight_ih{end}"], expected)


# -- activations ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_activations_are_the_columns_of_each_direction(packed):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 4, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if not packed:
                return self.gru(x)[0]
            y, _ = self.gru(pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True))
            return pad_packed_sequence(y, batch_first=True)[0]

    model, x = Reader(), torch.randn(2, 4, 3)
    pruner = ActivationMeanRankFilterPruner(model, half("GRU"), Evaluator([x]))
    pruner.calc_masks()
    with torch.no_grad():
        values = model(x).abs()
    count = 6 if packed else 8  # what is padded is no activation
    expected = values.sum((0, 1)).double() / count
    got = [pruner.statistic(pruner._sums[f"gru.weight_ih_l0{end}"]) for end in ("", "_reverse")]
    torch.testing.assert_close(torch.cat(got), expected)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_activations_of_cells(kind):
    x = torch.randn(3, 4).double()
    model = Translator(kind)
    evaluator = Evaluator([x])
    masks = ActivationAPoZRankFilterPruner(
        model, half(kind.__name__), evaluator, activation="relu"
    ).calc_masks()
    assert masks.sparsity_per_layer == {"cell": 0.5}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_units_that_no_output_shows_are_refused():
    model = nn.ModuleDict({
        "deep": nn.GRU(3, 4, num_layers=2),
        "projected": nn.LSTM(3, 4, proj_size=2),
        "heads": nn.MultiheadAttention(4, 2),
    })  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        ActivationAPoZRankFilterPruner(model, half("GRU", "LSTM", "MultiheadAttention"), data())
    text = str(caught.value)
    assert "'deep.weight_ih_l0': only the last of its 2 layers is seen in its output; use" in text
    assert "'deep.weight_ih_l1'" not in text
    assert "'projected.weight_ih_l0': its hidden units are projected before they come out" in text
    assert "'heads.in_proj_weight': what its heads give is mixed before it comes out" in text


# -- what a config_list says ---------------------------------------------------------------


def selected(config_list: Any, model: nn.Module, kind: type[Pruner] = L1FilterPruner) -> list[str]:
    return [target.name for target in kind(model, config_list).targets]


def test_a_module_or_one_of_its_layers_is_selected_and_excluded():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "rnn": nn.GRU(2, 4, 2, bidirectional=True)})
    layers = [f"rnn.weight_ih_l{i}{end}" for i in (0, 1) for end in ("", "_reverse")]
    assert selected(half("GRU"), model) == layers
    assert selected([{"sparsity": 0.5, "op_names": ["rnn"]}], model) == layers
    assert selected([{"sparsity": 0.5, "op_names": [layers[2]]}], model) == [layers[2]]
    of_first = {"exclude": True, "op_names_re": ["_l0"]}
    assert selected([*half("GRU", "Linear"), of_first], model) == ["fc", *layers[2:]]
    named = [*half("GRU", "Linear"), {"exclude": True, "op_names": ["rnn"]}]
    assert selected(named, model) == ["fc"]
    assert selected(half("default"), model) == ["fc"]
    assert selected(half("default", "GRU"), model) == ["fc", *layers]
    weights = selected(half("GRU"), nn.ModuleDict({"rnn": nn.GRU(2, 4)}), LevelPruner)
    assert weights == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


def test_a_model_may_be_such_a_module_itself():
    model = nn.LSTM(3, 4)
    masks = L1FilterPruner(model, half("LSTM")).calc_masks()
    assert selected(half("LSTM"), model) == ["weight_ih_l0"]
    assert masks.sparsity_per_layer == {"": 0.5}


def test_limits_name_the_module_or_a_layer():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 4, num_layers=2), "fc": nn.Linear(2, 8)})
    for limits, expected in (
        ({"rnn": 0.25}, [0.25, 0.25]),
        ({"rnn": 0.5, "rnn.weight_ih_l1": 0.25}, [0.5, 0.25]),
    ):
        entry = {"total_sparsity": 0.3, "op_types": ["GRU"], "max_sparsity_per_layer": limits}
        pruner = L1FilterPruner(model, [entry], mode="global")
        assert [target.max_sparsity for target in pruner.targets] == expected
    entry = {"total_sparsity": 0.3, "op_types": ["GRU"], "max_sparsity_per_layer": {"fc": 0.5}}
    with pytest.raises(ConfigError, match="got 'fc', which is no layer of this entry"):
        L1FilterPruner(model, [entry], mode="global")


def test_what_default_leaves_out_is_told_where_nothing_is_left():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 4)})
    with pytest.raises(ConfigError, match="it leaves out LSTM 'rnn': add \"LSTM\" to op_types"):
        L1FilterPruner(model, half("default"))


@pytest.mark.parametrize("kind", [SlimPruner, WandaPruner])
def test_pruners_without_such_units_refuse_them(kind):
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 4), "rnn": nn.GRU(4, 4)})
    with pytest.raises(ConfigError, match=r"got 'GRU'; .* masks .*; GRU 'rnn' has none"):
        kind(model, half("GRU"), data())


def test_a_weight_that_is_computed_is_refused():
    module = nn.GRU(2, 4)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    model = nn.ModuleDict({"rnn": module})
    with pytest.raises(ConfigError, match=r"GRU 'rnn\.weight_ih_l0': its weight is computed from"):
        L1FilterPruner(model, half("GRU"))


def test_blocks_of_hidden_units_and_heads():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 8), "mha": nn.MultiheadAttention(8, 4)})
    masks = L1FilterPruner(model, half("GRU", "MultiheadAttention"), block_size=2).calc_masks()
    rows = masks["rnn"]["weight_ih_l0"][:8, 0]
    assert torch.equal(rows[::2], rows[1::2])
    assert int(rows.sum()) == 4
    heads = masks["mha"]["in_proj_weight"][::2, 0][:4]
    assert torch.equal(heads[::2], heads[1::2])
    with pytest.raises(ConfigError, match=r"'mha\.in_proj_weight': its 4 filters are no multiple"):
        L1FilterPruner(model, half("GRU", "MultiheadAttention"), block_size=8)


def test_modules_with_the_same_weights_take_the_same_masks():
    model = nn.ModuleDict({"a": nn.GRUCell(3, 4), "b": nn.GRUCell(3, 4)})
    for name, parameter in list(model["a"].named_parameters()):
        setattr(model["b"], name, parameter)
    pruner = L1FilterPruner(model, half("GRUCell"))
    (target,) = pruner.targets
    assert (target.name, target.tied) == ("a.weight_ih", ("b.weight_ih",))
    _, masks = pruner.compress()
    assert masks["a"].keys() == masks["b"].keys()
    assert all(torch.equal(masks["a"][name], masks["b"][name]) for name in masks["a"])


@pytest.mark.parametrize("kind", [L1FilterPruner, LevelPruner])
def test_a_weight_under_several_names_is_masked_once(kind):
    model = nn.ModuleDict({"rnn": nn.RNN(3, 4), "cell": nn.RNNCell(3, 4), "fc": nn.Linear(3, 4)})
    model["cell"].weight_ih = model["fc"].weight = model["rnn"].weight_ih_l0
    config_list = [{"sparsity": 0.5, "op_names": ["rnn"]}, {"sparsity": 0.5, "op_names": ["fc"]}]
    model, masks = kind(model, config_list).compress()
    flat = masks.flat()
    both = flat["rnn.weight_ih_l0"] & flat["fc.weight"]
    raw = model["rnn"].weight_ih_l0
    assert bool((raw[~both] == 0).all())
    assert torch.equal(model["fc"].weight, raw)
    assert torch.equal(model["cell"].weight_ih, raw)


def test_what_was_masked_before_counts():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 8)})
    _, first = L1FilterPruner(model, [{"sparsity": 0.25, "op_types": ["GRU"]}]).compress()
    _, masks = RandomFilterPruner(model, half("GRU")).compress()
    gone = ~masks["rnn"]["weight_hh_l0"][:8, 0]
    assert int(gone.sum()) == 4
    assert bool(gone[~first["rnn"]["weight_hh_l0"][:8, 0]].all())


# -- in steps, searches, targets -----------------------------------------------------------


@pytest.mark.parametrize("kind", [AGPPruner, IterativePruner])
def test_units_go_in_steps_and_are_counted_after_each_speedup(kind):
    x = torch.randn(3, 5).double()
    model = Mixed()
    pruner = kind(
        model, half("LSTM", "MultiheadAttention"), pruning_algorithm="l2", total_iteration=2,
        finetuner=lambda each: None, speedup=True, dummy_input=x,
    )  # fmt: skip
    small, _ = pruner.compress()
    assert (small.lstm.hidden_size, small.attention.num_heads) == (4, 2)
    assert small(x).shape == (3, 3)


@pytest.mark.parametrize("algorithm", ["l1", "level"])
def test_admm_projects_all_weights_of_a_unit(algorithm):
    model = Mixed()
    pruner = ADMMPruner(
        model, half("LSTM"), data(), num_iterations=1, training_epochs=1,
        pruning_algorithm=algorithm,
    )  # fmt: skip
    _, masks = pruner.compress()
    weights = {name for name, _ in Mixed().named_parameters() if name.startswith("lstm.weight")}
    assert set(pruner._targets) == weights
    assert masks.sparsity == pytest.approx(0.5)


def test_sensitivity_counts_all_layers_of_a_module_as_one():
    x = torch.randn(3, 5).double()
    found = sensitivity_analysis(
        Mixed(), half("LSTM", "MultiheadAttention"), lambda m: float(m(x).detach().sum()), (0.5,),
        dummy_input=x,
    )  # fmt: skip
    text = str(found)
    assert "lstm.weight_ih_l0 " in text
    assert "attention.in_proj_weight" in text
    assert "reverse" not in text


def test_a_target_of_parameters_is_met():
    x = torch.randn(3, 5).double()
    model = Mixed()
    before = sum(p.numel() for p in model.parameters())
    config_list = [{"op_types": ["LSTM", "MultiheadAttention"]}]
    pruner = GlobalPruner(model, config_list, cost="params", target=0.6, dummy_input=x)
    masks = pruner.calc_masks()
    check_exact(model, x, {path: dict(each) for path, each in masks.items()})
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * before


def test_nothing_is_warned_of_where_all_can_go():
    x = torch.randn(3, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = L1FilterPruner(
            Mixed(), half("LSTM", "MultiheadAttention"), mode="dependency_aware", dummy_input=x
        ).calc_masks()
    assert all(any(not bool(mask.all()) for mask in each.values()) for each in masks.values())
