"""Distillation and recalibration against values by hand; the loop and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from digit_networks import batches, evaluator, residual, sgd, trained
from snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from compress import AGPPruner, Evaluator, L1FilterPruner, ModelSpeedup
from compress.errors import CompressError, ConfigError
from compress.masks import applied_masks
from compress.training import Distillation, EarlyStopping, fine_tune, recalibrate_batch_norms

X, LABELS = (
    torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 1, 0]),
)


def two_layers(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2))


# --- distillation


def test_the_loss_by_hand() -> None:
    student, teacher = two_layers(0).eval(), two_layers(1)
    loss = Distillation(
        teacher, Evaluator(criterion=F.cross_entropy), temperature=2.0, alpha=0.75, hints=["0"],
        hint_weight=3.0,
    )  # fmt: skip
    found = loss(student, (X, LABELS))
    assert teacher.training  # its mode is its own, but dropout was off
    z, z_t = student(X), teacher.eval()(X)
    p, q = (z_t / 2).softmax(1), (z / 2).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean()
    hint = (student[0](X) - teacher[0](X)).square().mean() / 2
    expected = 0.25 * F.cross_entropy(z, LABELS) + 0.75 * 4 * soft + 3 * hint
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student[0].weight.grad is not None
    assert not student._forward_hooks
    assert not teacher[0]._forward_hooks


def test_equal_models_lose_nothing_and_no_labels_are_needed() -> None:
    model = two_layers(0).eval()
    loss = Distillation(copy.deepcopy(model), Evaluator(), alpha=1.0, hints=["3"])
    assert loss(model, (X, LABELS)).item() == pytest.approx(0, abs=1e-7)
    assert loss(model, X).item() == pytest.approx(0, abs=1e-7)


def test_logits_of_every_position_and_of_transformers_outputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner = two_layers(seed).eval()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(x).square().mean(), "logits": self.inner(x)}

    x = torch.randn(2, 4, 3)
    student, teacher = Wrapped(0).eval(), Wrapped(1).eval()
    found = Distillation(teacher, Evaluator(), temperature=1, alpha=0.5)(student, {"x": x})
    p, q = teacher.inner(x).log_softmax(-1), student.inner(x).log_softmax(-1)
    soft = (p.exp() * (p - q)).sum(-1).mean()  # the mean over batch and places
    torch.testing.assert_close(found, 0.5 * student.inner(x).square().mean() + 0.5 * soft)


def test_a_hint_of_a_layer_that_has_shrunk() -> None:
    student, teacher = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), two_layers(1)
    hints = {"0": "0"}
    with pytest.raises(
        CompressError, match=r"hint '0': got shape \(4, 4\), the teacher's is \(4, 5"
    ):
        Distillation(teacher, Evaluator(), alpha=1, hints=hints)(student, X)
    projection = nn.Linear(4, 5)
    loss = Distillation(teacher, Evaluator(), alpha=1, hints=hints, projections={"0": projection})
    loss(student, X).backward()
    assert projection.weight.grad is not None


def test_wrong_arguments_of_a_distillation() -> None:
    with pytest.raises(ConfigError) as error:
        Distillation(
            two_layers(0), F.cross_entropy, temperature=0, alpha=2, hints=["00"],  # type: ignore[arg-type]
            hint_weight=-1, projections={"1": nn.Identity()},
        )  # fmt: skip
    for part in (
        "evaluator: got function; expected an Evaluator", "temperature: got 0", "alpha: got 2",
        "hints: got '00'; Sequential has no module of this name; did you mean '0'?",
        "hint_weight: got -1", "projections: got '1', which is no hint",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(CompressError, match="no logits in the model's output: got str"):
        Distillation(two_layers(0), Evaluator(), logits=None, alpha=1)(_Text(), X)


class _Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "text"


def test_a_pruner_distils() -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    loss = Distillation(dense, Evaluator(criterion=F.cross_entropy), hints=["fc"])
    data = Evaluator(batches()[:2], None, sgd, loss=loss)
    x = batches()[0][0]
    before = dense.eval()(x)
    AGPPruner(
        model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], pruning_algorithm="l1",
        total_iteration=2, evaluator=data, speedup=True, dummy_input=batches()[0][0][:1],
    ).compress()  # fmt: skip
    assert model.conv2.out_channels < 6
    assert torch.equal(dense(x), before)


# --- batch norms


def test_statistics_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(9)
    model.train()
    model[3].eval()
    model[1].momentum = 0.3
    data = [torch.randn(6, 3), torch.randn(4, 3)]
    weights = copy.deepcopy(dict(model.named_parameters()))
    state = torch.get_rng_state()
    assert recalibrate_batch_norms(model, Evaluator(data)) == 2
    hidden = [model[0](x) for x in data]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    variance = torch.stack([h.var(0) for h in hidden]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    # The second norm sees what the first makes of its batch, without dropout.
    torch.testing.assert_close(model[3].running_mean, torch.zeros(2), atol=1e-5, rtol=0)
    assert [m.training for m in model] == [True, True, True, False]
    assert (model[1].momentum, model[3].momentum) == (0.3, 0.1)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert recalibrate_batch_norms(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)),
                                   Evaluator(data)) == 0  # fmt: skip


def test_it_brings_a_pruned_model_back() -> None:
    model = trained()
    L1FilterPruner(model, [{"sparsity": 0.5, "op_names": ["conv1"]}]).compress()
    images = torch.cat([images for images, _ in batches()])
    labels = torch.cat([labels for _, labels in batches()])

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(images), labels))

    before = loss()
    assert recalibrate_batch_norms(model, evaluator(8), batches=4) == 3
    assert loss() < 0.8 * before


def test_statistics_stay_where_it_fails() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Skipping().train()
    before = snapshot(model)
    with pytest.raises(CompressError, match="no batch used 'unused'"):
        recalibrate_batch_norms(model, Evaluator([X]))
    assert_unchanged(before, snapshot(model))


# --- the loop


def scored(scores: list[float]) -> Evaluator:
    left = iter(scores)
    return Evaluator(batches()[:1], F.cross_entropy, sgd, eval_fn=lambda model: next(left))


def test_early_stopping_restores_the_best() -> None:
    model, reference = residual().eval(), residual().eval()
    stopping = EarlyStopping(patience=2, min_delta=0.05)
    history = fine_tune(model, scored([0.5, 0.7, 0.74, 0.6, 0.9]), 5, early_stopping=stopping)
    assert [epoch.score for epoch in history] == [0.5, 0.7, 0.74, 0.6]
    assert stopping.best == 0.7
    fine_tune(reference, scored([0, 0]), 2)
    assert all(
        torch.equal(v, reference.state_dict()[n]) for n, v in model.state_dict().items()
    )  # fmt: skip
    assert not model.training


def test_early_stopping_by_itself() -> None:
    stopping = EarlyStopping(patience=1)
    model = two_layers(0)
    with pytest.raises(CompressError, match="no score yet"):
        stopping.restore(model)
    assert not stopping.update(1.0, model)
    best = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    assert stopping.update(float("nan"), model)
    stopping.restore(model)
    assert torch.equal(model[0].weight, best["0.weight"])
    with pytest.raises(CompressError, match=r"'0.weight' was of shape \(5, 3\) and is so no more"):
        stopping.restore(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ConfigError, match="patience: got 0"):
        EarlyStopping(0)


def test_the_rate_is_rewound_in_each_call() -> None:
    model = residual()
    step = torch.optim.lr_scheduler.StepLR
    for _ in range(2):
        history = fine_tune(model, evaluator(1), 3, schedule=lambda o: step(o, 1, 0.5))
        assert [epoch.learning_rate for epoch in history] == [0.05, 0.025, 0.0125]


@pytest.mark.parametrize("masked", [True, False])
def test_mixed_precision_trains_in_float32(masked: bool) -> None:
    model = residual()
    if masked:
        L1FilterPruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}]).compress()
    seen: set[torch.dtype] = set()
    model.fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    plain = copy.deepcopy(model)
    loss = fine_tune(model, evaluator(2), 1, precision=torch.bfloat16, clip_norm=1.0)[0].loss
    assert torch.bfloat16 in seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = fine_tune(plain, evaluator(2), 1, clip_norm=1.0)[0].loss
    assert loss == pytest.approx(expected, rel=0.02)


def test_clipping_and_a_users_own_step() -> None:
    model, norms = residual(), []

    def look() -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    fine_tune(model, evaluator(1), 1, optimizer=optimizer, clip_norm=0.01, before_step=look)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norms[0] > 0.01
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_nothing_is_left_of_training_that_fails() -> None:
    model = residual().eval()
    before = snapshot(model)
    with pytest.raises(CompressError, match="the mean loss of an epoch is"):
        fine_tune(
            model, Evaluator(batches()[:2], None, sgd, loss=lambda m, b: m(b[0]).sum() * 1e38), 3
        )
    assert_unchanged(before, snapshot(model))


def test_wrong_arguments_of_the_loop() -> None:
    with pytest.raises(ConfigError) as error:
        fine_tune(
            residual(), Evaluator(batches()), -1, precision=torch.float64, clip_norm=0.0,
            early_stopping=EarlyStopping(),
        )  # fmt: skip
    for part in (
        "its Evaluator has no optimizer_factory", "epochs: got -1", "precision: got torch.float64",
        "clip_norm: got 0.0", "early_stopping: it goes by the score; pass eval_fn=",
    ):  # fmt: skip
        assert part in str(error.value)


# --- torch.compile


def compiled_run(compiles: bool) -> tuple[nn.Module, list[float], int]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = residual()
    called: Any = torch.compile(model, backend=counter) if compiles else model
    optimizer = sgd(model.parameters())
    config = [
        {"final_sparsity": 0.75, "initial_sparsity": 0.1, "end_epoch": 5, "op_types": ["Conv2d"]}
    ]
    pruner = AGPPruner(model, config, pruning_algorithm="l1")
    losses, compiled = [], 0
    for epoch in range(5):
        pruner.update_epoch(epoch)
        images, labels = batches()[epoch]
        optimizer.zero_grad()
        loss = F.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        compiled = compiled or counter.frame_count
    assert counter.frame_count == compiled  # masks that grow make no new graph
    return model, losses, compiled


def test_a_compiled_model_follows_growing_masks() -> None:
    import torch._dynamo.testing

    (model, losses, compiled), (plain, expected, _) = compiled_run(True), compiled_run(False)
    assert compiled > 0
    assert losses == pytest.approx(expected, rel=1e-4)
    assert applied_masks(model) == applied_masks(plain)
    x = batches()[0][0]
    small = ModelSpeedup(model, x).speedup_model().eval()
    torch.testing.assert_close(torch.compile(small, backend="eager")(x), small(x))


def test_a_schedule_is_a_function() -> None:
    model = two_layers(0)
    ready = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1)
    with pytest.raises(ConfigError, match="schedule: got StepLR; expected a function that makes"):
        fine_tune(model, evaluator(), 1, schedule=ready)  # type: ignore[arg-type]
