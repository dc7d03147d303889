"""Pruners with a transformers.Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import assert_unchanged, snapshot
from torch import Tensor
from torch.nn import functional as F

from compress import ModelSpeedup
from compress.adapters import TransformersEvaluator
from compress.errors import ConfigError
from compress.pruners import (
    ActivationMeanRankFilterPruner,
    GraSPPruner,
    MovementPruner,
    OBDFilterPruner,
    SNIPFilterPruner,
    TaylorFOWeightFilterPruner,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # what the library warns of is its own

MLP = [{"sparsity": 0.5, "op_names_re": [r"intermediate\.dense"]}]
TOTAL = [{"total_sparsity": 0.5, "op_names_re": [r"intermediate\.dense"]}]
MEASURING = (
    ActivationMeanRankFilterPruner,
    TaylorFOWeightFilterPruner,
    OBDFilterPruner,
    SNIPFilterPruner,
)


class Stumble(Exception):
    pass


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def sentences() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 30, (24, 6), generator=generator)
    return [{"input_ids": row, "label": int(row[0]) % 3} for row in words]


def trainer_of(folder: Path, options: dict[str, Any] | None = None, **parts: Any) -> Any:
    known = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "use_cpu": True}
    known |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 3}
    arguments = transformers.TrainingArguments(str(folder), **{**known, **(options or {})})
    return transformers.Trainer(bert(), arguments, train_dataset=sentences(), **parts)


@pytest.mark.parametrize("kind", [*MEASURING, GraSPPruner])
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}])
def test_measuring_changes_nothing(
    kind: type[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, options)
    model = trainer.model.train()
    model.bert.embeddings.eval()
    before = snapshot(model)
    own = TransformersEvaluator(trainer)
    if kind is GraSPPruner:
        pruner: Any = GraSPPruner(model, TOTAL, own, temperature=1)
    else:
        pruner = kind(model, MLP, own)
    masks = pruner.calc_masks()
    assert_unchanged(before, snapshot(model))
    assert pruner.calc_masks() == masks  # the same batches again
    assert trainer.optimizer is None


def test_the_loss_is_that_of_the_trainer(tmp_path: Path) -> None:
    def tripled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 3 * F.cross_entropy(outputs.logits, labels)

    trainer = trainer_of(tmp_path, compute_loss_func=tripled)
    own, model = TransformersEvaluator(trainer), trainer.model.eval()
    batch = next(own.batches(1))
    plain = F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    for _ in range(2):  # the batch keeps its labels
        torch.testing.assert_close(own.loss(model, batch), 3 * plain)


@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_training_is_the_trainers(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, options)
    model = trainer.model.eval()
    random_state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    callbacks, parts = list(trainer.callback_handler.callbacks), list(model.modules())
    own = TransformersEvaluator(trainer)
    MovementPruner(model.bert, MLP, own, training_epochs=2).compress()
    assert trainer.state.global_step == 6  # two epochs of three steps, whatever max_steps was
    assert (trainer.args.max_steps, trainer.args.num_train_epochs) == (3, 3.0)
    assert trainer.optimizer is None
    assert trainer.callback_handler.callbacks == callbacks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(part.training for part in parts)
    assert all(p.grad is None for p in model.parameters())
    assert not {"forward", "_original_forward"} & set(vars(model))
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)


@pytest.mark.parametrize("kind", [*MEASURING, MovementPruner])
def test_nothing_is_left_where_the_loss_raises(kind: type[Any], tmp_path: Path) -> None:
    calls = []

    def stumble(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(labels)
        if len(calls) == 2:
            raise Stumble
        return F.cross_entropy(outputs.logits, labels)

    trainer = trainer_of(tmp_path, compute_loss_func=stumble)
    pruner = kind(trainer.model, MLP, TransformersEvaluator(trainer))
    before, callbacks = snapshot(trainer.model), list(trainer.callback_handler.callbacks)
    with pytest.raises(Stumble):
        pruner.compress()
    assert_unchanged(before, snapshot(trainer.model))
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.args.max_steps == 3
    assert trainer.optimizer is None


@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_to_a_smaller_model_that_trains_on(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, options)
    model = trainer.model.eval()
    own = TransformersEvaluator(trainer)
    own.train(model, 1)
    _, masks = TaylorFOWeightFilterPruner(model, MLP, own).compress()
    x = {"input_ids": torch.stack([row["input_ids"] for row in sentences()])}
    expected = model(**x).logits
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert small.bert.encoder.layer[0].intermediate.dense.weight.shape == (12, 16)
    torch.testing.assert_close(small(**x).logits, expected, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 3


def test_what_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(ConfigError, match="is of another model: expected the BertForSequenceClass"):
        TaylorFOWeightFilterPruner(bert(), MLP, TransformersEvaluator(trainer))
    with pytest.raises(ConfigError, match=r"trainer: got int; expected a transformers\.Trainer"):
        TransformersEvaluator(3)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    made = transformers.Trainer(None, arguments, train_dataset=sentences(), model_init=bert)
    with pytest.raises(
        ConfigError, match="its Trainer has a model_init, and would train a new mod"
    ):
        MovementPruner(made.model, MLP, TransformersEvaluator(made))
