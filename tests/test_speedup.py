"""`ModelSpeedup`: what it takes, what it leaves alone, what it refuses, and small cases by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    MaskDict,
    assert_same_outputs,
    check_exact,
    masked_copy,
    outputs,
    randomise,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from compress import Masks, ModelSpeedup
from compress.errors import MaskError, SpeedupError, TraceError, VerificationError

ROOT = Path(__file__).parent


def plain(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).double().eval()
    randomise(model)
    return model


def chain() -> nn.Sequential:
    """conv-norm-relu-conv-norm-relu-pool-linear."""
    return plain(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def made(model: nn.Module) -> nn.Module:
    """A model of one's own with random numbers everywhere."""
    randomise(model)
    return model.double().eval()


def pictures(channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, side, side, generator=generator).double()


def without(size: int, *gone: int) -> Tensor:
    """A mask of a vector: 0 at these positions."""
    mask = torch.ones(size)
    mask[list(gone)] = 0
    return mask


def filters(layer: nn.Module, *gone: int) -> dict[str, Tensor]:
    """Masks of whole filters, with their biases."""
    masks = {}
    for name, parameter in layer.named_parameters(recurse=False):
        rows = without(parameter.shape[0], *gone)
        masks[name] = rows.reshape(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter).clone()
    return masks


