"""Pruners with a LightningModule, its data and its Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_networks import Residual, batches, evaluator, residual
from snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress import ModelSpeedup
from compress.adapters import LightningEvaluator
from compress.errors import CompressError, ConfigError
from compress.masks import raw_parameter
from compress.pruners import (
    ActivationMeanRankFilterPruner,
    MovementPruner,
    OBDFilterPruner,
    SlimPruner,
    SNIPFilterPruner,
    TaylorFOWeightFilterPruner,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning: Any = pytest.importorskip("lightning.pytorch")
    torchmetrics: Any = pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.filterwarnings("ignore")  # what the library warns of is its own

BUT_LAST = [
    {"sparsity": 0.5, "op_types": ["Conv2d", "Linear"]},
    {"exclude": True, "op_names_re": ["fc$"]},
]
NORMS = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
MEASURING = (
    ActivationMeanRankFilterPruner,
    TaylorFOWeightFilterPruner,
    OBDFilterPruner,
    SNIPFilterPruner,
)


class Stumble(Exception):
    pass


class Lit(lightning.LightningModule):
    """Digits, with a metric, logs, an optimizer and its schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = residual()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.steps_to_go = -1

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.steps_to_go == 0:
            raise Stumble
        x, y = batch
        output = self(x)
        self.accuracy(output, y)
        loss = F.cross_entropy(output, y)
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy.compute()})
        self.steps_to_go -= 1
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Digits(lightning.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        parts = zip(*batches()[:3], strict=True)
        self.data = TensorDataset(*(torch.cat(part) for part in parts))

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=64, shuffle=True)


def one_batch() -> Any:
    return DataLoader(TensorDataset(*batches()[0]), batch_size=64)


def trainer_of(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    return lightning.Trainer(**{**quiet, "default_root_dir": folder, **options})


def with_metric(module: Any) -> list[Any]:
    metric = module.accuracy
    states = [(name, getattr(metric, name).clone()) for name in metric._defaults]
    return [*snapshot(module), *states, metric._update_count]


def check_shrinks(net: nn.Module) -> None:
    x = batches()[0][0]
    expected, size = net.eval()(x), sum(p.numel() for p in net.parameters())
    small = ModelSpeedup(net, x).speedup_model()
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * size


# --- measuring


@pytest.mark.parametrize("kind", MEASURING)
@pytest.mark.parametrize("part", ["", "net"])
def test_measuring_changes_nothing(kind: type[Any], part: str, tmp_path: Path) -> None:
    module = Lit().train()
    module.net.bn1.eval()
    module.accuracy(torch.eye(10), torch.arange(10))
    module(batches()[0][0]).sum().backward()
    trainer = trainer_of(tmp_path) if part else None
    before = with_metric(module)
    own = LightningEvaluator(module, Digits(), trainer=trainer)
    pruner = kind(module.get_submodule(part), BUT_LAST, own)
    masks = pruner.calc_masks()
    assert_unchanged(before, with_metric(module))
    assert pruner.calc_masks() == masks  # the same batches again


def test_the_loss_is_that_of_the_training_step() -> None:
    module, net = Lit(), residual()
    own = LightningEvaluator(module, one_batch())
    ours = TaylorFOWeightFilterPruner(module.net, BUT_LAST, own)
    plain = TaylorFOWeightFilterPruner(net, BUT_LAST, evaluator(1))
    assert ours.calc_masks() == plain.calc_masks()


def test_measured_masks_make_a_smaller_module() -> None:
    module = Lit()
    own = LightningEvaluator(module, Digits())
    TaylorFOWeightFilterPruner(module, BUT_LAST, own).compress()
    check_shrinks(module)


def test_a_datamodule_is_set_up_as_its_trainer_does() -> None:
    data = Digits()
    LightningEvaluator(Lit(), data)
    assert data.stages == ["fit"]


def test_the_modules_own_loader_and_its_hooks_for_the_transfer() -> None:
    class Own(Lit):
        def train_dataloader(self) -> Any:
            return one_batch()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 0, batch[1]

    own = LightningEvaluator(Own())
    assert [float(x.abs().sum()) for x, _ in own.batches(None, "cpu")] == [0]
    assert next(own.batches(1, "meta"))[0].is_meta


def test_a_training_step_without_an_index() -> None:
    module = Lit()
    module.training_step = lambda batch: F.cross_entropy(module(batch[0]), batch[1])
    own = LightningEvaluator(module, one_batch())
    assert own.loss(module, batches()[0]) > 0


# --- training


@pytest.mark.parametrize("by_module", [True, False])
def test_training_is_the_trainers(by_module: bool, tmp_path: Path) -> None:
    data: Any = Digits()
    if not by_module:
        data.setup("fit")
        data = DataLoader(data.data, batch_size=64)
    module, trainer = Lit().eval(), trainer_of(tmp_path, max_epochs=7)
    parts = list(module.modules())
    own = LightningEvaluator(module, data, trainer=trainer)
    pruner = SlimPruner(module.net, NORMS, own, training_epochs=2)
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    pruner.compress()
    assert (trainer.current_epoch, trainer.global_step, trainer.max_epochs) == (2, 6, 7)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(part.training for part in parts)
    assert all(p.grad is None for p in module.parameters())
    assert not torch.equal(before["net.conv1.weight"], module.net.conv1.weight)
    check_shrinks(module.net)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)  # it goes on, with the small model
    assert trainer.current_epoch == 3


