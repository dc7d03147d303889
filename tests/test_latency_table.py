"""Times of single calls: what is timed, what is remembered, what a model takes of them."""

import json
import warnings

import numpy as np
import pytest
import torch
from oracle import randomise
from staircase import FIXED_MS, SLOWER, Clock, model_ms, stairs, time_of
from test_cost import MODELS
from torch import nn
from torch.nn import functional as F

from compress import L1FilterPruner, ModelSpeedup
from compress.cost import LatencyCost, LatencyTable, cost_model
from compress.cost import table as table_module
from compress.cost.calls import dense_work
from compress.cost.extents import Extents
from compress.cost.standalone import description, standalone
from compress.errors import StateError
from compress.graph.channels import ChannelGraph

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        y = F.relu(self.two(self.one(x)))
        y = y.flatten(2).transpose(1, 2).reshape(-1, 16)
        return self.fc(self.norm(y)).sum(0, keepdim=True)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 24, 3, padding=1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


def chain():
    torch.manual_seed(0)
    model = Chain().eval()
    randomise(model)
    return model, torch.rand(2, 3, 4, 4)


def without(graph, layer, units):
    gone = np.zeros(graph.space.size, bool)
    gone[graph.root[graph.layers[f"{layer}.weight"].labels[units:]]] = True
    return gone


def test_every_call_runs_by_itself_at_the_sizes_that_are_left():
    graph = ChannelGraph(Net().eval(), torch.rand(2, 3, 4, 4))
    extents, gone = Extents(graph), without(graph, "one", 5)
    seen = {}
    for work in dense_work(graph):
        nodes = (*work.tensors, *work.outputs)
        for node in nodes:
            for axis in range(len(node.meta["shape"])):
                extents.size((node, axis))
        counts = extents.counts(gone, graph.root)
        shapes = {node: extents.shape(node, counts) for node in nodes}
        make = standalone(work, shapes, CPU)
        assert make is not None, work.call.name
        result = make()()
        assert tuple(result.shape) == shapes[work.call.node]
        assert work.free == (work.call.name in ("flatten", "transpose"))
        seen[work.call.name] = description(work, shapes)
    # The groups of the depthwise convolution, the norm's shape and the reshape's size follow.
    assert seen["conv2d"].startswith("conv2d(float32[2, 5, 4, 4], float32[5, 1, 3, 3]")
    assert seen["layer_norm"].startswith("layer_norm(float32[32, 5], [16]")
    assert seen["linear"] == "linear(float32[32, 5], float32[5, 5], float32[5])"