def half_masks(model: nn.Sequential) -> MaskDict:
    masks = {}
    for path in ("0", "1"):
        masks[path] = filters(model.get_submodule(path), 1, 3, 4)
    for path in ("3", "4"):
        masks[path] = filters(model.get_submodule(path), 0, 7)
    return masks


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def everything_in(model: nn.Module) -> dict[str, Any]:
    """All that an error must leave as it was."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "classes": [type(m).__name__ for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything_in(model)
    assert torch.equal(after.pop("random"), before["random"])
    assert list(after["state"]) == list(before["state"])
    for name, tensor in after.pop("state").items():
        assert torch.equal(tensor, before["state"][name]), name
    assert after == {k: v for k, v in before.items() if k in after}


# -- golden cases --------------------------------------------------------------------------


def test_golden_chain() -> None:
    """Masked filters go with their norms, and the columns that would read them."""
    model = chain()
    kept_1, kept_2 = [0, 2, 5], [1, 2, 3, 4, 5, 6]
    old = copy.deepcopy(model.state_dict())
    speedup = check_exact(model, pictures(), half_masks(model))
    new = model.state_dict()
    assert torch.equal(new["0.weight"], old["0.weight"][kept_1])
    assert torch.equal(new["0.bias"], old["0.bias"][kept_1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(new[f"1.{name}"], old[f"1.{name}"][kept_1])
        assert torch.equal(new[f"4.{name}"], old[f"4.{name}"][kept_2])
    assert torch.equal(new["3.weight"], old["3.weight"][kept_2][:, kept_1])
    assert torch.equal(new["8.weight"], old["8.weight"][:, kept_2])
    assert torch.equal(new["8.bias"], old["8.bias"])
    assert (model[0].out_channels, model[3].in_channels, model[3].out_channels) == (3, 3, 6)
    assert (model[1].num_features, model[8].in_features) == (3, 6)
    assert speedup.report.constants_carried == speedup.report.constants_folded == ()
    assert speedup.masks == Masks()


def test_golden_residual_loses_what_both_branches_mask() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
            self.head = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.left(x) + self.right(x))

    model = made(Residual())
    old = copy.deepcopy(model.state_dict())
    masks = {"left": filters(model.left, 0, 1, 2), "right": filters(model.right, 1, 2, 4)}
    check_exact(model, pictures(), masks)
    kept = [0, 3, 4]
    assert torch.equal(model.left.weight[1:], old["left.weight"][[3, 4]])
    assert not model.left.weight[0].any()
    assert torch.equal(model.right.weight[:2], old["right.weight"][[0, 3]])
    assert not model.right.weight[2].any()
    assert torch.equal(model.head.weight, old["head.weight"][:, kept])


def test_golden_concat_loses_each_branch_s_own() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x), x, self.right(x)], 1))

    model = made(Concat())
    old = copy.deepcopy(model.state_dict())
    masks = {"left": filters(model.left, 1), "right": filters(model.right, 0, 2)}
    check_exact(model, pictures(), masks)
    assert torch.equal(model.head.weight, old["head.weight"][:, [0, 2, 3, 4, 5, 6, 8]])


def test_golden_depthwise_dies_with_its_channel() -> None:
    model = plain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 2, 1))
    old = copy.deepcopy(model.state_dict())
    check_exact(model, pictures(), {"0": filters(model[0], 2)})
    assert torch.equal(model[1].weight, old["1.weight"][[0, 1, 3]])
    assert model[1].groups == model[1].in_channels == model[1].out_channels == 3


def test_golden_grouped_keeps_equal_counts_in_each_group() -> None:
    model = plain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2, bias=False), nn.Conv2d(4, 2, 1))
    old = copy.deepcopy(model.state_dict())
    check_exact(model, pictures(), {"0": filters(model[0], 0, 1, 6)})
    assert model[0].out_channels == 6
    assert model[1].weight.shape == (4, 3, 1, 1)
    assert model[1].groups == 2
    assert torch.equal(model[1].weight[2:], old["1.weight"][2:][:, [0, 1, 3]])


def test_golden_columns_that_nobody_reads_free_their_filters() -> None:
    """Masked input columns: the filters of the layer before die, though no mask names them."""
    model = plain(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    mask = torch.ones(2, 5, 1, 1)
    mask[:, [1, 4]] = 0
    old = copy.deepcopy(model.state_dict())
    check_exact(model, pictures(), {"2": {"weight": mask}})
    assert torch.equal(model[0].weight, old["0.weight"][[0, 2, 3]])


def test_golden_constant_goes_into_the_next_bias() -> None:
    """A masked filter under a norm is a constant; without a border it folds exactly."""
    model = plain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    nn.init.constant_(model[1].bias, 2.0)
    speedup = check_exact(model, pictures(), {"0": filters(model[0], 0, 3)})
    assert model[0].out_channels == 2
    assert isinstance(model[3].bias, nn.Parameter)
    assert speedup.report.constants_folded == ("3.bias",)


def test_golden_border_keeps_one_carrier() -> None:
    model = plain(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1))
    nn.init.constant_(model[1].bias, 3.0)
    speedup = check_exact(model, pictures(), {"0": filters(model[0], 0, 1, 2)})
    assert model[0].out_channels == 3
    assert speedup.report.constants_carried == ("3.weight",)


def test_golden_flatten_loses_the_columns_of_its_channels() -> None:
    model = plain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    old = copy.deepcopy(model.state_dict())
    check_exact(model, pictures(), {"0": filters(model[0], 1)})
    columns = [*range(36), *range(72, 144)]
    assert torch.equal(model[3].weight, old["3.weight"][:, columns])


def test_golden_gate_dies_with_its_channel() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.head = (
                nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    model = made(Gated())
    old = copy.deepcopy(model.state_dict())
    check_exact(model, pictures(), {"conv": filters(model.conv, 0, 5)})
    kept = [1, 2, 3, 4]
    assert torch.equal(model.gate.weight, old["gate.weight"][kept][:, kept])


def test_golden_shuffle_and_split() -> None:
    """shufflenet's halves: the labels run through view, transpose and chunk."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.left, self.right = (
                nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            a, b = F.channel_shuffle(self.conv(x), 2).chunk(2, 1)
            return self.left(a) + self.right(b)

    model = made(Shuffled())
    old = copy.deepcopy(model.state_dict())
    # Shuffled by 2, channel 0 1 2 … 7 come as 0 4 1 5 | 2 6 3 7.
    check_exact(model, pictures(), {"conv": filters(model.conv, 0, 4, 3, 7)})
    assert torch.equal(model.conv.weight, old["conv.weight"][[1, 2, 5, 6]])
    assert torch.equal(model.left.weight, old["left.weight"][:, [2, 3]])
    assert torch.equal(model.right.weight, old["right.weight"][:, [0, 1]])


def test_golden_whole_layer_masked_leaves_one_unit() -> None:
    model = chain()
    check_exact(model, pictures(), {"3": filters(model[3], *range(8))})
    assert 1 <= model[0].out_channels <= 2
    assert 1 <= model[3].out_channels <= 2


