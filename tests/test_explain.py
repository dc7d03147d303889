"""Questions to the channel graph and to a speedup: what goes together, what holds a unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import ChannelGraph, L1FilterPruner, ModelSpeedup
from compress.errors import GraphError


class Residual(nn.Module):
    """conv1 + conv2, normed, read by conv3; a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv3, self.out = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.norm(x + self.conv2(x.relu())).relu()
        return self.out(self.conv3(x).relu().mean((2, 3)))


class Block(nn.Module):
    """Attention over a residual stream with a LayerNorm, heads of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 18), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, 3)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class Solve(nn.Module):
    """A layer of a function that has no rule: (…, n) to (…, n)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features) + 0.1 * torch.rand(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(self.weight.expand(len(x), -1, -1), x.mT).solution.mT


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.solve, self.last = nn.Linear(4, 6), Solve(6), nn.Linear(6, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.solve(self.first(x)))


def pictures() -> Tensor:
    return torch.rand(2, 3, 6, 6)


def gone(module: nn.Module, *units: int) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in module.named_parameters():
        masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        masks[name][list(units)] = False
    return masks


def test_groups_hold_the_axes_that_go_together() -> None:
    graph = ChannelGraph(Residual().eval(), pictures())
    group = next(g for g in graph.groups() if g.members[0].parameter == "conv1.weight")
    axes = {(m.parameter, m.axis, m.reads) for m in group.members}
    assert axes == {
        ("conv1.weight", 0, False), ("conv1.bias", 0, False),
        ("conv2.weight", 0, False), ("conv2.bias", 0, False), ("conv2.weight", 1, True),
        ("norm.weight", 0, False), ("norm.bias", 0, False),
        ("norm.running_mean", 0, False), ("norm.running_var", 0, False),
        ("conv3.weight", 1, True),
    }  # fmt: skip
    assert group.units == 6
    assert not group.held
    assert all(m.positions == tuple(range(6)) for m in group.members)
    assert "conv3.weight axis 1 [0-5]" in str(group)
    out = next(g for g in graph.groups() if g.members[0].parameter == "out.weight")
    assert "is an output of the model at out (test_explain.py" in out.held[0]


def test_a_concatenation_has_a_group_for_each_branch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    graph = ChannelGraph(Two(), pictures())
    read = {
        g.members[0].parameter: m.positions
        for g in graph.groups()
        for m in g.members
        if m.parameter == "c.weight" and m.axis == 1
    }
    assert read == {"a.weight": (0, 1), "b.weight": (2, 3, 4, 5)}
    assert graph.coupled("a") == []
    assert graph.coupled("a", readers=True) == ["c"]


def test_coupled_names_the_layers_that_shrink_together() -> None:
    graph = ChannelGraph(Residual().eval(), pictures())
    assert graph.coupled("conv1") == ["conv2", "norm"]
    assert graph.coupled("norm") == ["conv1", "conv2"]
    assert graph.coupled("conv2", readers=True) == ["conv1", "norm", "conv3"]
    assert graph.coupled("conv3") == []


def test_a_convolution_inside_a_residual_makes_units_of_its_own() -> None:
    graph = ChannelGraph(Residual().eval(), pictures())
    assert not graph.layers["conv2.weight"].follows  # though its outputs are tied to its inputs
    depthwise = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    graph = ChannelGraph(depthwise, pictures())
    assert [units.follows for units in graph.layers.values()] == [False, True, False]
    model, config = Residual(), [{"sparsity": 0.5, "op_names": ["conv1", "conv3"]}]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=pictures())
    with pytest.warns(UserWarning, match="nothing of 'conv1': it is coupled with 'conv2', not to"):
        _, masks = pruner.compress()
    assert masks["conv1"]["weight"].all()  # conv2 is not to be pruned, nor what it is added to
    assert not masks["conv3"]["weight"].all()
    assert not {"conv2", "norm"} & set(masks)


def test_a_free_channel_says_what_goes_with_it() -> None:
    why = ChannelGraph(Residual().eval(), pictures()).why("conv2", channel=4)
    assert why.free
    assert {m.layer for m in why.members} == {"conv1", "conv2", "norm", "conv3"}
    assert str(why) == (
        "channel 4 of conv2 is free: it is tied to nothing that must stay; with it go channel 4 of "
        "conv1, norm; it is an input of conv2, conv3."
    )


def test_a_held_channel_says_by_which_ties_to_which_pin() -> None:
    class Held(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return x + self.conv2(x.relu())

    graph = ChannelGraph(Held(), pictures())
    why = graph.why("conv2", 1)
    assert not why.free
    assert len(why.path) == 1
    assert why.path[0].startswith("tied to channel 1 of conv1 by add at the model's forward (test_")
    assert "is an output of the model" in why.reason
    assert str(why).startswith("channel 1 of conv2 is held: tied to channel 1 of conv1 by add")


def test_a_fixed_size_says_where_it_comes_from() -> None:
    graph = ChannelGraph(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), torch.rand(2, 6))
    (group,) = (g for g in graph.groups() if g.members[0].parameter == "1.weight" and
                g.members[0].axis == 1)  # fmt: skip
    assert "feeds linear as a fixed size" in group.held[0]
    assert "(the fixed one is an input of the model)" in group.held[0]

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x).softmax(-1) + self.second(x[:, :2]).relu()).sum(-1)

    why = str(ChannelGraph(After(), torch.rand(2, 3)).why("second", 0))
    assert "meets a tensor of fixed size in add" in why
    assert "(the fixed one is what softmax works over at the model's forward (" in why


