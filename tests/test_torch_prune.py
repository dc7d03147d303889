"""Models that torch.nn.utils.prune pruned: read, shrunk, and given back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from oracle import assert_same_outputs, masked_copy, outputs, randomise
from torch import Tensor, nn
from torch.nn.utils import prune

from compress import L1FilterPruner, LevelPruner, Masks, ModelSpeedup
from compress.errors import MaskError
from compress.masks import applied_masks, masked_state_dict, remove_masks, suspend_masks

X = torch.rand(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    randomise(model)
    return model.eval()


class EverySecond(prune.BasePruningMethod):
    """A method of the user's own."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def _container(model: nn.Sequential) -> None:
    prune.ln_structured(model[0], "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "bias", 2)


METHODS: dict[str, Callable[[nn.Sequential], Any]] = {
    "l1": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "ln": lambda m: prune.ln_structured(m[0], "weight", 0.5, n=2, dim=0),
    "random": lambda m: prune.random_unstructured(m[3], "weight", 0.5),
    "random structured": lambda m: prune.random_structured(m[3], "weight", 0.5, dim=1),
    "global": lambda m: prune.global_unstructured(
        [(m[0], "weight"), (m[5], "weight")], prune.L1Unstructured, amount=0.6
    ),
    "custom": lambda m: EverySecond.apply(m[3], "weight"),
    "container": _container,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_masks_are_what_torch_computes_with(method: str) -> None:
    model = net()
    METHODS[method](model)
    masks = Masks.from_torch_prune(model)
    assert masks.flat().keys() == {n[:-5] for n, _ in model.named_parameters() if n[-5:] == "_orig"}
    for name, mask in masks.flat().items():
        assert torch.equal(mask, model.get_buffer(f"{name}_mask").bool())
        assert 0 < int(mask.sum()) < mask.numel()
    assert applied_masks(model) == masks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [True, False])
def test_a_speedup_takes_the_model_as_it_is(method: str, given: bool) -> None:
    model = net()
    METHODS[method](model)
    expected = outputs(model, X)
    masks = Masks.from_torch_prune(model)
    small = ModelSpeedup(model, X, masks if given else None).speedup_model()
    assert_same_outputs(expected, outputs(small, X), 1e-5)
    assert not any("_" in name.split(".")[1] for name, _ in small.named_parameters())
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert not prune.is_pruned(small)
    if method in ("ln", "random structured", "container"):
        assert sum(map(torch.numel, small.parameters())) < sum(map(torch.numel, net().parameters()))
    deepcopy(small)


def test_a_plan_and_a_failing_speedup_leave_torchs_pruning(monkeypatch: Any) -> None:
    model = net()
    _container(model)
    model[0].register_forward_pre_hook(lambda module, args: None)
    before, names = deepcopy(model.state_dict()), [n for n, _ in model.named_parameters()]
    hooks, expected = list(model[0]._forward_pre_hooks.items()), outputs(model, X)

    def unchanged() -> bool:
        after = model.state_dict()
        return (
            list(after) == list(before)
            and all(torch.equal(after[k], v) for k, v in before.items())
            and names == [n for n, _ in model.named_parameters()]
            and hooks == list(model[0]._forward_pre_hooks.items())
        )

    assert "weight" in str(ModelSpeedup(model, X).plan)
    assert unchanged()

    def fail(*args: Any) -> None:
        raise RuntimeError("after the cut")

    monkeypatch.setattr("compress.speedup.speedup.parameter_counts", fail)
    with pytest.raises(RuntimeError, match="after the cut"):
        ModelSpeedup(model, X).speedup_model()
    assert unchanged()
    assert_same_outputs(expected, outputs(model, X), 0.0)
    plain = [name.replace("_orig", "") for name in before if "_mask" not in name]
    assert list(masked_state_dict(model)) == plain
    with suspend_masks(model):
        assert not prune.is_pruned(model)
    assert unchanged()


def test_the_optimizer_of_a_torch_pruned_model_goes_on() -> None:
    model = net()
    _container(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    weight = model[0].weight_orig
    small = ModelSpeedup(model, X, optimizer=optimizer).speedup_model()
    assert small[0].weight is weight
    assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape != (8, 3, 3, 3)


@pytest.mark.parametrize("pruner", [LevelPruner, L1FilterPruner])
def test_a_pruner_keeps_what_torch_masked(pruner: type[LevelPruner] | type[L1FilterPruner]) -> None:
    model = net()
    _container(model)
    before = Masks.from_torch_prune(model)
    _, masks = pruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}]).compress()
    assert masks == masks & before
    assert not any(prune.is_pruned(m) for m in model.modules())
    assert applied_masks(model) == masks


def test_apply_on_a_torch_pruned_model_keeps_both_and_undoes_nothing_else() -> None:
    model = net()
    _container(model)
    before = Masks.from_torch_prune(model)
    by_hand = Masks({"0": {"weight": torch.rand(8, 3, 3, 3) > 0.5}})
    expected = outputs(masked_copy(masked_copy_of_torch(model), by_hand), X)
    by_hand.apply(model)
    assert applied_masks(model) == by_hand & before
    assert_same_outputs(expected, outputs(model, X), 1e-6)