def test_empty_masks_change_nothing_on_a_live_net() -> None:
    model = chain()
    before = everything_in(model)
    check_exact(model, pictures(), {}, trains=False)
    assert_as_it_was(model, before)


def test_empty_masks_take_what_is_dead_already() -> None:
    model = chain()
    with torch.no_grad():
        model[8].weight[:, 2] = 0
    check_exact(model, pictures(), {})
    assert model[3].out_channels == 7


def test_masks_that_keep_all_change_nothing() -> None:
    model = chain()
    before = everything_in(model)
    check_exact(
        model, pictures(), {"0": {"weight": torch.ones_like(model[0].weight)}}, trains=False
    )
    assert_as_it_was(model, before)


# -- what it takes -------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> dict[str, Tensor]:
        y = self.a(x) if other is None else self.a(x) * self.b(other)
        return {"mean": y.mean(1), "sum": y.sum((1, 2, 3))}


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.one(x) * scale + self.two(y))


@pytest.mark.parametrize(
    "dummy", [(pictures(), pictures() + 1), {"x": pictures(), "y": pictures() + 1, "scale": 0.5}]
)
def test_dummy_input_of_several_arguments(dummy: Any) -> None:
    torch.manual_seed(0)
    model = made(Tail())
    masks = {"one": filters(model.one, 0, 1), "two": filters(model.two, 1, 2)}
    reference = masked_copy(model, masks)
    ModelSpeedup(model, dummy, masks).speedup_model()
    call = (
        (lambda m: outputs(m, **dummy))
        if isinstance(dummy, dict)
        else (lambda m: outputs(m, *dummy))
    )
    with torch.no_grad():
        assert_same_outputs(call(reference), call(model), 1e-12)
    assert model.one.out_channels == model.two.out_channels == 5


@pytest.mark.parametrize("kind", ["float", "int", "bool", "Masks", "file", "str file"])
def test_masks_of_every_type(kind: str, tmp_path: Path) -> None:
    model = chain()
    dtype = {"int": torch.int64, "bool": torch.bool}.get(kind, torch.float32)
    given: Any = {
        path: {name: mask.to(dtype) for name, mask in each.items()}
        for path, each in half_masks(model).items()
    }
    if kind in ("Masks", "file", "str file"):
        given = Masks(given)
    if kind.endswith("file"):
        given.save(tmp_path / "masks.safetensors")
        given = tmp_path / "masks.safetensors"
        given = str(given) if kind == "str file" else given
    speedup = ModelSpeedup(model, pictures(), given, map_location="cpu")
    assert speedup.speedup_model() is model
    assert model[0].out_channels == 3


def test_masks_of_the_root_module_and_of_own_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(5, 1, 1))
            self.conv, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x) * self.scale)

    model = made(Scaled())
    check_exact(model, pictures(), {"": {"scale": without(5, 1, 2).reshape(5, 1, 1)}})
    assert model.scale.shape == (3, 1, 1)
    assert model.conv.out_channels == 3


def test_masks_of_a_parametrised_weight_by_its_raw_name() -> None:
    model = plain(parametrizations.weight_norm(nn.Conv2d(3, 6, 1)), nn.Conv2d(6, 2, 1))
    raw = "0.parametrizations.weight"
    original = model.get_submodule(raw).original1
    mask = without(6, 0, 3).reshape(6, 1, 1, 1).expand_as(original)
    scale = without(6, 0, 3).reshape(6, 1, 1, 1)
    check_exact(model, pictures(), {raw: {"original0": scale}})
    check_exact(model, pictures(), {"0": {"bias": without(model[0].bias.numel(), 0)}})
    assert mask.shape == (6, 3, 1, 1)


