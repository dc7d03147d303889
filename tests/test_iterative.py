"""Pruners that follow a schedule: the sparsity of every step, what stays masked, and rounds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from digit_networks import batches, evaluator, residual, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress import AGPPruner, Evaluator, IterativePruner, LinearPruner, Masks
from compress.errors import CompressError, ConfigError
from compress.masks import applied_masks
from compress.pruners import FPGMPruner, LAMPPruner, RandomFilterPruner
from compress.schedule import Cyclic

BASES = ("level", "slim", "l1", "l2", "fpgm", "taylorfo", "apoz", "mean_activation")


def epochs(**options: Any) -> list[dict[str, Any]]:
    types = options.pop("op_types", ["Conv2d"])
    return [{"final_sparsity": 0.75, "end_epoch": 4, "op_types": types, **options}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for images, labels in batches()[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def masked_units(masks: Masks, layer: str) -> int:
    kept = masks[layer]["weight"]
    return len(kept) - int(kept.flatten(1).any(1).sum() if kept.dim() > 1 else kept.sum())


def within(new: Masks, old: Masks) -> bool:
    """Whether nothing that ``old`` masks is kept by ``new``."""
    return new & old == new


@pytest.mark.parametrize("base", [*BASES, RandomFilterPruner])
def test_every_step_is_reached_exactly_and_what_is_masked_stays(base: Any) -> None:
    model = residual()
    optimizer = sgd(model.parameters())
    types = ["BatchNorm2d"] if base == "slim" else ["Conv2d"]
    pruner = AGPPruner(
        model, epochs(op_types=types), optimizer, pruning_algorithm=base, evaluator=evaluator(1)
    )
    pruner.compress()
    before, found = pruner.masks, []
    for epoch in range(5):
        pruner.update_epoch(epoch)
        assert within(pruner.masks, before)
        assert pruner.masks == applied_masks(model)
        before = pruner.masks
        layer = "bn1" if base == "slim" else "conv1"
        if layer in before:
            weight = before[layer]["weight"]
            found.append(int(weight.numel() - weight.count_nonzero()) / weight.numel())
        train(model, optimizer)
    # 0.75 - 0.75 · (1 - k/3)³ at k = 1, 2, 3 is 0.5278, 0.7222, 0.75; of 8 filters 4, 5, 6 go.
    expected = [38 / 72, 52 / 72, 54 / 72] if base == "level" else [4 / 8, 5 / 8, 6 / 8]
    assert found == [0, *expected, expected[-1]][-len(found) :]
    assert len(found) >= 4


@pytest.mark.parametrize("mode", ["global", "dependency_aware", "isomorphic"])
def test_modes_count_what_is_masked(mode: str) -> None:
    model = residual()
    optimizer = sgd(model.parameters())
    key = "sparsity" if mode == "dependency_aware" else "total_sparsity"
    config = [{key: 0.5, "end_epoch": 4, "op_names": ["conv1", "conv2", "conv3"]}]
    pruner = LinearPruner(
        model, config, pruning_algorithm="fpgm", dummy_input=batches()[0][0][:1],
        pruning_params={"mode": mode},
    )  # fmt: skip
    before, gone = Masks(), []
    for epoch in range(4):
        pruner.update_epoch(epoch)
        assert within(pruner.masks, before)
        before = pruner.masks
        weights = [before[n]["weight"] for n in ("conv1", "conv2", "conv3") if n in before]
        gone.append(sum(int(w.numel() - w.count_nonzero()) for w in weights))
        train(model, optimizer)
    total = 72 + 432 + 432
    if mode == "dependency_aware":  # conv1 and conv3: 2 and 4 of 8 filters; conv2: 1, 2, 3 of 6
        assert gone == [
            0,
            1 * 9 + 54 * 1 + 72 * 1,
            2 * 9 + 54 * 2 + 2 * 72,
            4 * 9 + 4 * 54 + 3 * 72,
        ]
    else:
        for fraction, count in zip((1 / 6, 2 / 6, 3 / 6), gone[1:], strict=True):
            assert abs(count - fraction * total) <= 72 + 9


def test_steps_of_the_optimizer_are_counted() -> None:
    model = residual()
    optimizer = sgd(model.parameters())
    pruner = AGPPruner(model, epochs(), optimizer, steps_per_epoch=2)
    pruner.compress()
    seen = []
    for images, labels in batches()[:8]:
        seen.append((pruner.epoch, round(pruner.masks.sparsity, 2)))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s for _, s in seen][::2] == [0, 0.53, 0.72, 0.75]
    weight = dict(pruner.masks.items())["conv1"]["weight"]
    assert bool((model.conv1.weight[~weight] == 0).all())
    pruner.unwrap_model()
    optimizer.step()
    assert pruner.epoch == 4
    optimizer.step()
    optimizer.step()
    assert pruner.epoch == 4  # nothing counts any more
    assert bool((model.conv1.weight[~weight] == 0).any())


def test_a_second_compress_changes_nothing() -> None:
    model = residual()
    optimizer = sgd(model.parameters())
    pruner = AGPPruner(model, epochs(), optimizer, steps_per_epoch=1)
    pruner.compress()
    train(model, optimizer)
    before = pruner.masks
    _, masks = pruner.compress()
    assert masks == before
    assert pruner.epoch == 1
    train(model, optimizer)
    assert pruner.epoch == 2  # counted once


def test_parameters_stay_the_optimizers() -> None:
    model = residual()
    raw = {id(p) for p in model.parameters()}
    pruner = AGPPruner(model, epochs())
    for epoch in range(4):
        pruner.update_epoch(epoch)
        assert {id(p) for p in model.parameters()} == raw
    part = model.conv1.parametrizations.weight[0]
    pruner.update_epoch(9)  # final already: nothing is touched
    assert model.conv1.parametrizations.weight[0] is part


def test_masks_from_before_stay_and_count() -> None:
    model = residual()
    given = torch.ones(8, dtype=torch.bool)
    given[[0, 7]] = False
    mask = given.reshape(8, 1, 1, 1).expand(8, 1, 3, 3)
    Masks({"conv1": {"weight": mask}}).apply(model)
    pruner = LinearPruner(model, epochs(op_names=["conv1"]), pruning_algorithm="l1")
    for epoch, count in enumerate((2, 2, 4, 6)):
        pruner.update_epoch(epoch)
        assert masked_units(pruner.masks, "conv1") == count
        assert not bool(pruner.masks["conv1"]["weight"][[0, 7]].any())


@pytest.mark.parametrize("mode", ["normal", "global", "dependency_aware"])
def test_a_one_shot_pruner_counts_what_is_masked_before_whatever_its_score(mode: str) -> None:
    model = nn.Sequential(nn.Linear(1, 5, bias=False), nn.Linear(5, 2))
    # By FPGM the masked filter, which counts as 0, has the largest distance to the others.
    model[0].weight.data = torch.tensor([[9.0], [9.1], [9.2], [9.0], [9.4]])
    given = torch.tensor([[True], [True], [True], [True], [False]])
    Masks({"0": {"weight": given}}).apply(model)
    key = "total_sparsity" if mode == "global" else "sparsity"
    options = {"dummy_input": torch.rand(2, 1)} if mode == "dependency_aware" else {}
    pruner = FPGMPruner(model, [{key: 0.4, "op_names": ["0"]}], mode=mode, **options)
    _, masks = pruner.compress()
    # Of 5 filters 2 go: the one that is gone, and the first of the two at distance 0.3 + 9.
    assert masks["0"]["weight"].flatten().tolist() == [False, True, True, True, False]


def test_a_cyclic_schedule_lets_weights_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight.data = torch.arange(1.0, 17).reshape(4, 4)
    pruner = IterativePruner(
        model, [{"sparsity": 0.5, "op_types": ["Linear"]}], total_iteration=4, schedule="cyclic"
    )
    found = []
    for number in pruner.rounds():
        found.append(16 - int(pruner.masks["0"]["weight"].sum()))
        if number == 2:  # what is masked has grown large: it is the stored value that counts
            model[0].parametrizations.weight.original.data[0, 0] = 99
    assert found == [7, 8, 7, 8]
    assert bool(pruner.masks["0"]["weight"][0, 0])
    assert model[0].weight[0, 0].item() == 99


# --- rounds


def test_rounds_train_after_each_mask() -> None:
    model = residual()
    seen = []
    pruner = IterativePruner(
        model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], pruning_algorithm="l1",
        total_iteration=3, schedule="linear",
        finetuner=lambda m: seen.append(masked_units(applied_masks(m), "conv1")),
    )  # fmt: skip
    given, masks = pruner.compress()
    assert given is model
    assert seen == [1, 2, 4]
    assert masks == pruner.masks == applied_masks(model)
    pruner.compress()
    assert seen == [1, 2, 4]  # all is done


@pytest.mark.parametrize("kind", [AGPPruner, LinearPruner])
def test_an_evaluator_trains(kind: type[IterativePruner]) -> None:
    model = residual()
    before = model.fc.weight.clone()
    pruner = kind(
        model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], pruning_algorithm="taylorfo",
        total_iteration=2, evaluator=evaluator(2),
    )  # fmt: skip
    pruner.compress()
    assert masked_units(pruner.masks, "conv1") == 4
    assert not torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("mode", ["dependency_aware", "global", "normal"])
def test_the_model_shrinks_in_each_round(mode: str) -> None:
    model = residual()
    optimizer = sgd(model.parameters())
    x = batches()[0][0][:2]
    key = "total_sparsity" if mode == "global" else "sparsity"
    config = [{key: 0.5, "op_names": ["conv1", "conv2", "conv3"]}]
    pruner = IterativePruner(
        model, config, optimizer, "l1", total_iteration=3, schedule="linear", speedup=True,
        dummy_input=x, pruning_params={"mode": mode},
    )  # fmt: skip
    sizes = []
    for _ in pruner.rounds():
        momentum = optimizer.state.get(model.conv2.weight)
        train(model, optimizer)
        sizes.append((model.conv1.out_channels, model.conv2.out_channels))
        raw = [p for p in model.parameters() if p in optimizer.state]
        assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in raw)
        assert momentum is None or momentum
    if mode == "dependency_aware":
        assert sizes == [(7, 5), (6, 4), (4, 3)]  # of 8: 1, 2, 4; of 6: 1, 2, 3
        assert pruner.masks.sparsity == 0
    elif mode == "normal":  # the stream loses only what is masked in both branches
        assert sizes[-1][1] < 6
        for name, units, gone in (("conv1", 8, 4), ("conv2", 6, 3), ("conv3", 8, 4)):
            left = model.get_submodule(name).out_channels
            assert units - left + masked_units(pruner.masks, name) == gone
    else:
        assert sizes[-1][1] < 6


def test_shrinking_in_rounds_loses_what_masking_alone_does() -> None:
    """Without training between, so that both see the same weights."""
    x = batches()[0][0][:2]
    config = [{"sparsity": 0.5, "op_names": ["conv2"]}, {"sparsity": 0.4, "op_names": ["hidden"]}]
    small, masked = residual(), residual()
    for model, speedup in ((small, True), (masked, False)):
        IterativePruner(
            model, config, pruning_algorithm="l1", total_iteration=4, schedule="exponential",
            speedup=speedup, dummy_input=x, finetuner=lambda model: None,
        ).compress()  # fmt: skip
    # One channel of conv2 stays to carry the constants of those that went.
    assert (small.conv2.out_channels, small.hidden.out_features) == (4, 12)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-5, atol=1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pruning_algorithm": "taylor"}, "got 'taylor'; expected one of level, slim, l1, l2, fpg"),
        ({"pruning_algorithm": compress.Masks}, "or the class of a one-shot pruner"),
        ({"schedule": "cubik"}, "schedule: got 'cubik'; expected one of one_shot, linear, cubic"),
        ({"optimizer": "l1"}, "optimizer: got str; expected a torch.optim.Optimizer"),
        ({"optimizer": "l1"}, "pass pruning_algorithm='l1'"),
        ({"steps_per_epoch": 3}, "it counts the steps of an optimizer, and got none"),
        ({"schedule_params": {"cycles": 3}}, "schedule_params: Linear does not take them"),
        ({"schedule": "cyclic", "schedule_params": {"cycles": 0}}, "cycles: got 0; expected a who"),
        ({"pruning_params": {"moed": 3}}, "pruning_params: LevelPruner does not take them"),
        ({"pruning_params": {"mode": "best"}}, "mode: got 'best'; LevelPruner has normal, global"),
        ({"pruning_algorithm": "apoz"}, "evaluator: got None; it looks at data"),
        ({"finetuner": 3}, "finetuner: got int; expected a function of the model"),
        ({"lr_scheduler": 3}, "lr_scheduler: got int; expected one of torch.optim's"),
        ({"speedup": True}, "dummy_input: got None; speedup runs the model"),
        ({"speedup": True}, "speedup: it is done in rounds; pass total_iteration"),
        ({"speedup": True, "schedule": Cyclic}, "with a Cyclic schedule masked weights come back"),
        ({"total_iteration": 0}, "total_iteration: got 0; expected a whole number ≥ 1"),
        ({"state": 3}, "state: got int; expected the path of a file"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], expected: str) -> None:
    model = residual()
    with pytest.raises(ConfigError) as error:
        IterativePruner(model, epochs(), **options)
    assert expected in str(error.value)
    assert not applied_masks(model)


def test_calls_that_do_not_fit_are_refused() -> None:
    pruner = AGPPruner(residual(), epochs())
    pruner.update_epoch(2)
    for epoch in (1, -1, 2.5):
        with pytest.raises(CompressError, match=r"update_epoch: got .* after epoch 2; expected"):
            pruner.update_epoch(epoch)  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="rounds: how many"):
        next(pruner.rounds())
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    in_rounds = AGPPruner(residual(), config, total_iteration=2)
    with pytest.raises(CompressError, match="update_epoch: this pruner works in 2 rounds"):
        in_rounds.update_epoch(0)
    with pytest.raises(ConfigError, match="trains in each round: got no finetuner"):
        in_rounds.compress()
    lacking = AGPPruner(residual(), config, total_iteration=2, evaluator=Evaluator(batches()))
    with pytest.raises(ConfigError, match="its Evaluator has no optimizer_factory"):
        lacking.compress()


def test_a_pattern_that_has_one_sparsity_only_is_refused_at_once() -> None:
    config = [{"final_sparsity": 0.5, "end_epoch": 5, "op_names": ["hidden"]}]
    params = {"mode": "balanced", "balance": "2:4"}
    with pytest.raises(ConfigError, match=r"got sparsity 0\.\d+; balance masks 0\.5"):
        AGPPruner(residual(), config, pruning_params=params)
    at_once = IterativePruner(residual(), config, schedule="one_shot", pruning_params=params)
    at_once.update_epoch(0)
    assert at_once.masks["hidden"]["weight"].sum() == 20 * 32 / 2


def test_a_failing_step_leaves_the_masks() -> None:
    model = residual()
    pruner = LinearPruner(model, epochs(), pruning_algorithm="l1")
    pruner.update_epoch(1)
    before = pruner.masks
    with torch.no_grad():
        model.conv1.parametrizations.weight.original.fill_(float("nan"))
    with pytest.raises(compress.errors.MaskError, match="NaN or infinite scores: 'conv1'"):
        pruner.update_epoch(2)
    assert pruner.masks == before == applied_masks(model)
    assert pruner.epoch == 1


def test_lamp_and_a_global_ranking() -> None:
    model = residual()
    config = [{"total_sparsity": 0.75, "end_epoch": 4, "op_types": ["Conv2d", "Linear"]}]
    pruner = AGPPruner(model, config, pruning_algorithm=LAMPPruner)
    optimizer = sgd(model.parameters())
    found: list[Tensor | float] = []
    for epoch in range(4):
        pruner.update_epoch(epoch)
        found.append(pruner.masks.sparsity)
        train(model, optimizer)
    expected = [0, *(0.75 - 0.75 * (1 - k / 3) ** 3 for k in (1, 2, 3))]
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_copy_goes_on_by_itself() -> None:
    pruner = AGPPruner(residual(), epochs())
    pruner.update_epoch(1)
    other = copy.deepcopy(pruner)
    other.update_epoch(3)
    assert pruner.masks.sparsity < other.masks.sparsity
    assert applied_masks(pruner.model) == pruner.masks
    assert isinstance(other.model, nn.Module)
