"""The recorded run: its nodes, stale names of written memory, and what stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from oracle import check_exact, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner
from compress.errors import ConfigError, TraceError
from compress.graph.run import record
from compress.graph.trace import Trace, is_output
from compress.graph.watch import function_name
from compress.rules.registry import RULES


class Forward(nn.Module):
    """A convolution, any function, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(channels, 2, 1)
        self.function = function
        randomise(self)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)))


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


def names(trace: Trace) -> list[str]:
    """Plain names of the calls, in order."""
    return [node.meta["name"] for node in trace.nodes if node.op == "call_function"]


def filters(model: Forward, *gone: int) -> dict[str, dict[str, Tensor]]:
    keep = torch.ones(4)
    keep[list(gone)] = 0
    weight = keep.reshape(-1, 1, 1, 1).expand_as(model.conv.weight)
    return {"conv": {"weight": weight, "bias": keep}}


# -- nodes ---------------------------------------------------------------------------------


def test_every_call_is_a_node_with_its_shape_module_and_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    trace = record(model, pictures().float())
    assert names(trace) == ["conv2d", "batch_norm", "relu"]
    calls = [n for n in trace.nodes if n.op == "call_function"]
    assert [n.meta["module"] for n in calls] == ["0", "1.0", "1.1"]
    assert {n.meta["shape"] for n in calls} == {(2, 4, 3, 3)}
    assert {n.meta["dtype"] for n in calls} == {torch.float32}
    assert trace.outputs == [calls[-1]]
    assert trace.on_meta and trace.complete and not trace.training and not trace.partial


def test_source_is_the_user_s_line() -> None:
    trace = record(Forward(lambda x: x * 2), pictures())
    product = next(n for n in trace.nodes if n.meta["name"] == "mul")
    file, line = product.meta["source"]
    assert file == __file__
    with open(__file__) as lines:
        assert "x * 2" in lines.read().splitlines()[line - 1]


def test_leaves_are_the_parameters_and_buffers_that_the_run_used() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    trace = record(model, pictures().float())
    assert set(trace.leaves) == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    }  # fmt: skip
    assert trace.leaves["0.weight"].meta["tensor"] is model[0].weight
    assert trace.leaves["0.weight"].meta["name"] == "parameter"
    assert trace.leaves["1.running_var"].meta["name"] == "buffer"


def test_a_module_called_twice_uses_its_leaves_twice() -> None:
    layer = nn.Conv2d(3, 3, 1)
    trace = record(nn.Sequential(layer, nn.ReLU(), layer), pictures().float())
    assert list(trace.leaves) == ["0.weight", "0.bias"]
    assert len(trace.leaves["0.weight"].users) == 2


def test_several_outputs_of_a_call_are_nodes_of_their_own() -> None:
    trace = record(Forward(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), pictures())
    chunk = next(n for n in trace.nodes if n.meta["name"] == "chunk")
    assert chunk.meta["shape"] == ((2, 2, 5, 5), (2, 2, 5, 5))
    parts = [n for n in trace.nodes if n.meta["name"] == "getitem_output"]
    assert [n.args for n in parts] == [(chunk, 0), (chunk, 1)]
    cat = next(n for n in trace.nodes if n.meta["name"] == "cat")
    assert cat.all_input_nodes == parts[::-1]


def test_nested_outputs_are_all_outputs() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"a": x + 1, "b": [x + 2, None, (x + 3,)], "c": 4}

    trace = record(Several(), pictures())
    assert [n.meta["name"] for n in trace.outputs] == ["add"] * 3


def test_networkx_is_the_same_graph_without_cycles() -> None:
    trace = record(Forward(lambda x: x + x.relu() * x.mean()), pictures())
    graph = trace.networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert list(graph) == trace.nodes
    for node in trace.nodes:
        assert set(graph.predecessors(node)) == set(node.all_input_nodes)
        assert set(graph.successors(node)) == set(node.users)
        assert graph.nodes[node]["shape"] == node.meta["shape"]
    assert nx.has_path(graph, trace.leaves["conv.weight"], trace.outputs[0])
    trace.graph.lint()


def test_getitem_and_setitem() -> None:
    def function(x: Tensor) -> Tensor:
        x[:, 0] = x[:, 1] * 2
        return x

    trace = record(Forward(function), pictures())
    assert [n for n in names(trace) if "item" in n] == ["getitem", "setitem"]
    head = next(n for n in trace.nodes if n.meta["name"] == "conv2d" and n.meta["module"] == "head")
    assert head.args[0].meta["name"] == "setitem"


# -- names ---------------------------------------------------------------------------------


