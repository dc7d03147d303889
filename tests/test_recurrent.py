"""Recurrent networks: hidden units go with their gates, whole sequences or step by step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import MaskDict, SeededChoices, check_exact, draw_masks, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from compress import ModelSpeedup
from compress.errors import VerificationError

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
HIDDEN, INPUTS = 8, 6


def units_masked(module: nn.Module, units: list[int]) -> dict[str, Tensor]:
    """Masks of some hidden units: all of their gates' rows and biases."""
    rows = torch.ones(GATES[type(module)], HIDDEN, dtype=torch.bool)
    rows[:, units] = False
    return {
        name: rows.flatten().view(-1, *[1] * (p.dim() - 1)).expand(p.shape).clone()
        for name, p in module.named_parameters()
        if "weight_hr" not in name
    }


class Tagger(nn.Module):
    """An encoder, a recurrent module, a linear layer at every step."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, INPUTS)
        self.recurrent = kind(INPUTS, HIDDEN, **options)
        width = options.get("proj_size", HIDDEN) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(width, 3)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.encoder(x))[0])


OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_masked_hidden_units_go_with_their_gates(kind, options):
    model = Tagger(kind, **options)
    masks = {"recurrent": units_masked(model.recurrent, [1, 4, 5])}
    speedup = check_exact(model, torch.randn(4, 2, 5), masks)
    assert model.recurrent.hidden_size == 5
    assert model.recurrent.weight_hh_l0.shape == (GATES[kind] * 5, 5)
    assert model.head.in_features == 5 * (1 + options.get("bidirectional", False))
    removed = {layer.removed for layer in speedup.report.layers}
    assert removed == {3 * GATES[kind]}


def test_the_units_of_a_relu_network_go_too():
    model = Tagger(nn.RNN, nonlinearity="relu", num_layers=2)
    check_exact(model, torch.randn(4, 2, 5), {"recurrent": units_masked(model.recurrent, [0])})
    assert model.recurrent.hidden_size == 7


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_that_only_read_themselves_go(kind):
    model = Tagger(kind)
    others = torch.ones_like(model.recurrent.weight_hh_l0, dtype=torch.bool)
    others[:, 2] = False
    others[2::HIDDEN, 2] = True  # unit 2 still remembers itself
    inputs = torch.ones_like(model.recurrent.weight_ih_l0, dtype=torch.bool)
    inputs[:, 3] = False
    read = torch.ones_like(model.head.weight, dtype=torch.bool)
    read[:, 2] = False
    masks = {
        "recurrent": {"weight_hh_l0": others, "weight_ih_l0": inputs},
        "head": {"weight": read},
    }
    check_exact(model, torch.randn(4, 2, 5), masks)
    assert (model.recurrent.hidden_size, model.recurrent.input_size) == (7, 5)
    assert model.encoder.out_features == 5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_cells_and_outputs_of_a_projected_lstm_go_apart():
    model = Tagger(nn.LSTM, proj_size=4)
    masks = {"recurrent": units_masked(model.recurrent, [1, 4])}
    keep = torch.tensor([True, False, True, True])
    masks["recurrent"]["weight_hr_l0"] = keep[:, None].expand(4, HIDDEN)
    check_exact(model, torch.randn(4, 2, 5), masks)
    assert (model.recurrent.hidden_size, model.recurrent.proj_size) == (6, 3)
    assert model.head.in_features == 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_masks_of_every_kind(kind, seed):
    torch.manual_seed(seed)
    model = Tagger(kind, **OPTIONS[seed % len(OPTIONS)]).double()
    masks = draw_masks(SeededChoices(seed), model)
    check_exact(model, torch.randn(4, 2, 5).double(), masks)


class Reader(nn.Module):
    """Reads the last states; ``given`` makes the first one from the input."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, given: bool) -> None:
        super().__init__()
        self.recurrent = kind(INPUTS, HIDDEN, layers)
        self.start = nn.Linear(INPUTS, HIDDEN) if given else None
        self.head = nn.Linear(HIDDEN, 3)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        states = None
        if self.start is not None:
            first = self.start(x[0]).expand(self.recurrent.num_layers, -1, -1).contiguous()
            states = (first, first) if isinstance(self.recurrent, nn.LSTM) else first
        last = self.recurrent(x, states)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_last_states_read_the_units_of_their_layer(kind, layers):
    model = Reader(kind, layers, given=False)
    masks = {"recurrent": units_masked(model.recurrent, [1, 4])}
    masks["recurrent"]["weight_ih_l0"][:, 0] = False
    check_exact(model, torch.randn(4, 2, INPUTS), masks)
    assert model.recurrent.hidden_size == 6


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_first_state_that_is_given_flows_through_masked_units(kind):
    model = Reader(kind, 1, given=True)
    masks = {"recurrent": units_masked(model.recurrent, [1, 4])}
    check_exact(model, torch.randn(4, 2, INPUTS), masks)
    assert model.recurrent.hidden_size == HIDDEN  # half of the first state is still there
    start = units_masked_linear(model.start, [1])
    check_exact(model, torch.randn(4, 2, INPUTS), {**masks, "start": start})
    assert model.recurrent.hidden_size == HIDDEN - 1
    assert model.start.out_features == HIDDEN - 1


