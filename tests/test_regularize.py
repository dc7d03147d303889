"""Penalties: their values and gradients by hand, what falls together, and what a speedup does."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from oracle import randomise
from test_attention import SelfAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from compress import ChannelGraph, L1FilterPruner, L2FilterPruner, LevelPruner, Masks, ModelSpeedup
from compress.errors import CompressError, ConfigError
from compress.regularize import L1, BatchNormL1, GroupLasso, GrowingRegularization, Regularizer

X = torch.rand(2, 3, 6, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    randomise(model)
    return model.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


MAKERS: dict[str, Callable[[nn.Module], Regularizer]] = {
    "l1": lambda m: L1(m, 0.1),
    "batch norm": lambda m: BatchNormL1(m, 0.1),
    "group": lambda m: GroupLasso(m, 0.1, dummy_input=X),
    "group with consumers": lambda m: GroupLasso(m, 0.1, dummy_input=X, consumers=True),
    "growing": lambda m: grown(m),
}


def grown(model: nn.Module) -> GrowingRegularization:
    masks = {"0": {"weight": torch.rand(4, 3, 3, 3) > 0.5, "bias": torch.rand(4) > 0.5}}
    regularizer = GrowingRegularization(model, masks, growth=0.1, every=1)
    regularizer.step()
    return regularizer


# -- values --------------------------------------------------------------------------------


def test_l1_and_batch_norm_by_hand() -> None:
    model = net()
    weights = model[0].weight.abs().sum() + model[4].weight.abs().sum()
    torch.testing.assert_close(L1(model, 0.1)(), 0.1 * weights)
    torch.testing.assert_close(BatchNormL1(model, 0.1)(), 0.1 * model[1].weight.abs().sum())
    BatchNormL1(model, 0.1).add_gradients()
    torch.testing.assert_close(model[1].weight.grad, 0.1 * model[1].weight.detach().sign())
    assert gradients(model).keys() == {"1.weight"}


@pytest.mark.parametrize("consumers", [False, True])
def test_group_lasso_by_hand(consumers: bool) -> None:
    model = net()
    parts = [model[0].weight.flatten(1), model[0].bias[:, None]]
    parts += [model[1].weight[:, None], model[1].bias[:, None]]
    if consumers:  # each channel is 16 inputs of the linear layer
        parts.append(model[4].weight.reshape(5, 4, 16).transpose(0, 1).flatten(1))
    groups = torch.cat(parts, 1)
    expected = 0.1 * groups.shape[1] ** 0.5 * groups.norm(dim=1).sum()
    regularizer = GroupLasso(ChannelGraph(model, X), 0.1, consumers=consumers)
    torch.testing.assert_close(regularizer(), expected)
    torch.testing.assert_close(regularizer.norms(), groups.norm(dim=1).detach())


def test_group_lasso_of_grouped_convolutions_counts_every_entry_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    regularizer = GroupLasso(model, 1.0, dummy_input=X, consumers=True)
    # Of the first convolution all is made once, of the second made and read, of the third read.
    entries = sum(p.numel() for p in model[0].parameters()) + model[2].weight.numel()
    entries += 2 * model[1].weight.numel() + model[1].bias.numel()
    assert int(regularizer._sizes.sum()) == entries
    squares = float(regularizer.norms().square().sum())
    by_hand = sum(
        float(p.detach().square().sum()) for p in [*model[0].parameters(), model[2].weight]
    )
    by_hand += 2 * float(model[1].weight.detach().square().sum()) + float(
        model[1].bias.detach().square().sum()
    )
    assert squares == pytest.approx(by_hand, rel=1e-5)


def test_what_is_held_has_no_penalty() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    GroupLasso(model, 1.0, dummy_input=torch.rand(1, 4)).add_gradients()
    assert gradients(model).keys() == {"0.weight", "0.bias"}
    with pytest.raises(ConfigError, match="no unit of this Linear can go"):
        GroupLasso(nn.Linear(3, 3), 1.0, dummy_input=torch.rand(1, 3))


def test_attention_falls_by_dims_of_all_heads() -> None:
    torch.manual_seed(0)
    model = SelfAttention(False, "matmul")
    assert (
        len(GroupLasso(model, 1.0, dummy_input=torch.rand(1, 5, 24)).norms()) == 16
    )  # q with k, v


def test_growing_by_hand() -> None:
    model = net()
    masks = Masks({"0": {"weight": torch.rand(4, 3, 3, 3) > 0.5}})
    regularizer = GrowingRegularization(model, masks, growth=0.2, every=2, ceiling=0.5)
    scales = []
    for _ in range(7):
        regularizer.step()
        scales.append(round(regularizer.scale, 6))
    assert scales == [0, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5]
    assert regularizer.finished
    gone = model[0].weight.detach() * ~masks["0"]["weight"]
    torch.testing.assert_close(regularizer(), 0.25 * gone.square().sum())
    regularizer.add_gradients()
    torch.testing.assert_close(model[0].weight.grad, 0.5 * gone)


# -- both ways -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_adding_to_the_loss_or_to_the_gradients_is_the_same(name: str) -> None:
    one, two = net(), net()
    torch.manual_seed(1)
    (one(X).square().sum() + MAKERS[name](one)()).backward()
    two(X).square().sum().backward()
    torch.manual_seed(1)
    MAKERS[name](two).add_gradients()
    mine, theirs = gradients(one), gradients(two)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key])


@pytest.mark.parametrize("name", MAKERS)
def test_at_zero_the_gradient_is_zero(name: str) -> None:
    model = net()
    for parameter in model.parameters():
        parameter.data.zero_()
    regularizer = MAKERS[name](model)
    regularizer().backward()
    assert regularizer().item() == 0
    assert all(not grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("by_torch", [True, False])
def test_masked_entries_count_as_zero(name: str, by_torch: bool) -> None:
    model, zeroed = net(), net()
    masks = Masks({"0": {"weight": torch.rand(4, 3, 3, 3) > 0.5}})
    torch.manual_seed(1)
    expected = MAKERS[name](zeroed)
    masks.make_permanent(zeroed)
    torch.manual_seed(1)
    before = MAKERS[name](model)
    (masks.apply_torch_prune if by_torch else masks.apply)(model)
    torch.manual_seed(1)
    for regularizer in (before, MAKERS[name](model)):
        torch.testing.assert_close(regularizer(), expected())
    before.add_gradients()
    before.add_gradients()  # no graph of an earlier pass is needed


def test_frozen_and_half_precision_parameters() -> None:
    model = net().half()
    model[0].weight.requires_grad_(False)
    regularizer = L1(model, 1.0)
    assert regularizer().dtype == torch.float32
    regularizer.add_gradients()
    assert gradients(model).keys() == {"4.weight"}
    assert model[4].weight.grad.dtype == torch.float16
    model.requires_grad_(False)
    regularizer.add_gradients()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x)).relu()).relu())


def test_shared_weights_count_once() -> None:
    torch.manual_seed(0)
    model = Tied()
    every = {id(p): p for p in model.parameters() if p.dim() > 1}.values()
    torch.testing.assert_close(L1(model, 1.0)(), sum(p.abs().sum() for p in every))
    group = GroupLasso(model, 1.0, dummy_input=torch.rand(2, 6))
    biases = [model.stem, model.a, model.b]
    assert int(group._sizes.sum()) == 2 * 36 + sum(layer.bias.numel() for layer in biases)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[0] = False
    masks = Masks({"a": {"weight": mask}, "b": {"weight": mask}})
    growing = GrowingRegularization(model, masks, growth=2.0, every=1, ceiling=2.0)
    growing.step()
    torch.testing.assert_close(growing(), model.a.weight[0].square().sum())


# -- what they are for ---------------------------------------------------------------------


class Residual(nn.Module):
    """A stream of 12 channels that two layers write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 12), nn.BatchNorm1d(12)
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.down(self.up(x).relu())
        return self.head(x.relu())