def test_heads_are_coupled_and_cells_go_with_their_row_or_column() -> None:
    graph = ChannelGraph(Block(), torch.rand(2, 5, 8))
    why = graph.why("qkv", 4)
    assert why.free
    assert "is a cell of 2 x 3" in why.reason
    assert "goes with its whole row or whole column" in why.reason
    assert not graph.why("out", 0).free


@pytest.mark.parametrize(
    ("layer", "channel", "text"),
    [
        ("conv9", 0, "no layer with units by this name ran"),
        ("conv1", 6, "from 0 to 5"),
        ("conv1", -1, "from 0 to 5"),
        ("conv1", True, "from 0 to 5"),
    ],
)
def test_what_is_not_there_is_refused_by_name(layer: str, channel: int, text: str) -> None:
    graph = ChannelGraph(Residual().eval(), pictures())
    with pytest.raises(GraphError, match=text):
        graph.why(layer, channel)
    if "name" in text:
        with pytest.raises(GraphError, match="did you mean 'conv3'"):
            graph.coupled(layer)


def test_why_a_masked_channel_stays_or_goes() -> None:
    model = Residual().eval()
    masks = {
        "conv1": gone(model.conv1, 0, 1),
        "conv2": gone(model.conv2, 1),
        "norm": gone(model.norm, 1),
    }
    speedup = ModelSpeedup(model, pictures(), masks)
    before = str(speedup.why("conv1", 0))
    assert (
        "stays: it is masked in conv1; it is not masked in conv2; it is read by conv3 (" in before
    )
    assert "goes: it is masked in conv1, conv2; it is read by nothing" in str(
        speedup.why("conv2", 1)
    )
    speedup.speedup_model()
    assert str(speedup.why("conv1", 0)) == before  # channels count as they were
    assert "is an output of the model" in str(speedup.why("out", 1))
    with pytest.raises(GraphError):
        speedup.why("conv3", 4)


def test_the_report_tells_what_is_coupled_and_where_constants_went() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    nn.init.constant_(model.norm.bias, 2.0)
    masks = {"conv1": gone(model.conv1, 0, 1, 2), "conv2": gone(model.conv2, 0, 1)}
    speedup = ModelSpeedup(model, pictures(), masks)
    speedup.speedup_model()
    layers = {layer.layer: layer for layer in speedup.report.layers}
    assert layers["conv1"].coupled == ("conv2",)
    assert (layers["conv1"].masked, layers["conv1"].removed) == (3, 2)
    assert layers["conv1"].unmasked_elsewhere == 1
    assert layers["conv2"].unmasked_elsewhere == 0
    assert speedup.report.constants_folded == ("conv3.bias",)
    text = str(speedup.report)
    assert "go together: conv1, conv2" in text
    assert "; 1 unmasked in a coupled layer" in text
    assert "constants added to: conv3.bias" in text


def test_weights_that_no_rule_calls_units_are_reported_too() -> None:
    model = Opaque()
    masks = {
        "first": gone(model.first, 0),
        "solve": {"weight": gone(model.solve, 3)["weight"]},
        "unused": {"weight": gone(model.unused, 1)["weight"]},
        "last": {"weight": torch.zeros(1, 6)},
    }
    speedup = ModelSpeedup(model, torch.rand(2, 3, 4), masks)
    speedup.speedup_model()
    kept = {layer.layer: " ".join(layer.kept) for layer in speedup.report.layers}
    assert "goes through linalg_lstsq, which has no rule at solve" in kept["first"]
    assert "goes through linalg_lstsq, which has no rule at solve" in kept["solve"]
    assert kept["unused"] == "is used by nothing that ran"
    assert kept["last"] == "is the only one of its axis"


class CountedByTheWidth(nn.Module):
    """The heads are put side by side by the number of the input's own features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, n, c = x.shape
        q, k, v = (m(x).view(b, n, -1, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, c))  # heads


def test_a_reason_leads_to_what_holds_it() -> None:
    torch.manual_seed(0)
    model, keep = CountedByTheWidth(), torch.arange(16) >= 4
    weight = keep[:, None].expand(16, 16).clone()
    masks = {name: {"weight": weight, "bias": keep} for name in ("q", "k", "v")}
    speedup = ModelSpeedup(model, torch.rand(2, 3, 16), masks)
    speedup.speedup_model()
    text = str(speedup.why("q", 1))
    line = 1 + next(
        i for i, x in enumerate(Path(__file__).read_text().splitlines()) if "# heads" in x
    )
    row, column = text.index("its row "), text.index("its column sets the scale of attention")
    counted = text.index(
        f"is counted together with other units at the model's forward (test_explain.py:{line})"
    )
    assert row < counted < text.index("where one is an output of the model") < column