def test_masked_and_plain_model_shrink_alike() -> None:
    plain_model, masked = chain(), chain()
    masks = half_masks(plain_model)
    Masks(masks).apply(masked)
    ModelSpeedup(plain_model, pictures(), masks).speedup_model()
    ModelSpeedup(masked, pictures(), {}).speedup_model()
    assert list(plain_model.state_dict()) == list(masked.state_dict())
    for name, tensor in plain_model.state_dict().items():
        assert torch.equal(tensor, masked.state_dict()[name])
    assert not any(parametrize.is_parametrized(m) for m in masked.modules())


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training: bool) -> None:
    model = chain().train(training)
    model[4].train(not training)
    check_exact(model, pictures(), half_masks(model))
    assert [m.training for m in model] == [training] * 4 + [not training] + [training] * 4


def test_statistics_do_not_move_in_train_mode() -> None:
    model = chain().train()
    mean = model[1].running_mean[[0, 2, 5]].clone()
    ModelSpeedup(model, pictures(), half_masks(model)).speedup_model()
    assert torch.equal(model[1].running_mean, mean)
    assert int(model[1].num_batches_tracked) == 0


def test_the_callers_masks_and_input_stay() -> None:
    model = plain(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    masks = {"1": filters(model[1], 0)}
    kept, x = copy.deepcopy(masks), pictures()
    before = x.clone()
    ModelSpeedup(model, x, masks).speedup_model()
    assert all(torch.equal(masks["1"][n], kept["1"][n]) for n in kept["1"])
    assert torch.equal(x, before)


def test_parameter_objects_stay_and_an_optimizer_goes_on() -> None:
    model = chain()
    objects = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ModelSpeedup(model, pictures(), half_masks(model)).speedup_model()
    assert all(objects[n] is p for n, p in model.named_parameters())
    before = [p.clone() for p in model.parameters()]
    model(pictures()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_gradients_are_cut_along() -> None:
    model = chain()
    model(pictures()).sum().backward()
    ModelSpeedup(model, pictures(), half_masks(model)).speedup_model()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[3].requires_grad_(False)
    ModelSpeedup(model, pictures(), half_masks(model)).speedup_model()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "3.weight", "3.bias"]


def test_hooks_and_classes_stay() -> None:
    class MyConv(nn.Conv2d):
        """The user's own class."""

    model = plain(MyConv(3, 4, 1), nn.Conv2d(4, 2, 1))
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    ModelSpeedup(model, pictures(), {"0": filters(model[0], 3)}).speedup_model()
    seen.clear()
    model(pictures())
    assert seen == [(2, 3, 8, 8)]
    assert type(model[0]) is MyConv


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = chain().to(dtype)
    masks = half_masks(model)
    check_exact(model, pictures().to(dtype), masks, trains=False)
    assert model[3].weight.shape == (6, 3, 3, 3)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_channels_last_stays() -> None:
    model = chain().to(memory_format=torch.channels_last)
    x = pictures().to(memory_format=torch.channels_last)
    check_exact(model, x, half_masks(model))
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


# torch 2.4 warns of its own way to load a pickled tensor.
def test_small_model_can_be_copied_and_pickled() -> None:
    model = chain()
    ModelSpeedup(model, pictures(), half_masks(model)).speedup_model()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(pictures()), model(pictures()))


def test_masks_on_the_model_and_masks_given_are_held_once_each() -> None:
    """While the model runs: those given, and what both keep; thousands of masks weigh something."""

    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(type(each) is Masks for each in gc.get_objects()))
            return super().forward(x)

    alive: list[int] = []
    model = Counting(*chain())
    Masks({"0": filters(model[0], 1)}).apply(model)
    given = Masks({"0": filters(model[0], 2), "3": filters(model[3], 0)})
    before = copy.deepcopy(given)
    gc.collect()
    model(pictures())
    speedup = ModelSpeedup(model, pictures(), given)
    speedup.speedup_model()
    assert max(alive) == alive[0] + 2
    assert given == before
    assert (model[0].out_channels, model[3].out_channels) == (5, 7)


def test_shared_module_and_tied_weight_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.two.weight = self.one.weight
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(self.first(x))
            return self.head(self.one(self.two(x).relu()))

    model = made(Tied())
    masks = {
        "first": filters(model.first, 2),
        "one": filters(model.one, 2),
        "two": {"bias": without(4, 2)},
    }
    check_exact(model, pictures(), masks)
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape == (3, 3, 1, 1)