def trained(make: Callable[[nn.Module], Regularizer] | None) -> tuple[Residual, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(128, 4)
    y = (x[:, :1] - 0.5 * x[:, 1:2]).relu() + x[:, 2:3]  # two or three channels are enough
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    regularizer = None if make is None else make(model)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 250)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if regularizer is not None:
            regularizer.add_gradients()
        optimizer.step()
    return model.eval(), x, y


def rows(model: Residual) -> Tensor:
    """(2, channels): what each layer of the stream writes with."""
    layers = (model.stem, model.down)
    return torch.stack([layer.weight.detach().norm(dim=1) for layer in layers])


def test_under_group_lasso_coupled_layers_shrink_alike() -> None:
    sample = torch.rand(2, 4)
    coupled = rows(trained(lambda m: GroupLasso(m, 3e-3, dummy_input=sample))[0])
    alone = rows(trained(lambda m: L1(m, 3e-3))[0])
    assert float(coupled.corrcoef()[0, 1]) > max(0.85, float(alone.corrcoef()[0, 1]) + 0.15)


def test_the_pruner_finds_the_groups_that_fell() -> None:
    sample = torch.rand(2, 4)
    model, x, y = trained(lambda m: GroupLasso(m, 1e-2, dummy_input=sample))
    fallen = (rows(model) < 0.03 * rows(model).amax(1, keepdim=True)).all(0)
    free = rows(trained(None)[0])
    assert int(fallen.sum()) >= 6 and not (free < 0.03 * free.amax(1, keepdim=True)).any()
    config_list = [{"sparsity": 0.5, "op_names": ["stem", "down"]}]
    before = F.mse_loss(model(x), y).detach()
    pruner = L2FilterPruner(model, config_list, mode="dependency_aware", dummy_input=sample)
    _, masks = pruner.compress()
    assert bool(fallen[~masks["stem"]["bias"]].all())
    small = ModelSpeedup(model, sample, masks).speedup_model()
    assert small.stem.out_features == small.head.in_features == 6
    torch.testing.assert_close(F.mse_loss(small(x), y).detach(), before, rtol=0, atol=2e-3)