def test_the_penalty_is_added_before_each_step(tmp_path: Path) -> None:
    found = []
    for scale in (0.0, 0.5):
        module = Lit()
        own = LightningEvaluator(module, one_batch(), trainer=trainer_of(tmp_path))
        SlimPruner(module, NORMS, own, training_epochs=1, scale=scale).compress()
        gamma = raw_parameter(module.net.bn1, "weight")
        assert gamma is not None
        found.append(gamma.detach().clone())
    sign = residual().bn1.weight.detach().sign()
    torch.testing.assert_close(found[0] - found[1], 0.05 * 0.5 * sign)


# --- where the user's code raises


@pytest.mark.parametrize("kind", MEASURING)
def test_nothing_is_left_where_the_training_step_raises(kind: type[Any]) -> None:
    module = Lit()
    module.steps_to_go = 1
    before = with_metric(module)
    with pytest.raises(Stumble):
        kind(module, BUT_LAST, LightningEvaluator(module, Digits())).compress()
    assert_unchanged(before, with_metric(module))


@pytest.mark.parametrize("kind", [SlimPruner, MovementPruner])
def test_nothing_is_left_of_a_training_that_raises(kind: type[Any], tmp_path: Path) -> None:
    module, trainer = Lit(), trainer_of(tmp_path)
    module.trainer = trainer
    module.steps_to_go = 2
    config_list = NORMS if kind is SlimPruner else BUT_LAST
    pruner = kind(module, config_list, LightningEvaluator(module, Digits(), trainer=trainer))
    assert not module.hparams  # Lightning makes them when they are first asked for
    before, callbacks = snapshot(module), list(trainer.callbacks)
    with pytest.raises(Stumble):
        pruner.compress()
    assert_unchanged(before, snapshot(module))
    assert trainer.callbacks == callbacks
    assert trainer.max_epochs == 1


# --- what is refused


def test_what_is_refused(tmp_path: Path) -> None:
    module, loader = Lit(), one_batch()
    own = LightningEvaluator(module, loader)
    with pytest.raises(ConfigError, match=r"no trainer; pass trainer=Trainer\(\.\.\.\)"):
        MovementPruner(module, BUT_LAST, own)
    with pytest.raises(ConfigError, match="is of another model: expected the Lit that it was made"):
        TaylorFOWeightFilterPruner(Residual(), BUT_LAST, own)
    with pytest.raises(ConfigError, match="module: got Residual; expected a LightningModule"):
        LightningEvaluator(Residual(), loader)
    with pytest.raises(ConfigError, match=r"trainer: got int; expected a lightning\.pytorch\.Tr"):
        LightningEvaluator(module, loader, trainer=3)
    with pytest.raises(ConfigError, match="data: got a list, which Lightning takes for several"):
        LightningEvaluator(module, batches())
    module.training_step = lambda batch: None
    with pytest.raises(ConfigError, match="returned no loss; expected a tensor"):
        TaylorFOWeightFilterPruner(module, BUT_LAST, own).calc_masks()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="its module optimizes by itself"):
        TaylorFOWeightFilterPruner(module, BUT_LAST, own)


def test_a_trainer_whose_limit_is_reached_says_so(tmp_path: Path) -> None:
    spent = trainer_of(tmp_path, max_epochs=None, max_steps=0)
    own = LightningEvaluator(Lit(), one_batch(), trainer=spent)
    with pytest.raises(CompressError, match="made no step of an optimizer: look whether its limit"):
        own.train(own.module, 1)