@pytest.mark.parametrize("name", ["regnet", "llama", "recurrent", "vit"])
def test_every_call_of_a_model_runs_by_itself(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    config = [{"sparsity": 0.5, "op_types": ["default"]}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is pinned is left alone
        pruner = L1FilterPruner(model.eval(), config, mode="dependency_aware", dummy_input=x)
        coupling = pruner.scored_atoms().coupling
        gone = coupling.choose()
    cost = LatencyCost(coupling.graph)
    every = [work for work in dense_work(coupling.graph) if not work.free]
    assert len(every) == len(cost.work)  # all run on fake tensors
    assert cost.touched(np.flatnonzero(gone), coupling.roots).any()
    for work, shapes in cost.shapes(gone, coupling.roots):
        assert standalone(work, shapes, CPU) is not None, (work.call.name, shapes)


def test_the_layout_is_that_of_the_model():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    x = torch.rand(1, 4, 4, 4).to(memory_format=torch.channels_last)
    graph = ChannelGraph(model, x)
    conv, relu = dense_work(graph)
    shapes = {node: node.meta["shape"] for node in (*conv.tensors, *relu.tensors, *relu.outputs)}
    assert "float32[1, 8, 2, 2] as [0, 2, 3, 1]" in description(relu, shapes)
    made = standalone(relu, shapes, CPU)()()
    assert made.is_contiguous(memory_format=torch.channels_last) and not made.is_contiguous()


def test_a_call_is_timed_once_and_the_sum_is_theirs(monkeypatch):
    clock, (model, x) = Clock(monkeypatch), chain()
    graph = ChannelGraph(model, x)
    cost = cost_model("latency", graph)
    assert cost.dense == pytest.approx(time_of(lambda: model(x)))
    asked = clock.calls
    assert cost.dense and clock.calls == asked
    gone = without(graph, "one", 9)
    places = 2 * 4 * 4
    saved = places * 1e-4 * (
        (32 - stairs(9)) * stairs(3) + 24 * (32 - stairs(9)) + (32 - 9)
    )  # fmt: skip
    assert cost(gone, graph.root) == pytest.approx(cost.dense - saved)
    # Both convolutions and a relu have other sizes; each is timed three times.
    assert clock.calls == asked + 3 * 3


def test_a_measured_model_calibrates_what_is_predicted(monkeypatch):
    Clock(monkeypatch)
    model, x = chain()
    graph = ChannelGraph(model, x)
    cost = LatencyCost(graph)
    whole, some, few = (without(graph, "one", units) for units in (32, 16, 8))
    alone = [cost(each, graph.root) for each in (whole, some, few)]
    measured = [FIXED_MS + SLOWER * each for each in alone]
    cost.calibrate(whole, graph.root, measured[0])
    assert cost.dense == pytest.approx(measured[0])
    assert cost(few, graph.root) == pytest.approx(alone[2] * measured[0] / alone[0])
    before = abs(cost(some, graph.root) / measured[1] - 1)
    cost.calibrate(few, graph.root, measured[2])
    assert cost(few, graph.root) == pytest.approx(measured[2])
    assert abs(cost(some, graph.root) / measured[1] - 1) < before / 3


def test_the_table_is_kept_in_a_file_by_machine(monkeypatch, tmp_path):
    clock, (model, x) = Clock(monkeypatch), chain()
    graph, path = ChannelGraph(model, x), tmp_path / "latency.json"
    dense = LatencyCost(graph, LatencyTable(path)).dense
    stored = json.loads(path.read_text())
    (machine,) = stored
    assert f"torch {torch.__version__}" in machine and "threads" in machine
    assert any(call.startswith("conv2d(float32[2, 3, 4, 4]") for call in stored[machine])
    asked = clock.calls
    assert LatencyCost(graph, LatencyTable(path)).dense == dense and clock.calls == asked
    monkeypatch.setattr(table_module, "device_name", lambda device: "another machine")
    assert LatencyCost(graph, LatencyTable(path)).dense == dense and clock.calls > asked
    assert len(json.loads(path.read_text())) == 2


def test_what_another_process_wrote_meanwhile_stays_in_the_file(tmp_path, monkeypatch):
    Clock(monkeypatch)
    path = tmp_path / "latency.json"
    one, two = LatencyTable(path), LatencyTable(path)
    one.measure({"f(1)": lambda: lambda: None}, CPU)
    two.measure({"f(2)": lambda: lambda: None}, CPU)
    (times,) = json.loads(path.read_text()).values()
    assert set(times) == {"f(1)", "f(2)"}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', '{"a": {"b": "c"}}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(StateError, match=r"latency.json: is no table of latencies"):
        LatencyTable(path)
    assert path.read_text() == text


def test_the_least_of_three_medians_counts(monkeypatch):
    times = iter([5.0, 7.0, 2.0, 9.0, 4.0, 8.0])
    monkeypatch.setattr(table_module, "call_ms", lambda run, device: next(times))
    table = LatencyTable()
    table.measure({"a": lambda: None, "b": lambda: None}, CPU)  # in turn: a b a b a b
    assert (table["a", CPU], table["b", CPU]) == (2.0, 7.0)


def test_a_call_that_runs_at_no_other_size_is_scaled_by_its_output(monkeypatch):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.two(F.relu(self.one(x)))

    Clock(monkeypatch)
    graph = ChannelGraph(Stubborn(), torch.rand(3, 4))
    relu = next(n for n in graph.trace.nodes if n.meta["name"] == "relu")
    real = relu.target

    def only_whole(x, inplace=False):
        if x.shape[-1] != 8:
            raise RuntimeError("only 8")
        return real(x)

    cost = LatencyCost(graph)
    relu.target = only_whole
    index = [work.call.name for work in cost.work].index("relu")
    whole = cost.times(np.zeros(graph.space.size, bool), graph.root)[index]
    half = cost.times(without(graph, "one", 4), graph.root)[index]
    assert whole == pytest.approx(24e-4) and half == pytest.approx(whole / 2)


def test_the_random_state_and_the_model_stay():
    model, x = chain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    cost = cost_model("latency", ChannelGraph(model.train(), x))
    assert 0 < cost.dense < 1000  # by the real clock
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_predicted_is_what_the_shrunk_model_takes(monkeypatch):
    Clock(monkeypatch)
    model, x = chain()
    config = [{"sparsity": 0.5, "op_types": ["default"]}]
    atoms = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x).scored_atoms()
    gone = atoms.coupling.choose()
    with pytest.warns(UserWarning, match="nothing of 'fc'"):
        atoms.coupling.warn_of_untouched(gone)
    cost = LatencyCost(atoms.coupling.graph)
    predicted = cost(gone, atoms.coupling.roots)
    small = ModelSpeedup(model, x, atoms.masks(gone)).speedup_model()
    assert FIXED_MS + SLOWER * predicted == pytest.approx(model_ms(small, x))