def units_masked_linear(layer: nn.Linear, units: list[int]) -> dict[str, Tensor]:
    keep = torch.ones(layer.out_features, dtype=torch.bool)
    keep[units] = False
    return {"weight": keep[:, None].expand(layer.weight.shape), "bias": keep}


def test_constants_of_removed_inputs_go_into_the_gates_biases():
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(5, INPUTS, 1), nn.BatchNorm1d(INPUTS)
            self.recurrent = nn.GRU(INPUTS, HIDDEN, bidirectional=True, batch_first=True)
            self.head = nn.Linear(2 * HIDDEN, 3)
            randomise(self)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).sigmoid().transpose(1, 2)
            return self.head(self.recurrent(y)[0])

    model = Pictures().double()
    keep = torch.arange(INPUTS) < 4
    masks = {"conv": {"weight": keep[:, None, None].expand(model.conv.weight.shape), "bias": keep}}
    speedup = check_exact(model, torch.randn(2, 5, 7).double(), masks)
    assert model.recurrent.input_size == 4
    assert set(speedup.report.constants_folded) == {
        "recurrent.bias_ih_l0",
        "recurrent.bias_ih_l0_reverse",
    }


@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences(ordered):
    class Packed(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([4, 3, 2] if ordered else [2, 4, 3])[: len(x)]
            packed = pack_padded_sequence(
                self.encoder(x), lengths, batch_first=True, enforce_sorted=ordered
            )
            y, last = self.recurrent(packed)
            return self.head(pad_packed_sequence(y, batch_first=True)[0]), self.head(last[-1])

    model = Packed(nn.GRU, num_layers=2, batch_first=True)
    masks = {"recurrent": units_masked(model.recurrent, [1, 4])}
    check_exact(model, torch.randn(3, 4, 5), masks)
    assert model.recurrent.hidden_size == 6


class Unrolled(nn.Module):
    """A cell step by step; ``first``: where its first state comes from."""

    def __init__(self, kind: type[nn.RNNCellBase], first: str) -> None:
        super().__init__()
        self.cell, self.first = kind(INPUTS, HIDDEN), first
        self.head = nn.Linear(HIDDEN, 3)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.first != "default":
            size = self.cell.hidden_size if self.first == "attribute" else 8
            state = x.new_zeros(x.shape[1], size)
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x:
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("first", ["default", "attribute", "number"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_lose_their_masked_units(kind, first):
    model = Unrolled(kind, first)
    speedup = check_exact(
        model, torch.randn(4, 2, INPUTS), {"cell": units_masked(model.cell, [0, 6])}
    )
    assert model.cell.hidden_size == (8 if first == "number" else 6)
    if first == "number":
        (layer,) = speedup.report.layers
        assert "number in the code" in next(iter(layer.kept))


def flat_weights_are_the_parameters(module: nn.RNNBase) -> bool:
    named = dict(module.named_parameters())
    pairs = zip(module._flat_weights, module._flat_weights_names, strict=True)
    return all(weight is named[name] for weight, name in pairs)


def test_the_small_module_is_whole():
    model = Tagger(nn.LSTM, num_layers=2)
    masks: MaskDict = {"recurrent": units_masked(model.recurrent, [1])}
    ModelSpeedup(model, torch.randn(4, 2, 5), masks).speedup_model()
    assert flat_weights_are_the_parameters(model.recurrent)
    x = torch.randn(4, 2, 5)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        torch.testing.assert_close(again(x), model(x))
        assert flat_weights_are_the_parameters(again.recurrent)


def test_a_cut_that_is_undone_leaves_the_module_as_it_was():
    class Restless(Tagger):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) + type(self).calls

    model = Restless(nn.LSTM, bidirectional=True)
    masks = {"recurrent": units_masked(model.recurrent, [1])}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(VerificationError):
        ModelSpeedup(model, torch.randn(4, 2, 5), masks).speedup_model()
    assert flat_weights_are_the_parameters(model.recurrent)
    assert (model.recurrent.hidden_size, model.recurrent.input_size) == (HIDDEN, INPUTS)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(torch.randn(4, 2, 5))
