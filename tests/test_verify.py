"""`compress.verify`: a verdict on two models, and where they part."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomise
from torch import Tensor, nn

from compress import L1FilterPruner, ModelSpeedup, verify
from compress.errors import SpeedupError, TraceError
from compress.speedup.compare import _matched


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    randomise(model)
    return model


def pictures() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def pair() -> tuple[nn.Module, nn.Module]:
    """The small model, and the masked one with its masks on."""
    masked, masks = L1FilterPruner(
        network(), [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    ).compress()
    small = ModelSpeedup(copy.deepcopy(masked), pictures(), {}).speedup_model()
    assert masks
    return small, masked


def test_a_small_model_is_the_same_on_drawn_inputs_of_every_size() -> None:
    small, masked = pair()
    verdict = verify(small, masked, pictures(), samples=2, batch_sizes=(1, 5))
    assert verdict
    assert verdict.same
    assert verdict.relative_error < 1e-5
    assert verdict.begins is None
    assert [(run.batch_size, run.drawn) for run in verdict.runs] == [
        (2, False), (1, True), (1, True), (5, True), (5, True),
    ]  # fmt: skip
    assert len({run.absolute_error for run in verdict.runs}) > 1  # other numbers each time
    assert str(verdict).startswith("the same: largest difference ")
    assert "compared on 5 inputs, batch sizes 1, 2, 5" in str(verdict)


@pytest.mark.parametrize("layer", ["0", "4", "9"])
def test_a_difference_is_found_where_it_begins(layer: str) -> None:
    small, masked = pair()
    with torch.no_grad():
        small.get_submodule(layer).weight[1] += 0.5
    verdict = verify(small, masked, pictures())
    assert not verdict
    assert verdict.begins is not None
    assert (verdict.begins.layer, verdict.begins.call) == (layer, 0)
    expected, got = masked.eval()(pictures()), small.eval()(pictures())
    difference = float((expected - got).abs().max().detach())
    assert verdict.runs[0].absolute_error == pytest.approx(difference, rel=1e-4)
    scale = float(expected.abs().max().detach())
    assert verdict.runs[0].relative_error == pytest.approx(difference / scale, rel=1e-4)
    assert "NOT the same" in str(verdict)
    assert f"it begins in {layer} ({type(small.get_submodule(layer)).__name__})" in str(verdict)


def test_everything_is_left_as_it_was() -> None:
    small, masked = pair()
    with torch.no_grad():
        small[9].bias += 1
    small.train()
    masked.eval()
    random = torch.get_rng_state()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (small, masked)]
    x = pictures()
    verify(small, masked, x)
    assert torch.equal(x, pictures())
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in small.modules())
    assert not any(m.training for m in masked.modules())
    for model, state in zip((small, masked), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules())


def test_tokens_are_drawn_from_among_those_given() -> None:
    seen: list[Tensor] = []

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, mask: Tensor, scale: float) -> dict[str, Tensor]:
            seen.append(ids)
            return {"out": self.out(self.embed(ids) * mask[..., None] * scale)}

    inputs = {"ids": torch.tensor([[3, 7, 7]]), "mask": torch.ones(1, 3), "scale": 2.0}
    model = Words()
    assert verify(copy.deepcopy(model), model, inputs, samples=3, batch_sizes=[4])
    assert {tuple(ids.shape) for ids in seen} == {(1, 3), (4, 3)}
    assert set(torch.cat([ids.flatten() for ids in seen]).tolist()) == {3, 7}


def test_several_inputs_are_each_compared() -> None:
    small, masked = pair()
    others = [pictures(), torch.zeros(1, 3, 9, 9), (torch.ones(3, 3, 6, 6),)]
    verdict = verify(small, masked, others, samples=0)
    assert [run.batch_size for run in verdict.runs] == [2, 1, 3]
    assert verdict


def test_what_the_masked_model_cannot_run_is_skipped_and_said() -> None:
    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(2, 3))

    model = Fixed(3, 2)
    verdict = verify(copy.deepcopy(model), model, torch.rand(2, 3), samples=1, batch_sizes=(1, 2))
    assert verdict
    assert [run.skipped for run in verdict.runs] == [False, True, False]
    assert "batch size 1: skipped, the masked model does not run (RuntimeError" in str(verdict)
    with pytest.raises(TraceError, match="does not run"):
        verify(copy.deepcopy(model), model, torch.rand(1, 3))


def test_a_small_model_that_does_not_run_is_not_the_same() -> None:
    small, masked = pair()
    small[3].in_channels = 3
    small[3].weight = nn.Parameter(torch.rand(4, 3, 3, 3))
    verdict = verify(small, masked, pictures(), samples=0)
    assert not verdict
    assert verdict.relative_error == float("inf")
    assert "the small model does not run (RuntimeError" in str(verdict)


def test_rounding_alone_is_told_by_float64() -> None:
    class Rounding(nn.Linear):
        """Adds a large number and takes it off again: in float32 digits are lost."""

        large = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.large - self.large

    torch.manual_seed(0)
    masked, small = Rounding(8, 3), Rounding(8, 3)
    small.load_state_dict(masked.state_dict())
    small.large = 1e5
    verdict = verify(small, masked, torch.rand(4, 8), samples=0)
    assert verdict.relative_error > 1e-4
    assert verdict.error_in_float64 is not None
    assert verdict.error_in_float64 < 1e-8
    assert verdict
    assert "in float64 the difference is" in str(verdict)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"small": 1}, "small is a int"),
        ({"inputs": []}, "empty list"),
        ({"samples": -1}, "samples is -1"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], text: str) -> None:
    arguments = {"small": network(), "masked": network(), "inputs": pictures()} | change
    with pytest.raises(SpeedupError, match=text):
        verify(**arguments)


def test_channels_are_matched_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2, 9, 5, generator=generator)
    expected[:, 4] = expected[:, 3]  # two that are alike
    kept = [0, 3, 4, 6, 8]
    found = _matched(expected, expected[:, kept] + 1e-6, 1)
    assert found.tolist() == kept
    assert np.all(np.diff(found) > 0)
