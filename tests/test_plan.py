"""The plan before the cut: a dry run that is carried out later; and speedups that are not exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import draw_network
from oracle import SeededChoices, draw_masks, masked_copy, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ChannelGraph, L1FilterPruner, Masks, ModelSpeedup
from compress.errors import SpeedupError, TraceError
from compress.graph.explain import layer_of
from compress.speedup.plan import same_plan


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double().eval()  # fmt: skip
    randomise(model)
    for norm in (model[1], model[4]):
        nn.init.constant_(norm.bias, 3.0)  # so that masked channels are constants behind the ReLU
    return model


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def units(module: nn.Module, *gone: int) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in module.named_parameters():
        masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        masks[name][list(gone)] = False
    return masks


def everything(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()}
    for path, module in model.named_modules():
        state[f"{path}:mode"] = module.training
        for name in ("in_channels", "out_channels", "num_features", "in_features"):
            state[f"{path}:{name}"] = getattr(module, name, None)
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items()
    )


@pytest.mark.parametrize("applied", [False, True])
def test_a_plan_changes_nothing_and_is_then_carried_out(applied: bool) -> None:
    model, masks = chain().train(), {}
    masks = {"0": units(model[0], 1, 2), "3": units(model[3], 0, 4, 5)}
    if applied:
        Masks(masks).apply(model)
    before, random = everything(model), torch.get_rng_state()
    parameters = [id(p) for p in model.parameters()]
    speedup = ModelSpeedup(model, pictures(), {} if applied else masks)
    plan, planned = copy.deepcopy(speedup.plan), speedup.report
    assert same(before, everything(model))
    assert parameters == [id(p) for p in model.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    assert planned.planned
    assert planned.relative_error is None
    assert "nothing is done yet" in planned.summary()
    text = str(plan)
    assert "(6, 3, 3, 3)" in text
    assert "(5, 3, 3, 3)" in text  # one channel stays to carry the constants
    assert "carries 1 of axis 1" in text
    assert "takes constants" in text
    assert "3.out_channels" in text
    speedup.speedup_model()
    assert same_plan(plan, speedup.plan)
    assert not speedup.report.planned
    assert speedup.report.parameters_after == planned.parameters_after
    assert speedup.report.layers == planned.layers
    for path, shape in ((p, cut.shape(plan.shapes[p])) for p, cut in plan.slices.items()):
        assert tuple(model.state_dict()[path].shape) == shape


def test_a_plan_that_no_longer_fits_is_refused() -> None:
    model = chain()
    speedup = ModelSpeedup(model, pictures(), {"0": units(model[0], 0, 1)})
    assert speedup.plan.slices
    with torch.no_grad():
        model[3].weight.data[:, 2] = 0  # by data: no version counts it
        model[1].bias.data[2] = model[1].weight.data[2] = 0
        model[0].weight.data[2] = model[0].bias.data[2] = 0
    before = everything(model)
    with pytest.raises(SpeedupError, match="changed since the plan was made"):
        speedup.speedup_model()
    assert same(before, everything(model))
    model[1].running_mean = model[1].running_mean.clone()
    with pytest.raises(SpeedupError, match=r"1\.running_mean is another tensor"):
        speedup.speedup_model()


def test_a_plan_for_a_model_on_the_meta_device() -> None:
    real = chain()
    masks = {"0": units(real[0], 1, 2), "3": units(real[3], 0)}
    expected = ModelSpeedup(real, pictures(), masks).report
    with torch.device("meta"):
        model = chain()
    speedup = ModelSpeedup(model, pictures(), masks)
    assert speedup.report.parameters_after == expected.parameters_after
    assert [x.removed for x in speedup.report.layers] == [x.removed for x in expected.layers]
    assert "meta device" in str(speedup.plan)
    assert "meta device" in str(speedup.report)
    assert "is read by" in str(speedup.why("0", 0))
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(SpeedupError, match=r"0\.weight: it has no values yet"):
        speedup.speedup_model()


def test_a_model_that_looks_at_its_data_needs_values_for_a_plan() -> None:
    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if float(self.weight.sum()) > 0 else 3.0)

    with torch.device("meta"):
        model = nn.Sequential(Looking(4, 6), nn.Linear(6, 2))
    with pytest.raises(TraceError, match=r"meta device.*Load it to a device"):
        _ = ModelSpeedup(model, torch.rand(2, 4), {"0": units(nn.Linear(4, 6), 1)}).plan


def test_a_plan_follows_sizes_that_the_code_counts() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.a, self.b = 6, nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, self.width))

    model = Counting()
    speedup = ModelSpeedup(model, torch.rand(2, 4), {"a": units(model.a, 1, 2)})
    assert ("width", 6, 4) in [(a.name, a.old, a.new) for a in speedup.plan.attributes]
    assert model.width == 6
    speedup.speedup_model()
    assert model.width == 4


# -- not exact -----------------------------------------------------------------------------


class Normed(nn.Module):
    """A residual stream under norms of two kinds, as a transformer's."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8)) if by_hand else None
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.scale is None:
            y = self.norm(x)
        else:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.head(x + self.down(F.gelu(self.up(y))))


