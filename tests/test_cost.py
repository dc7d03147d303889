"""Costs predicted from the channel graph are those of the model that is really shrunk."""

import warnings

import numpy as np
import pytest
import torch
import torchvision
from oracle import randomise
from torch import nn

from compress import L1FilterPruner, Masks, ModelSpeedup
from compress.cost import cost_model
from compress.errors import ConfigError
from compress.graph.channels import ChannelGraph
from compress.masks import applied_masks
from compress.measure import summarize


class Net(nn.Module):
    """Two convolutions and a linear layer: small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.two = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6 * 4, 5)

    def forward(self, x):
        return self.fc(self.two(torch.relu(self.one(x))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.lstm(self.stem(x))[0].mean(1))


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (1, 8))}


def vit():
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **arguments), torch.rand(1, 3, 32, 32)


def torchvision_vit():
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 40, 48, num_classes=10)
    return model, torch.rand(1, 3, 32, 32)


def of_torchvision(name):
    return lambda: (getattr(torchvision.models, name)(num_classes=10), torch.rand(1, 3, 32, 32))


MODELS = {
    "tiny": lambda: (Net(), torch.rand(2, 3, 2, 2)),
    "resnet18": of_torchvision("resnet18"),
    "mobilenet_v2": of_torchvision("mobilenet_v2"),
    "shufflenet": of_torchvision("shufflenet_v2_x0_5"),
    "regnet": of_torchvision("regnet_x_400mf"),
    "densenet": lambda: (
        torchvision.models.DenseNet(8, (3, 3), 16, num_classes=10), torch.rand(1, 3, 32, 32)
    ),
    "vit": vit,
    "torchvision_vit": torchvision_vit,
    "llama": llama,
    "recurrent": lambda: (Recurrent(), torch.rand(2, 5, 6)),
}  # fmt: skip


def shrunk(name, seed):
    """The graph, what goes, the roots, and the really shrunk model with its input."""
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    randomise(model)
    model.eval()
    config = [{"sparsity": 0.5, "op_types": ["default"]}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is pinned is left alone
        pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
        atoms = pruner.scored_atoms()
        rng = np.random.default_rng(seed)
        drawn = {target.name: float(rng.uniform(0, 0.8)) for target in pruner.targets}
        gone = atoms.coupling.choose(drawn)
    assert gone.any()
    graph, roots = atoms.coupling.graph, atoms.coupling.roots
    predicted = {k: cost_model(k, graph)(gone, roots) for k in ("params", "flops", "memory")}
    small = ModelSpeedup(model, x, atoms.masks(gone), verify=False).speedup_model()
    return predicted, small, x


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_those_of_the_shrunk_model(name):
    predicted, small, x = shrunk(name, seed=1)
    summary, own = summarize(small, x), ChannelGraph(small, x)
    assert predicted["params"] == summary.parameters_total
    # torch's counter does not see into oneDNN's recurrent layers, nor torch's fast attention.
    seen = name not in ("recurrent", "torchvision_vit")
    flops = summary.flops if seen else cost_model("flops", own).dense
    assert predicted["flops"] == pytest.approx(flops, rel=1e-9)
    # A LayerNorm that goes on counting what is gone takes some tensors of its own.
    memory = cost_model("memory", own).dense
    assert predicted["memory"] == pytest.approx(memory, rel=1e-9 if "vit" not in name else 0.02)


def test_the_costs_of_a_small_net_by_hand():
    graph = ChannelGraph(Net(), torch.rand(2, 3, 2, 2))
    weights = 4 * 3 * 9 + (6 * 4 + 6) + (5 * 24 + 5)
    places = 2 * 2 * 2  # two images of 2 x 2
    flops = 2 * (places * 4 * 27 + places * 6 * 4 + 2 * 24 * 5)
    outputs = places * (4 + 4 + 6) + 2 * 5  # flatten is a view
    assert cost_model("params", graph).dense == weights
    assert cost_model("flops", graph).dense == flops
    assert cost_model("memory", graph).dense == 4 * (weights + outputs)
    gone = np.zeros(graph.space.size, bool)
    gone[graph.root[graph.layers["one.weight"].labels[:3]]] = True  # one of four is left
    left = 1 * 3 * 9 + (6 * 1 + 6) + (5 * 24 + 5)
    assert cost_model("params", graph)(gone, graph.root) == left
    flops = 2 * (places * 1 * 27 + places * 6 * 1 + 2 * 24 * 5)
    assert cost_model("flops", graph)(gone, graph.root) == flops
    outputs = places * (1 + 1 + 6) + 2 * 5
    assert cost_model("memory", graph)(gone, graph.root) == 4 * (left + outputs)


def test_what_is_shared_or_written_in_place_counts_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.unused = nn.Parameter(torch.zeros(7))

        def forward(self, x):
            return self.two(self.one(x).relu_())

    graph = ChannelGraph(Shared(), torch.rand(3, 4))
    assert cost_model("params", graph).dense == 16 + 4 + 4 + 7
    assert cost_model("memory", graph).dense == 4 * (31 + 2 * 12)


def test_what_runs_in_train_mode_only_is_a_parameter_and_no_more():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    graph = ChannelGraph(Auxiliary(), torch.rand(5, 4))
    assert graph.trace.training
    assert cost_model("flops", graph).dense == 2 * 5 * (4 * 6 + 6 * 2)
    assert cost_model("params", graph).dense == 4 * 6 + 6 + 2 * (6 * 2 + 2)
    gone = np.zeros(graph.space.size, bool)
    gone[graph.root[graph.layers["stem.weight"].labels[:3]]] = True
    assert cost_model("params", graph)(gone, graph.root) == 4 * 3 + 3 + 2 * (3 * 2 + 2)


def test_masks_on_the_model_change_nothing():
    model = Net()
    graph = ChannelGraph(model, torch.rand(2, 3, 2, 2))
    before = {kind: cost_model(kind, graph).dense for kind in ("params", "memory")}
    masks = Masks({"one": {"weight": torch.rand(4, 3, 3, 3) > 0.5}})
    masks.apply(model)
    assert {kind: cost_model(kind, graph).dense for kind in before} == before
    assert applied_masks(model) == masks


def test_other_roots_after_the_first_ones():
    graph = ChannelGraph(Net(), torch.rand(2, 3, 2, 2))
    cost = cost_model("params", graph)
    one = graph.layers["one.weight"].labels
    joined = graph.root.copy()
    joined[one] = joined[one].min()  # the four go together
    joined = joined[joined]
    gone = np.zeros(graph.space.size, bool)
    gone[graph.root[one[0]]] = True
    assert cost(gone, graph.root) == cost.dense - 27 - 6
    assert cost(gone, joined) == cost.dense - 4 * (27 + 6)


def test_an_unknown_cost_is_refused_with_the_closest_one():
    graph = ChannelGraph(Net(), torch.rand(2, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"cost: got 'flop'; expected .*; did you mean 'flops'\?"):
        cost_model("flop", graph)