def written(x: Tensor) -> Tensor:
    condition = x > 0
    condition &= x < 5
    condition |= x > 6
    condition ^= x > 7
    return condition * x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 1 - x, lambda x: 2 + x, lambda x: 2 * x, lambda x: 1 / (x.abs() + 1),
        lambda x: 2**x, lambda x: x**2, lambda x: 3 // (x.abs() + 1), lambda x: -x,
        lambda x: x % 2, lambda x: (x > 0) * x, lambda x: (True & (x > 0)) * x,
        lambda x: (False | (x >= 0)) * x, lambda x: (True ^ (x != 0)) * x, lambda x: ~(x > 0) * x,
        lambda x: ((x > 0) | (x < 1)) * x, lambda x: ((x > 0) & (x < 1)) * x,
        lambda x: ((x > 0) ^ (x < 1)) * x, F.logsigmoid, lambda x: 2 % (x.abs() + 1), written,
    ],
)  # fmt: skip
def test_operators_are_recorded_under_names_that_have_a_rule(
    function: Callable[[Tensor], Tensor],
) -> None:
    model = Forward(function)
    assert [name for name in names(record(model, pictures())) if name not in RULES] == []
    check_exact(model, pictures(), filters(model, 1, 2))
    assert model.conv.out_channels == 2


def test_an_attribute_goes_by_its_name() -> None:
    assert function_name(torch.Tensor.T.__get__) == "T"
    assert function_name(torch.Tensor.data.__set__) == "set_data"
    written_in_python = torch.Tensor.__cuda_array_interface__
    assert isinstance(written_in_python, property)
    assert function_name(written_in_python.__get__) == "__cuda_array_interface__"


def test_a_factory_has_no_rule_of_an_operator() -> None:
    """``torch.rand`` and a reflected ``&``, ``__rand__``, would have one plain name."""
    trace = record(Forward(lambda x: x + torch.rand(5)), pictures())
    assert "rand" in names(trace)
    assert "rand" not in RULES


# -- writing in place ----------------------------------------------------------------------


def _through_a_view(x: Tensor) -> Tensor:
    half = x[:, :2]
    half.mul_(3.0)
    return x


def _view_of_a_view(x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], 4, -1)
    flat[:, 1:].relu_()
    return x + flat.view_as(x)


def _base_through_the_view(x: Tensor) -> Tensor:
    first = x[:, :1]
    x.add_(1.0)
    return x * first


def _detached(x: Tensor) -> Tensor:
    other = x.detach()
    other += 1.0
    return x


def _permuted(x: Tensor) -> Tensor:
    x.permute(0, 2, 3, 1)[..., 0].zero_()
    return x


def _split_parts(x: Tensor) -> Tensor:
    for i, part in enumerate(x.split(1, 1)):
        part *= i
    return x