def test_buffer_with_an_entry_for_each_channel() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.register_buffer("shift", torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x) * self.shift)

    model = made(Shifted())
    check_exact(model, pictures(), {"conv": filters(model.conv, 0)})
    assert model.shift.shape == (1, 3, 1, 1)


@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_a_norm_without_parameters_knows_its_new_size(warned: str) -> None:
    model = plain(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter(warned)  # type: ignore[arg-type]
        speedup = ModelSpeedup(model, pictures(), {"0": filters(model[0], 0, 1)}, verify=False)
        speedup.speedup_model()
    assert model[0].out_channels == 4
    assert model[1].num_features == 4


@pytest.mark.parametrize("limits", [{"round_to": 4}, {"min_channels": 5}])
def test_limits_are_kept(limits: dict[str, int]) -> None:
    model = chain()
    check_exact(model, pictures(), half_masks(model), **limits)
    widths = [model[0].out_channels, model[3].out_channels]
    assert widths == ([4, 8] if "round_to" in limits else [5, 6])


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"round_to": 5}, "a multiple of 5 (round_to)"),
        ({"min_channels": 5}, "at least 5 channels (min_channels)"),
        (
            {"min_channels": 4, "round_to": 5},
            "at least 4 channels (min_channels) and a multiple of 5 (round_to)",
        ),
    ],
)
def test_the_report_says_which_limit_keeps_a_channel(limits: dict[str, int], wanted: str) -> None:
    model = chain()
    masks = {"3": filters(model[3], 0, 1, 4, 6, 7)}
    report = check_exact(model, pictures(), masks, **limits).report
    kept = {layer.layer: layer.kept for layer in report.layers}
    assert kept["3"] == {f"completes its layer to {wanted}": 2}
    assert model[3].out_channels == 5


# -- the model's own code ------------------------------------------------------------------


def line_of(text: str) -> str:
    """``test_speedup.py:123``: where this file says ``text``."""
    lines = (ROOT / "test_speedup.py").read_text().splitlines()
    return f"test_speedup.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


class LiteralView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 6, 36).tanh().flatten(1))  # a literal 6


class LiteralSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x)[:, :4])  # a literal 4


@pytest.mark.parametrize(
    ("model", "where"), [(LiteralView, "literal 6"), (LiteralSlice, "literal 4")]
)
def test_a_number_in_the_code_keeps_its_channels(model: Any, where: str) -> None:
    model = made(model())
    speedup = check_exact(model, pictures(), {"conv": filters(model.conv, 0, 1)})
    assert model.conv.out_channels == 6
    assert line_of(f"# a {where}") in str(next(iter(speedup.report.layers[0].kept)))


@pytest.mark.parametrize("by", ["attribute", "shape", "size", "len"])
def test_sizes_that_the_code_can_follow(by: str) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels = 6
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv1d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            sizes = {
                "attribute": self.channels, "shape": x.shape[1], "size": x.size(1), "len": len(x[0])
            }  # fmt: skip
            return self.head(x.view(len(x), sizes[by], -1) / sizes[by])

    model = made(Viewed())
    if by == "attribute":  # dividing by it is arithmetic that must not change
        model.forward = lambda x: model.head(model.conv(x).view(len(x), model.channels, -1))
    check_exact(model, pictures(), {"conv": filters(model.conv, 0, 1)})
    assert model.conv.out_channels == (4 if by == "attribute" else 6)
    assert model.channels == (4 if by == "attribute" else 6)