def masked_copy_of_torch(model: nn.Module) -> nn.Module:
    plain = deepcopy(net())
    for name, mask in Masks.from_torch_prune(model).flat().items():
        plain.get_parameter(name).data.mul_(mask)
    return plain


def test_there_and_back() -> None:
    model = net()
    masks = Masks({
        "0": {"weight": torch.rand(8, 3, 3, 3) > 0.5, "bias": torch.rand(8) > 0.5},
        "5": {"weight": torch.rand(5, 96) > 0.5},
    })  # fmt: skip
    expected = outputs(masked_copy(model, masks), X)
    masks.apply_torch_prune(model)
    assert prune.is_pruned(model)
    assert Masks.from_torch_prune(model) == masks
    assert_same_outputs(expected, outputs(model, X), 1e-6)
    more = Masks({"3": {"weight": torch.rand(6, 8, 3, 3) > 0.5}})
    more.apply_torch_prune(model)
    assert Masks.from_torch_prune(model) == masks & more
    prune.remove(model[3], "weight")
    assert Masks.from_torch_prune(model) == masks


def test_ours_become_torchs() -> None:
    model = net()
    _, masks = L1FilterPruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}]).compress()
    expected = outputs(model, X)
    masks.apply_torch_prune(model)
    assert Masks.from_torch_prune(model) == masks
    assert not hasattr(model[0], "parametrizations")
    assert_same_outputs(expected, outputs(model, X), 0.0)


@pytest.mark.parametrize("on", ["nothing", "ours", "torch's"])
def test_permanent(on: str) -> None:
    model = net()
    masks = Masks({"0": {"weight": torch.rand(8, 3, 3, 3) > 0.5}})
    other = Masks({"3": {"bias": torch.rand(6) > 0.5}})
    every = masks if on == "nothing" else masks & other
    expected, weight = outputs(masked_copy(model, every), X), model[0].weight
    if on == "ours":
        other.apply(model)
    elif on == "torch's":
        other.apply_torch_prune(model)
    masks.make_permanent(model)
    assert model[0].weight is weight
    assert model.state_dict().keys() == net().state_dict().keys()
    assert not applied_masks(model)
    assert_same_outputs(expected, outputs(model, X), 0.0)


def test_remove_masks_is_torchs_remove() -> None:
    model, other = net(), net()
    for each in (model, other):
        torch.manual_seed(1)
        _container(each)
    remove_masks(model)
    prune.remove(other[0], "weight")
    prune.remove(other[0], "bias")
    assert list(model.state_dict()) == list(other.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_a_shared_parameter_is_pruned_everywhere_or_refused() -> None:
    model = Tied()
    prune.l1_unstructured(model.a, "weight", 0.5)
    with pytest.raises(
        MaskError, match=r"'b\.weight' is the same .* 'a\.weight' and is not pruned"
    ):
        Masks.from_torch_prune(model)
    with pytest.raises(MaskError, match="prune both alike"):
        ModelSpeedup(model, torch.rand(1, 6)).speedup_model()
    prune.custom_from_mask(model.b, "weight", model.a.weight_mask)
    x = torch.rand(3, 6)
    expected = model(x)
    small = ModelSpeedup(model, x).speedup_model()
    assert small.a.weight is small.b.weight
    torch.testing.assert_close(small(x), expected)
    model = Tied()
    Masks({"a": {"weight": torch.rand(6, 6) > 0.5}}).apply_torch_prune(model)
    assert torch.equal(model.a.weight_mask, model.b.weight_mask)
    assert model.a.weight_orig is model.b.weight_orig


def test_recurrent_weights_come_back() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 5)
    prune.l1_unstructured(model, "weight_ih_l0", 0.5)
    expected = model(torch.ones(3, 2, 4))[0]
    small = ModelSpeedup(model, torch.rand(3, 2, 4)).speedup_model()
    torch.testing.assert_close(small(torch.ones(3, 2, 4))[0], expected)


def test_errors_say_what_to_do() -> None:
    model = net()
    with pytest.raises(MaskError, match=r"masks nothing in it; prune it first.*l1_unstructured"):
        Masks.from_torch_prune(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(MaskError, match=r"keeps 'weight' under this name; mask it as 'weight'"):
        Masks({"0": {"weight_orig": torch.ones(8, 3, 3, 3)}}).validate(model)
    before = deepcopy(model.state_dict())
    with pytest.raises(MaskError, match="expected the shape"):
        Masks({"0": {"weight": torch.ones(8, 3)}}).apply_torch_prune(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model[0].weight_mask.mul_(0.5)
    with pytest.raises(MaskError, match=r"'0\.weight': got .* neither 0 nor 1"):
        Masks.from_torch_prune(model)


def test_what_is_no_model_is_refused_by_name() -> None:
    with pytest.raises(MaskError, match=r"model: got int; expected a torch\.nn\.Module"):
        Masks.from_torch_prune(3)  # type: ignore[arg-type]