@pytest.mark.parametrize("by_hand", [False, True])
def test_not_exact_takes_what_a_norm_reads(by_hand: bool) -> None:
    model = Normed(by_hand).double()
    randomise(model)
    masks = {name: units(model.get_submodule(name), 0, 3) for name in ("first", "down")}
    x = torch.randn(4, 5).double()
    exact = copy.deepcopy(model)
    ModelSpeedup(exact, x, masks).speedup_model()
    assert exact.first.out_features == 8
    masked = masked_copy(model, masks)
    speedup = ModelSpeedup(model, x, masks, exact=False)
    speedup.speedup_model()
    assert (model.first.out_features, model.up.in_features, model.head.in_features) == (6, 6, 6)
    if not by_hand:
        assert model.norm.normalized_shape == (6,)
    expected = masked(x)
    off = float(((expected - model(x)).abs().max() / expected.abs().max()).detach())
    assert off > 1e-3
    assert speedup.report.relative_error == pytest.approx(off)
    assert "exact=False ignores" in str(speedup.why("first", 0))


def test_not_exact_needs_every_producer_masked_with_its_bias() -> None:
    model = Normed(False)
    one = {"first": units(model.first, 0), "down": {"weight": units(model.down, 0)["weight"]}}
    speedup = ModelSpeedup(model, torch.rand(4, 5), one, exact=False)
    speedup.speedup_model()
    assert model.first.out_features == 8
    assert speedup.report.relative_error < 1e-6


def test_not_exact_drops_constants_unless_they_are_to_be_folded() -> None:
    offs = []
    for options in ({}, {"constants": "fold"}):
        model = chain()
        speedup = ModelSpeedup(
            model, pictures(), {"0": units(model[0], 0, 1)}, exact=False, **options
        )
        speedup.speedup_model()
        assert model[0].out_channels == 4  # no carrier
        offs.append(speedup.report.relative_error)
    assert offs[1] < offs[0]


def test_not_exact_leaves_statistics_of_a_weight_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / self.weight.mean(), self.bias)

    model = nn.Sequential(nn.Linear(4, 6), Scaled(6, 2)).double()
    masks = {"0": units(model[0], 1)}
    speedup = ModelSpeedup(model, torch.rand(2, 4).double(), masks, exact=False)
    speedup.speedup_model()
    assert model[1].in_features == 6
    assert speedup.report.relative_error < 1e-12


def test_not_exact_keeps_what_the_structure_holds() -> None:
    model = chain()
    ModelSpeedup(model, pictures(), {"8": units(model[8], 0)}, exact=False).speedup_model()
    assert model[8].out_features == 4


def test_masks_of_a_pruner_go_whole_where_exactness_is_not_asked_for() -> None:
    model = chain()
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    model, masks = L1FilterPruner(model, config).compress()
    ModelSpeedup(model, pictures(), masks, exact=False).speedup_model()
    assert (model[0].out_channels, model[3].out_channels) == (3, 4)


# -- over drawn networks -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(12))
def test_plans_answers_and_cuts_agree_on_drawn_networks(seed: int) -> None:
    choices = SeededChoices(seed)
    model, x = draw_network(choices, 6, torch.float64)
    masks = draw_masks(choices, model)
    direct = ModelSpeedup(copy.deepcopy(model), x, masks, verify=False)
    direct.speedup_model()
    before = everything(model)
    speedup = ModelSpeedup(model, x, masks, verify=False)
    assert same_plan(speedup.plan, direct.plan)
    assert same(before, everything(model))
    graph = ChannelGraph(model, x)
    removed = {layer.layer: layer.removed for layer in speedup.report.layers}
    for path, units in graph.layers.items():
        name = layer_of(graph, path)
        answers = [speedup.why(path, channel) for channel in range(len(units.labels))]
        assert sum(answer.free for answer in answers) == removed.get(name, 0), name
        for channel, answer in enumerate(answers):
            assert str(answer).startswith(f"channel {channel} of {path} ")
            if not graph.why(path, channel).free:
                assert not answer.free
    assert speedup.speedup_model() is model
    assert same_plan(speedup.plan, direct.plan)
    shapes = {name: p.shape for name, p in direct.model.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