def test_a_size_that_a_part_of_the_module_holds_is_set_there() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.head = 4, nn.Conv2d(4, 2, 1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.part, self.rest = nn.Conv2d(3, 10, 1), Part(), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            left, right = y.split([self.part.width, y.shape[1] - self.part.width], 1)
            return self.part.head(left) + self.rest(right)

    model = made(Whole())
    check_exact(model, pictures(), {"conv": filters(model.conv, 1, 5, 6)})
    assert (model.conv.out_channels, model.part.width, model.rest.in_channels) == (7, 3, 4)


def test_a_size_that_is_computed_with_keeps_its_own_tensor_only() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = (
                nn.Conv2d(3, 6, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(11, 2, 1)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.one(x), self.two(x)
            scale = torch.tensor(y.shape[1]).sqrt()
            assert z.shape[1] > 0
            return self.head(torch.cat([y / scale, z], 1))

    model = made(Scaled())
    masks = {"one": filters(model.one, 0, 1), "two": filters(model.two, 2)}
    check_exact(model, pictures(), masks)
    assert (model.one.out_channels, model.two.out_channels) == (6, 4)


def test_an_attribute_that_also_counts_in_arithmetic_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels = 6
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv1d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(len(x), self.channels, -1) * self.channels**-0.5)

    model = made(Scaled())
    check_exact(model, pictures(), {"conv": filters(model.conv, 0, 1)})


class Cumulated(torch.autograd.Function):
    """An autograd function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].flip(1).cumsum(1).flip(1)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "autograd": Cumulated.apply,
    "cdist": lambda x: torch.cdist(x.flatten(2), x.flatten(2)).unsqueeze(-1)[:, :1] + x,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()[:, ::-1].copy()),
    "svd": lambda x: torch.linalg.svd(x)[1].unsqueeze(-1),
    "list": lambda x: x * torch.tensor(x.detach().flatten()[:1].tolist()).double(),
    "item": lambda x: x * 2 if x.mean().item() > 0 else x - 1,
    "bool": lambda x: x.relu() if bool((x > 0).any()) else x,
    "nonzero": lambda x: x + torch.nonzero(x[:, 0] > 0).shape[0],
    "index_put": lambda x: x.clone().index_put_((torch.tensor([0]),), x[0]),
    "scatter": lambda x: x.scatter(1, torch.zeros_like(x[:, :1], dtype=torch.long), 1.0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_rule_knows_stays_exact(name: str) -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.conv, self.head = (
                nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.head(UNKNOWN[name](self.conv(self.before(x))))

    torch.manual_seed(0)
    model = made(Unknown())
    masks = {"before": filters(model.before, 0, 1), "conv": filters(model.conv, 2)}
    speedup = check_exact(model, pictures(side=5), masks, trains=False)
    if name not in ("autograd", "numpy"):  # code that the trace cannot see keeps everything
        assert model.before.out_channels == 4
    reasons = [layer.kept for layer in speedup.report.layers if layer.layer == "conv"]
    assert model.conv.out_channels == 4 or (reasons and reasons[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_part_keeps_everything() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) * 2

    model = plain(nn.Conv2d(3, 4, 1), Part(), nn.Conv2d(4, 2, 1))
    scripted = nn.Sequential(model[0], torch.jit.trace(Part(), pictures(4)), model[2])
    check_exact(scripted, pictures(), {"0": filters(model[0], 1)}, trains=False)


def test_random_numbers_in_eval_mode_are_refused_or_exact() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x + torch.randn_like(x))

    model = made(Noisy())
    before = everything_in(model)
    try:
        ModelSpeedup(model, pictures(), {"conv": filters(model.conv, 0)}).speedup_model()
    except VerificationError:
        assert_as_it_was(model, before)


def test_a_head_of_train_mode_shrinks_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.aux = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 2, 1),
                nn.Conv2d(6, 3, 1),
            )

        def forward(self, x: Tensor) -> Any:
            x = self.conv(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = made(Auxiliary())
    masks = {"conv": filters(model.conv, 0, 1)}
    reference = masked_copy(model, masks).train()
    check_exact(model, pictures(), masks)
    assert_same_outputs(outputs(reference, pictures()), outputs(model.train(), pictures()), 1e-12)
    assert model.aux.in_channels == 4


def test_state_that_the_forward_changes_is_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.calls += 1
            return self.head(self.conv(x))

    model = made(Counting())
    model.calls.zero_()
    ModelSpeedup(model, pictures(), {"conv": filters(model.conv, 0)}).speedup_model()
    assert model.conv.out_channels == 3
    assert (model.count, float(model.calls)) == (0, 0.0)


def test_unused_parameters_stay() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.idle = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 2, 1),
                nn.Linear(4, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x))

    model = made(Unused())
    check_exact(model, pictures(), {"conv": filters(model.conv, 0), "idle": filters(model.idle, 0)})
    assert model.idle.weight.shape == (4, 4)
    assert not model.idle.weight[0].any()


def test_an_output_that_is_a_parameter_s_work() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Any:
            return [self.conv(x), None, {"table": self.table, "number": 3}]

    model = made(Table())
    check_exact(
        model,
        pictures(),
        {"conv": filters(model.conv, 0), "": {"table": torch.eye(4)}},
        trains=False,
    )
    assert model.conv.out_channels == 4
    assert torch.equal(model.table, model.table * torch.eye(4))


# -- errors --------------------------------------------------------------------------------


def bad_masks(model: nn.Module, tmp_path: Path) -> list[tuple[Any, str]]:
    broken, text = tmp_path / "broken.safetensors", tmp_path / "text.txt"
    Masks(half_masks(model)).save(broken)
    broken.write_bytes(broken.read_bytes()[:-20])
    text.write_text("no masks at all")
    return [
        ({"0": {"weight": torch.ones(6, 3, 3)}}, "0.weight"),
        ({"nope": {"weight": torch.ones(6)}}, "nope"),
        ({"0": {"kernel": torch.ones(6)}}, "kernel"),
        ({"0": {"weight": torch.full((6, 3, 3, 3), 0.5)}}, "0.weight"),
        ({"0": torch.ones(6)}, "0"),
        (3, "int"),
        (broken, "broken.safetensors"),
        (str(text), "text.txt"),
        (tmp_path / "missing", "missing"),
    ]


@pytest.mark.parametrize("which", range(9))
def test_bad_masks_leave_the_model_as_it_was(which: int, tmp_path: Path) -> None:
    model = chain().train()
    masks, text = bad_masks(model, tmp_path)[which]
    before = everything_in(model)
    with pytest.raises(MaskError, match=text):
        ModelSpeedup(model, pictures(), masks).speedup_model()
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("dummy", "text"),
    [
        (torch.randn(2, 4, 8, 8).double(), r"\(2, 4, 8, 8\)"),
        (torch.randn(2, 3, 8, 8), "dummy_input"),
        ((pictures(), pictures()), "dummy_input"),
        ({"picture": pictures()}, "picture"),
        ("text", "dummy_input"),
        (None, "dummy_input"),
    ],
)
def test_bad_dummy_inputs_leave_the_model_as_it_was(dummy: Any, text: str) -> None:
    model = chain().train()
    Masks({"0": filters(model[0], 1)}).apply(model)
    before = everything_in(model)
    with pytest.raises(TraceError, match=text):
        ModelSpeedup(model, dummy, half_masks(model) | {"0": {}, "1": {}}).speedup_model()
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    "options",
    [{"constants": "keep"}, {"round_to": 0}, {"round_to": 1.5}, {"min_channels": -1},
     {"min_channels": True}],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(SpeedupError, match=next(iter(options))):
        ModelSpeedup(chain(), pictures(), {}, **options)


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(SpeedupError, match="function"):
        ModelSpeedup(lambda x: x, pictures(), {})  # type: ignore[arg-type]


def test_no_masks_before_and_no_second_call() -> None:
    speedup = ModelSpeedup(chain(), pictures(), {})
    with pytest.raises(SpeedupError, match="call speedup_model"):
        _ = speedup.masks
    speedup.speedup_model()
    with pytest.raises(SpeedupError, match="sped up"):
        speedup.speedup_model()


class Forgetful(nn.Module):
    """Computes something else at every call, by means that nobody could put back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + random.SystemRandom().random()


def test_a_failed_verification_undoes_everything() -> None:
    model = Forgetful().train()
    model(pictures()).sum().backward()
    Masks({"layers.0": filters(model.layers[0], 1)}).apply(model)
    before = everything_in(model)
    masks = {f"layers.{path}": each for path, each in half_masks(chain()).items()}
    with pytest.raises(VerificationError, match="as it was"):
        ModelSpeedup(model, pictures(), masks).speedup_model()
    assert_as_it_was(model, before)
    assert parametrize.is_parametrized(model.layers[0], "weight")


@pytest.mark.parametrize("constants", ["fold", "drop"])
def test_inexact_constants_report_their_error(constants: str) -> None:
    model = plain(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1))
    nn.init.constant_(model[1].bias, 3.0)
    speedup = ModelSpeedup(model, pictures(), {"0": filters(model[0], 0, 1)}, constants=constants)
    speedup.speedup_model()
    assert model[0].out_channels == 3
    assert speedup.report.relative_error > 1e-3
    assert f"{speedup.report.relative_error:.1e}" in speedup.report.summary()


def test_without_verification_nothing_is_claimed() -> None:
    model = chain()
    speedup = check_exact(model, pictures(), half_masks(model), verify=False)
    assert speedup.report.relative_error is None
    assert "not verified" in str(speedup.report)


def test_a_value_that_the_model_refuses_is_the_dummy_inputs_fault() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    before = everything_in(model)
    tokens = torch.tensor([[1, 99]])  # meta tensors have no values: only a real run refuses it
    with pytest.raises(TraceError, match="does not run on dummy_input"):
        ModelSpeedup(model, tokens, {"1": filters(model[1], 0)}).speedup_model()
    assert_as_it_was(model, before)


def test_what_is_no_optimizer_is_refused_before_anything() -> None:
    with pytest.raises(SpeedupError, match="optimizer is a dict"):
        ModelSpeedup(chain(), pictures(), {}, optimizer={})


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.Adam])
def test_an_optimizers_state_shrinks_along(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = chain()
    optimizer = make(model.parameters())
    model(pictures()).sum().backward()
    optimizer.step()
    ModelSpeedup(model, pictures(), half_masks(model), optimizer=optimizer).speedup_model()
    for parameter, state in optimizer.state.items():
        averages = [v for v in state.values() if torch.is_tensor(v) and v.dim()]
        assert averages
        assert all(average.shape == parameter.shape for average in averages)
    model(pictures()).sum().backward()
    optimizer.step()


class Caching(nn.Module):
    """Fills what is empty at first, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.by_size: dict[int, Tensor] = {}
        self.nested: dict[str, list[Tensor]] = {"scales": []}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in self.by_size:
            self.by_size[x.shape[-1]] = torch.ones(8, device=x.device)
            self.nested["scales"].append(torch.ones(1, device=x.device))
        y = self.first(x).relu() * self.by_size[x.shape[-1]]
        return self.last(y * self.nested["scales"][0])


def test_caches_that_a_run_fills_are_empty_again() -> None:
    model = Caching()
    ModelSpeedup(model, torch.rand(2, 4), {"first": filters(model.first, 0)}).speedup_model()
    assert model.by_size == {}
    assert model.nested == {"scales": []}
    assert model(torch.rand(3, 4)).shape == (3, 2)


def test_a_compiled_part_is_seen_through() -> None:
    inner = torch.compile(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), backend="eager")
    model = nn.Sequential(nn.Linear(4, 8), inner, nn.Linear(6, 2)).double()
    masked = copy.deepcopy(model)
    masks = {"0": filters(model[0], 1, 2), "1._orig_mod.0": filters(inner._orig_mod[0], 0)}
    for path, parameters in masks.items():
        for name, mask in parameters.items():
            getattr(masked.get_submodule(path), name).data.mul_(mask)
    x = torch.rand(3, 4, dtype=torch.float64)
    ModelSpeedup(model, x, masks).speedup_model()
    if hasattr(torch.compiler, "set_stance"):  # before torch 2.6 compiled parts cannot be seen into
        assert (model[0].out_features, inner._orig_mod[0].out_features) == (6, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-10)


def test_a_small_model_that_does_not_run_is_never_returned() -> None:
    class Counts(nn.Module):
        """Refuses a smaller tensor, but not while it is being recorded."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = chain()

        def forward(self, x: Tensor) -> Tensor:
            if not x.is_meta and self.layers[0].weight.shape[0] < 5:
                raise RuntimeError("too small")
            return self.layers(x)

    model = Counts()
    masks = {f"layers.{path}": each for path, each in half_masks(chain()).items()}
    before = everything_in(model)
    with pytest.raises(VerificationError, match="too small"):
        ModelSpeedup(model, pictures(), masks, constants="drop").speedup_model()
    assert_as_it_was(model, before)