def _out_argument(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    torch.add(x, 1.0, out=result)
    return result


def _out_is_the_input(x: Tensor) -> Tensor:
    torch.mul(x, 2.0, out=x)
    return x


def _data(x: Tensor) -> Tensor:
    x.data.add_(2.0)
    return x


def _unsqueezed(x: Tensor) -> Tensor:
    x.unsqueeze(1).mul_(torch.arange(4.0).double().reshape(4, 1, 1))
    return x


def _expanded_read(x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    x *= 2.0
    return x - mean


def _copied(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, 1:] = x[:, 1:]
    return result


def _chunks_swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    a.copy_(b)
    return x


def _masked_fill(x: Tensor) -> Tensor:
    x.masked_fill_(x > 0.5, 0.25)
    return x


def _real_and_reshape(x: Tensor) -> Tensor:
    same = x.reshape(x.shape)  # the same memory
    same.neg_()
    return x


def _transposed_twice(x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    y.transpose(1, 2)[:, 3].fill_(1.0)
    return y.transpose(1, 2)


def _flattened(x: Tensor) -> Tensor:
    x.flatten(1)[:, :30] = 0.5
    return x


WRITES = [
    _detached, _data,
    _through_a_view, _view_of_a_view, _base_through_the_view, _permuted, _split_parts,
    _out_argument, _out_is_the_input, _unsqueezed, _expanded_read, _copied, _chunks_swapped,
    _masked_fill, _real_and_reshape, _transposed_twice, _flattened,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("gone", [(0,), (1, 3), (0, 1, 2, 3)])
def test_writing_in_place_stays_exact(
    function: Callable[[Tensor], Tensor], gone: tuple[int, ...]
) -> None:
    model = Forward(function)
    check_exact(model, pictures(), filters(model, *gone), trains=False)


@pytest.mark.parametrize(
    "function",
    [
        _split_parts,
        _base_through_the_view,
        _detached,
    ],
)
def test_another_name_of_written_memory_is_stale(function: Callable[[Tensor], Tensor]) -> None:
    assert "stale_alias" in names(record(Forward(function), pictures()))


def test_what_is_written_through_an_index_is_written_there() -> None:
    trace = record(Forward(_through_a_view), pictures())
    assert names(trace) == ["conv2d", "getitem", "mul", "setitem", "conv2d"]


def test_in_place_activation_is_an_ordinary_call() -> None:
    model = Forward(lambda x: x.relu_())
    assert names(record(model, pictures())) == ["conv2d", "relu", "conv2d"]
    check_exact(model, pictures(), filters(model, 2))
    assert model.conv.out_channels == 3


# -- what a trace leaves alone -------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("looks", [False, True])
def test_a_trace_changes_nothing(training: bool, looks: bool) -> None:
    """Neither on the meta device nor, where the model looks at its data, on real tensors."""

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x * 2 if looks and x.sum().item() > 0 else x

    model = Model(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train(training)
    randomise(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    drawn = torch.get_rng_state()
    trace = record(model, pictures().float())
    assert trace.on_meta is not looks
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert objects == [id(p) for p in model.parameters()]
    assert all(m.training is training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parameters_that_only_train_mode_uses_are_recorded_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aux = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.conv(x)
            return (x, self.aux(x)) if self.training else x

    trace = record(Auxiliary(), pictures().float())
    assert trace.training
    assert "aux.weight" in trace.leaves


@pytest.mark.parametrize("looks", [False, True])
def test_a_run_in_train_mode_that_reaches_no_more_leaves_nothing(looks: bool) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.conv(x).relu()
            if looks and x.max() < 0:
                return x
            return x + x.mean() if self.training else x

    trace = record(Unused(), pictures().float())
    assert not trace.training
    expected = ["conv2d", "relu", *(["max", "lt", "read_value"] if looks else [])]
    assert names(trace)[: len(expected)] == expected
    assert not any(node.meta["training"] for node in trace.nodes if node.op == "call_function")
    assert "mean" not in names(trace)
    assert len(trace.outputs) == 1
    assert not set(trace.outputs) - set(trace.nodes)
    assert len(trace.jumps) == int(looks)


def test_an_input_that_only_train_mode_returns_is_no_output() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return (self.conv(x), x) if self.training else self.conv(x)

    trace = record(Returned(), pictures().float())
    assert [node for node in trace.nodes if is_output(node)] == trace.outputs
    assert len(trace.outputs) == 1


def test_random_numbers_of_python_and_numpy_are_left_alone() -> None:
    """Models draw from them, too: spectrogram masks, stochastic depth."""
    drawn = []

    def forward(x: Tensor) -> Tensor:
        drawn.append((random.random(), np.random.rand()))
        return x * 2

    states = random.getstate(), np.random.get_state()[1].tolist()
    record(Forward(forward), pictures())
    record(Forward(forward), pictures())
    assert drawn[0] == drawn[-1]
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_look_at_the_data_is_a_node() -> None:
    trace = record(Forward(lambda x: x * 2 if x.mean().item() > 0 else x), pictures())
    assert not trace.on_meta
    assert "read_value" in names(trace)


def test_sizes_that_the_code_reads_are_listed_with_their_module() -> None:
    trace = record(Forward(lambda x: x.reshape(x.shape[0], -1, 5, 5)), pictures())
    assert [(n.meta["name"], module) for n, module, *_ in trace.size_reads] == [("conv2d", "")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_code_that_no_trace_can_see_is_noticed() -> None:
    part = torch.jit.trace(nn.ReLU(), pictures())
    looks = Forward(lambda x: part(x) * 2 if x.mean().item() < 9 else x)  # on real tensors
    assert not record(looks, pictures()).complete


def test_what_numpy_is_given_was_looked_at() -> None:
    trace = record(Forward(lambda x: torch.from_numpy(x.detach().numpy() * 2)), pictures())
    assert trace.complete
    assert "read_value" in names(trace)


def test_a_model_that_does_not_run_is_a_trace_error() -> None:
    with pytest.raises(TraceError, match=r"Forward does not run .*\(2, 5, 5, 5\)") as caught:
        record(Forward(lambda x: x), torch.randn(2, 5, 5, 5).double())
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_scripted_models_are_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(TraceError, match=r"is a RecursiveScriptModule.*before torch\.jit"):
        record(scripted, torch.rand(1, 3))
    with pytest.raises(ConfigError, match="RecursiveScriptModule; pass it before it is scripted"):
        L1FilterPruner(scripted, [{"sparsity": 0.5, "op_types": ["default"]}])