def test_growing_regularization_moves_the_work_away() -> None:
    def prune_now(model: Residual) -> float:
        masks.make_permanent(model)
        return F.mse_loss(model(x), y).item()

    plain, x, y = trained(None)
    masks = L1FilterPruner(plain, [{"sparsity": 0.5, "op_names": ["up"]}]).calc_masks()
    at_once = prune_now(deepcopy(plain))
    model = deepcopy(plain).train()
    regularizer = GrowingRegularization(model, masks, growth=0.02, every=1, ceiling=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    while not regularizer.finished:
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + regularizer()).backward()
        optimizer.step()
        regularizer.step()
    before = F.mse_loss(model.eval()(x), y).item()
    assert prune_now(model) < before + 1e-3 < at_once
    level = LevelPruner(model, [{"sparsity": 0.5, "op_names": ["up"]}]).calc_masks()
    assert torch.equal(level["up"]["weight"], masks["up"]["weight"])


# -- after a speedup -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_speedup_is_survived_or_noticed(name: str) -> None:
    model = net()
    regularizer = MAKERS[name](model)
    keep = torch.tensor([True, False, True, False])
    masks = Masks({
        "0": {"weight": keep[:, None, None, None].expand(4, 3, 3, 3), "bias": keep},
        "1": {"weight": keep, "bias": keep},
    })  # fmt: skip
    small = ModelSpeedup(model, X, masks).speedup_model()
    if name in ("l1", "batch norm"):
        torch.testing.assert_close(regularizer(), MAKERS[name](small)())
        return
    before = gradients(small)
    message = r"0\.weight was of shape \(4, 3, 3, 3\) and is of shape \(2, 3, 3, 3\).*make a new"
    with pytest.raises(CompressError, match=message):
        regularizer.add_gradients()
    assert gradients(small).keys() == before.keys()
    if name.startswith("group"):
        assert len(MAKERS[name](small).norms()) == 2  # type: ignore[attr-defined]


def test_a_graph_of_a_torch_pruned_model_goes_stale_with_its_names() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    regularizer = GroupLasso(ChannelGraph(model, X), 1.0)
    assert regularizer().item() > 0
    prune.remove(model[0], "weight")
    with pytest.raises(CompressError, match=r"0\.weight_orig was of shape .* and is gone"):
        regularizer()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1(net(), -1), "scale: got -1; expected a finite number"),
        (lambda: L1(net(), float("nan")), "scale: got nan"),
        (lambda: L1("model", 1.0), "model: got str; expected a torch.nn.Module"),
        (lambda: BatchNormL1(nn.Linear(2, 2), 1.0), "Linear has no batch norm with a weight"),
        (lambda: GroupLasso(net(), 1.0), "got a model without dummy_input"),
        (lambda: GroupLasso(3, 1.0), "source: got int"),
        (lambda: GrowingRegularization(net(), {}, every=0), "every: got 0"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MAKERS)
def test_on_a_gpu(name: str) -> None:
    torch.manual_seed(1)
    expected = MAKERS[name](net())().item()
    torch.manual_seed(1)
    model = net()
    regularizer = MAKERS[name](model)
    model.cuda()
    assert regularizer().item() == pytest.approx(expected, rel=1e-4)
    regularizer.add_gradients()
