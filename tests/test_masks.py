"""Masks as a value, as a file, and on a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from compress.errors import MaskError
from compress.masks import (
    Masks,
    applied_masks,
    masked_state_dict,
    raw_parameter,
    remove_masks,
    suspend_masks,
)

ONE = torch.tensor([True])


def rows(*keep: int, columns: int) -> Tensor:
    """A mask of whole rows."""
    return torch.tensor(keep, dtype=torch.bool).unsqueeze(1).repeat(1, columns)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def small_masks() -> Masks:
    return Masks({"0": {"weight": rows(1, 0, 1, 1, columns=3), "bias": torch.tensor([1, 0, 1, 1])}})


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


# --- as a value


def test_numbers_become_bools_and_share_nothing_with_the_callers() -> None:
    given = torch.tensor([1.0, 0.0])
    flags = torch.tensor([True, False])
    masks = Masks({"a": {"x": given, "y": flags}})
    given[0], flags[0] = 0.0, False
    assert masks["a"]["x"].tolist() == [True, False]
    assert masks["a"]["y"].tolist() == [True, False]
    assert masks["a"]["x"].dtype == torch.bool


def test_every_wrong_entry_is_named() -> None:
    with pytest.raises(MaskError) as caught:
        Masks(
            {
                "a": {"half": torch.tensor([0.5, 1.0]), "nan": torch.tensor([torch.nan])},
                "b": {"list": [1, 0]},
                "c.weight": torch.ones(2),
                "d": {"meta": torch.ones(2, device="meta"), "": torch.ones(1)},
                5: {},
            }
        )
    text = str(caught.value)
    assert "'a.half': got 1 of 2 entries that are neither 0 nor 1, the first 0.5" in text
    assert "'a.nan'" in text
    assert "'b.list': got list [1, 0]; expected a tensor" in text
    assert "'c.weight': got Tensor" in text
    assert "as in {'conv1': {'weight': mask}}" in text
    assert "'d.meta': got a tensor on the meta device" in text
    assert "'d': got the parameter name ''" in text
    assert "5: got int 5 as a module path" in text


def test_sparsity_by_hand() -> None:
    masks = small_masks()
    assert masks.sparsity == 4 / 16
    assert masks.sparsity_per_layer == {"0": 4 / 16}
    assert Masks().sparsity == 0.0
    assert Masks({"a": {}}) == Masks()


def test_table_and_repr() -> None:
    text = str(Masks({"": {"w": torch.tensor(1)}, "conv": {"weight": torch.tensor([[0, 1]])}}))
    assert "(model)" in text
    assert "│ conv    │ weight    │ 1×2    │  1 / 2 │   50.00% │" in text
    assert "│ total   │           │        │  1 / 3 │   33.33% │" in text
    assert repr(small_masks()) == "Masks(1 layers, 2 tensors, sparsity=0.2500)"


def test_and_keeps_what_both_keep() -> None:
    left = Masks({"a": {"x": torch.tensor([1, 1, 0])}, "b": {"y": torch.tensor([1])}})
    right = Masks({"a": {"x": torch.tensor([0, 1, 1]), "z": torch.tensor([0])}})
    both = left & right
    assert both["a"]["x"].tolist() == [False, True, False]
    assert sorted(both.flat()) == ["a.x", "a.z", "b.y"]
    assert left["a"]["x"].tolist() == [True, True, False]
    with pytest.raises(MaskError, match=r"a\.x: shapes \(3,\) and \(1,\) differ"):
        left & Masks({"a": {"x": torch.tensor([1])}})


def test_and_in_place_copies_only_what_the_other_alone_has() -> None:
    masks = Masks({"a": {"x": torch.tensor([1, 1, 0])}, "b": {"y": torch.tensor([1])}})
    other = Masks({"a": {"x": torch.tensor([0, 1, 1]), "z": torch.tensor([0])}, "c": {"w": ONE}})
    expected = masks & other
    same, alone = masks, masks["b"]["y"]
    masks &= other
    assert masks is same
    assert masks == expected
    assert masks["b"]["y"] is alone
    masks["c"]["w"][0] = False
    assert other["c"]["w"].item()
    assert other["a"]["x"].tolist() == [False, True, True]
    masks &= masks
    assert masks["a"]["x"].tolist() == [False, True, False]


def test_a_refused_and_in_place_changes_nothing() -> None:
    masks = Masks({"a": {"x": torch.tensor([1, 0])}, "b": {"y": torch.tensor([1, 1])}})
    before = Masks(masks)
    with pytest.raises(MaskError, match=r"b\.y: shapes \(2,\) and \(1,\) differ"):
        masks &= Masks({"a": {"x": torch.tensor([0, 0])}, "b": {"y": ONE}})
    assert masks == before
    with pytest.raises(TypeError):
        masks &= {"a": {"x": torch.tensor([0, 0])}}
    with pytest.raises(TypeError):
        masks & 3


def test_masks_made_in_inference_mode_combine_outside_of_it() -> None:
    with torch.inference_mode():
        masks = Masks({"a": {"x": torch.tensor([1, 1, 0])}})
    masks &= Masks({"a": {"x": torch.tensor([0, 1, 1])}})
    assert masks["a"]["x"].tolist() == [False, True, False]


def test_entries_cannot_be_replaced_unchecked() -> None:
    masks = small_masks()
    with pytest.raises(TypeError):
        masks["0"]["weight"] = torch.rand(2)
    assert copy.deepcopy(masks) == masks
    assert masks != small_masks() & Masks({"0": {"bias": torch.zeros(4)}})


# --- as a file


def test_file_round_trip(tmp_path: Path) -> None:
    masks = Masks(
        {
            "": {"scale": torch.tensor(0)},
            "a.b": {"weight": rows(1, 0, columns=3).t(), "empty": torch.ones(0, 2)},
        }
    )
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    assert Masks.load(path) == masks
    assert Masks.coerce(str(path), map_location="cpu") == masks
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_uint8_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    metadata = {"format": "compress.masks", "version": "1"}
    save_file({"a.w": torch.tensor([1, 0], dtype=torch.uint8)}, path, metadata)
    assert Masks.load(path) == Masks({"a": {"w": torch.tensor([1, 0])}})


def test_bad_files_name_the_file_and_the_reason(tmp_path: Path) -> None:
    good = tmp_path / "good"
    small_masks().save(good)
    mine = {"format": "compress.masks", "version": "1"}
    cut, empty, pickled, weights, newer, floats, twos = (
        tmp_path / name for name in ("cut", "empty", "pkl", "weights", "newer", "floats", "twos")
    )
    cut.write_bytes(good.read_bytes()[:-5])
    empty.write_bytes(b"")
    pickled.write_bytes(pickle.dumps({"a": 1}))
    save_file({"a.weight": torch.rand(2)}, weights)
    save_file({"a.weight": torch.ones(2).bool()}, newer, {**mine, "version": "2"})
    save_file({"a.weight": torch.ones(2)}, floats, mine)
    save_file({"a.weight": torch.tensor([2], dtype=torch.uint8)}, twos, mine)
    for path, reason in {
        cut: "cannot be read as a safetensors file",
        empty: "cannot be read as a safetensors file",
        pickled: "cannot be read as a safetensors file",
        weights: "a safetensors file, but not of masks",
        newer: "masks of format version '2'; this release reads up to 1",
        floats: "'a.weight': got torch.float32; expected bool or uint8",
        twos: "neither 0 nor 1, the first 2",
        tmp_path: "it is no file",
        tmp_path / "nope": "no such file",
    }.items():
        with pytest.raises(MaskError) as caught:
            Masks.load(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"there is no folder .*; make it first"):
        small_masks().save(tmp_path / "no" / "masks")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MaskError, match="cannot be saved"):
        small_masks().save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_coerce_copies_and_refuses() -> None:
    given = {"a": {"x": torch.tensor([True])}}
    masks = Masks.coerce(given)
    again = Masks.coerce(masks)
    masks["a"]["x"][0] = False
    assert given["a"]["x"].item()
    assert again["a"]["x"].item()
    with pytest.raises(MaskError, match="got int 3; expected Masks, a dict"):
        Masks.coerce(3)


# --- against a model


def test_validate_lists_every_problem() -> None:
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 4, 1))
    model.add_module("bn", nn.BatchNorm2d(4))
    model.add_module("normed", weight_norm(nn.Linear(4, 4)))
    model.add_module("lazy", nn.LazyLinear(4))
    one = torch.ones(1)
    with pytest.raises(MaskError) as caught:
        Masks(
            {
                "conv2": {"weight": one},
                "conv1": {"wieght": one, "bias": one},
                "bn": {"running_mean": one},
                "normed": {"weight": one},
                "lazy": {"weight": one},
            }
        ).validate(model)
    text = str(caught.value)
    assert "do not fit the model (Sequential)" in text
    assert "'conv2': the model has no module of this name; did you mean 'conv1'?" in text
    assert "this Conv2d has no such parameter; it has 'weight', 'bias'; did you mean" in text
    assert (
        "'conv1.bias': got a mask of shape (1,); expected the shape of the parameter, (4,)" in text
    )
    assert "it is a buffer of this BatchNorm2d; only parameters can be masked" in text
    assert "'normed.weight': it is parametrised (_WeightNorm); mask its raw name instead" in text
    assert "(module 'normed.parametrizations.weight', parameter 'original0' or 'original1')" in text
    assert "'lazy.weight': the parameter has no shape yet" in text


def test_apply_refuses_whole_and_touches_nothing() -> None:
    model = small_net()
    with pytest.raises(MaskError):
        (small_masks() & Masks({"9": {"weight": torch.ones(1)}})).apply(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    meta = nn.Linear(2, 2, device="meta")
    masks = Masks({"": {"weight": torch.ones(2, 2)}})
    masks.validate(meta)
    with pytest.raises(MaskError, match="'weight': the parameter is on the meta device"):
        masks.apply(meta)


def test_masked_forward_is_zero_even_where_the_weights_are_not_finite() -> None:
    model = small_net()
    with torch.no_grad():
        model[0].weight[1] = torch.nan
        model[0].bias[1] = torch.inf
    small_masks().apply(model)
    assert model[0].weight[1].tolist() == [0, 0, 0]
    assert model[0].bias[1] == 0
    model(torch.rand(2, 3)).sum().backward()
    weight = model[0].parametrizations.weight.original
    assert weight.grad[1].tolist() == [0, 0, 0]
    assert weight.grad.isfinite().all()


def test_suspend_and_restore_are_exact() -> None:
    model = small_net()
    x = torch.rand(4, 3)
    before, plain = model(x), copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    # The weight only: taken off, it has to come before the bias again.
    Masks({"0": {"weight": rows(1, 0, 1, 1, columns=3)}}).apply(model)
    masked = model(x)
    suspended = suspend_masks(model)
    assert suspended.masks.sparsity == 0.25
    assert list(model.state_dict()) == list(plain)
    assert type(model[0]) is nn.Linear
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), before)
    suspended.restore()
    suspended.restore()
    assert torch.equal(model(x), masked)
    with suspend_masks(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), masked)
    empty = suspend_masks(nn.Linear(2, 2))
    assert empty.masks == Masks()
    empty.restore()


def test_remove_writes_the_zeros() -> None:
    model = small_net()
    model[0].bias.requires_grad_(False)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    small_masks().apply(model)
    x = torch.rand(4, 3)
    masked = model(x)
    assert remove_masks(model) == small_masks()
    assert torch.equal(model(x), masked)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert (model[0].weight[1] == 0).all()
    assert remove_masks(model) == Masks()


def test_two_masks_become_one() -> None:
    model = small_net()
    Masks({"0": {"weight": rows(1, 0, 1, 1, columns=3)}}).apply(model)
    Masks({"0": {"weight": rows(1, 1, 0, 1, columns=3), "bias": torch.ones(4)}}).apply(model)
    assert len(model[0].parametrizations.weight) == 1
    assert applied_masks(model)["0"]["weight"][:, 0].tolist() == [True, False, False, True]


def test_raw_name_of_a_masked_parameter_is_the_same_mask() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    Masks({"0": {"weight": torch.tensor([[1, 0], [1, 1]])}}).apply(model)
    Masks({"0.parametrizations.weight": {"original": torch.tensor([[1, 1], [0, 1]])}}).apply(model)
    assert applied_masks(model)["0"]["weight"].tolist() == [[True, False], [False, True]]
    alone = nn.Linear(2, 2)
    Masks({"": {"weight": torch.ones(2, 2)}}).apply(alone)
    Masks({"parametrizations.weight": {"original": torch.zeros(2, 2)}}).apply(alone)
    assert applied_masks(alone) == Masks({"": {"weight": torch.zeros(2, 2)}})


def test_other_peoples_parametrizations_stay() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)))
    x = torch.rand(2, 3)
    before = model(x)
    masks = Masks(
        {
            "0": {"bias": torch.tensor([0, 1, 1])},
            "0.parametrizations.weight": {"original0": torch.tensor([[1], [0], [1]])},
        }
    )
    masks.apply(model)
    assert (model[0].weight[1] == 0).all()
    assert model[0].bias[0] == 0
    suspended = suspend_masks(model)
    assert suspended.masks == masks
    assert torch.equal(model(x), before)
    suspended.restore()
    remove_masks(model)
    assert (model[0].weight[1] == 0).all()
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[0], "bias")


def test_parametrised_on_top_of_a_mask_is_refused() -> None:
    model = small_net()
    small_masks().apply(model)
    weight_norm(model[0])
    with pytest.raises(
        MaskError, match=r"'0\.weight': it was parametrised again on top of its mask"
    ):
        suspend_masks(model)


def test_tied_parameters_are_masked_in_all_their_owners() -> None:
    model = Tied()
    parameters = list(model.parameters())
    masks = Masks({"head": {"weight": rows(1, 1, 0, 1, 1, columns=3)}})
    masks.apply(model)
    assert (model.embedding.weight[2] == 0).all()
    assert (model.head.weight[2] == 0).all()
    assert applied_masks(model) == masks
    assert suspend_masks(model).masks == masks
    assert model.head.weight is model.embedding.weight
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    masks.apply(model)
    state = masked_state_dict(model)
    assert list(state) == ["embedding.weight", "head.weight", "head.bias"]
    assert state["embedding.weight"] is state["head.weight"]
    assert (state["head.weight"][2] == 0).all()


def test_two_masks_for_one_tied_parameter_are_combined() -> None:
    model = Tied()
    Masks(
        {
            "head": {"weight": rows(1, 1, 0, 1, 1, columns=3)},
            "embedding": {"weight": rows(0, 1, 1, 1, 1, columns=3)},
        }
    ).apply(model)
    assert model.head.weight.abs().sum(1).ne(0).tolist() == [False, True, False, True, True]


def test_shared_module_goes_by_any_of_its_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    Masks({"b": {"bias": torch.tensor([0, 1])}}).apply(model)
    Masks({"a": {"bias": torch.tensor([1, 0])}}).apply(model)
    assert applied_masks(model) == Masks({"a": {"bias": torch.tensor([0, 0])}})
    assert len(shared.parametrizations.bias) == 1


def test_root_module_and_scalar() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = Scale()
    masks = Masks({"": {"scale": torch.tensor(0)}})
    masks.apply(model)
    assert model(torch.ones(2)).tolist() == [0, 0]
    assert list(masks.flat()) == ["scale"]
    remove_masks(model)
    assert type(model) is Scale


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_use_their_masks_and_can_be_copied(kind: type[nn.RNNBase]) -> None:
    model = kind(3, 4)
    x = torch.rand(5, 2, 3)
    Masks({"": {"weight_hh_l0": torch.zeros_like(model.weight_hh_l0)}}).apply(model)
    masked = model(x)[0]
    masked.sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x)[0], masked)
    remove_masks(twin)
    assert torch.equal(twin(x)[0], masked)
    assert (twin.weight_hh_l0 == 0).all()
    assert torch.equal(model(x)[0], masked)


def test_deepcopies_are_independent() -> None:
    model = small_net()
    small_masks().apply(model)
    x = torch.rand(4, 3)
    masked = model(x)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    remove_masks(twin)
    with suspend_masks(third):
        pass
    Masks({"2": {"weight": torch.zeros(2, 4)}}).apply(third)
    third[0].parametrizations.weight[0].mask.zero_()
    assert torch.equal(model(x), masked)
    assert torch.equal(twin(x), masked)
    # torch keeps the tensors' properties on a class that copies share.
    only_weight = nn.Linear(2, 2)
    Masks({"": {"weight": torch.ones(2, 2)}}).apply(only_weight)
    Masks({"": {"bias": torch.zeros(2)}}).apply(copy.deepcopy(only_weight))
    assert only_weight.bias.shape == (2,)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ],
)
def test_training_with_an_optimizer_made_before(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = small_net()
    optimizer = make(model.parameters())
    x = torch.rand(8, 3)
    model(x).square().sum().backward()
    optimizer.step()  # so that there is momentum for the masked entries too
    small_masks().apply(model)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert (model[0].weight[1] == 0).all()
        assert model[0].bias[1] == 0
    assert not torch.equal(model[0].weight[0], before[0])
    remove_masks(model)
    assert (model[0].weight[1] == 0).all()


def test_state_dict_while_masked_resumes() -> None:
    model, other = small_net(), small_net()
    small_masks().apply(model)
    Masks({"0": {"weight": torch.ones(4, 3), "bias": torch.ones(4)}}).apply(other)
    state = model.state_dict()
    assert "0.parametrizations.weight.original" in state
    assert state["0.parametrizations.weight.0.mask"].dtype == torch.bool
    other.load_state_dict(state)
    assert applied_masks(other) == small_masks()
    plain = small_net()
    plain.load_state_dict(masked_state_dict(model))
    assert (plain[0].weight[1] == 0).all()
    assert parametrize.is_parametrized(model[0])


def test_half_and_double_follow() -> None:
    model = small_net()
    small_masks().apply(model)
    model.double()
    assert model[0].weight.dtype == torch.float64
    assert model[0].parametrizations.weight[0].mask.dtype == torch.bool


def test_hooks_on_the_gradient_of_a_parameter_outlive_masks() -> None:
    """Those that DistributedDataParallel puts there."""
    model = nn.Linear(3, 2)
    node = model.weight.expand_as(model.weight).grad_fn.next_functions[0][0]
    called = []
    node.register_hook(lambda *_: called.append(1))
    masks = Masks({"": {"weight": torch.tensor([[1, 0, 1], [0, 1, 1]])}})
    for number in (1, 2):
        masks.apply(model)
        model(torch.rand(4, 3)).sum().backward()
        assert len(called) == number
        remove_masks(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masked_values_and_gradients_are_those_of_where(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(dtype).to(memory_format=torch.channels_last)
    mask = torch.rand_like(model.weight, dtype=torch.float32) > 0.5
    with torch.no_grad():
        model.weight[~mask] = float("nan")
    raw = model.weight.detach().clone().requires_grad_()
    Masks({"": {"weight": mask}}).apply(model)
    expected = torch.where(mask, raw, 0)
    assert torch.equal(model.weight, expected)
    weights = torch.randn_like(raw)
    weights[~mask] = float("inf")
    model.weight.backward(weights)
    expected.backward(weights)
    got = raw_parameter(model, "weight")
    assert got is not None
    assert got.grad is not None
    assert torch.equal(got.grad, raw.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of forward mode itself
def test_masked_models_go_through_torchs_transforms() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    Masks({"": {"weight": mask}}).apply(model)
    raw = raw_parameter(model, "weight")
    assert raw is not None
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        name = "parametrizations.weight.original"
        return torch.func.functional_call(model, {name: weight}, (x,)).pow(3).sum()

    def by_hand(weight: Tensor) -> Tensor:
        return (x @ torch.where(mask, weight, 0).T + model.bias).pow(3).sum()

    weight = raw.detach().clone()
    assert torch.autograd.gradgradcheck(loss, weight.clone().requires_grad_())
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(loss)(weight), transform(by_hand)(weight))
    several = torch.stack([weight, 2 * weight])
    got = torch.func.vmap(torch.func.grad(loss))(several)
    torch.testing.assert_close(got, torch.func.vmap(torch.func.grad(by_hand))(several))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_called_one(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "mask.pth"
    torch.save({"0": {"weight": torch.ones(2, 2)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MaskError, match=r"torch\.save wrote it; .*compat\.nni\.load_masks"):
        Masks.load(path)
    path.write_bytes(b"")
    with pytest.raises(MaskError, match="truncated, or of another kind"):
        Masks.load(path)
