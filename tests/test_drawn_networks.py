"""The oracle over drawn networks: the small model computes what the masked one computes."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import draw_network
from oracle import (
    Choices,
    DrawnChoices,
    MaskDict,
    SeededChoices,
    check_exact,
    draw_masks,
    masked_copy,
    outputs,
    tolerance_of,
)
from torch import Tensor, nn

from compress import Masks, ModelSpeedup

# COMPRESS_EXAMPLES=20000 for a long search; the default is for every run of the suite.
EXAMPLES = int(os.environ.get("COMPRESS_EXAMPLES", "60"))
DRAWN = settings(
    report_multiple_bugs=False,
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def is_tame(model: nn.Module, masks: MaskDict, x: Tensor) -> bool:
    """Whether the masked model's outputs are numbers that can be compared."""
    with torch.no_grad():
        tensors = outputs(masked_copy(model, masks), x)
    return all(bool(t.isfinite().all()) and bool((t.abs() < 1e6).all()) for t in tensors)


def drawn(
    choices: Choices, steps: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, MaskDict]:
    """A network, its input and masks for it."""
    model, x = draw_network(choices, steps, dtype)
    return model, x, draw_masks(choices, model)


def check_drawn(choices: Choices, steps: int, dtype: torch.dtype = torch.float64) -> None:
    model, x, masks = drawn(choices, steps, dtype)
    if is_tame(model, masks, x):
        tolerance = max(tolerance_of(dtype), 3 * rounding_of(model, masks, x))
        check_exact(model, x, masks, tolerance=tolerance)


def rounding_of(model: nn.Module, masks: MaskDict, x: Tensor) -> float:
    """How far the masked model is from itself in double precision: some nets enlarge rounding."""
    if x.dtype == torch.float64:
        return 0.0
    masked = masked_copy(model, masks).eval()
    wide = copy.deepcopy(masked).double()
    with torch.no_grad():
        pairs = zip(outputs(masked, x), outputs(wide, x.double()), strict=True)
        return max(
            float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)) for a, b in pairs
        )


def test_a_network_that_enlarges_rounding() -> None:
    check_drawn(SeededChoices(33506), 5, torch.float32)


@DRAWN
@given(data=st.data(), steps=st.integers(1, 8))
def test_small_computes_what_masked_computes(data: st.DataObject, steps: int) -> None:
    check_drawn(DrawnChoices(data.draw), steps)


@DRAWN
@given(seed=st.integers(0, 2**32))
def test_longer_networks(seed: int) -> None:
    check_drawn(SeededChoices(seed), 16)


@DRAWN
@given(seed=st.integers(0, 2**32))
def test_single_precision(seed: int) -> None:
    check_drawn(SeededChoices(seed), 5, torch.float32)


@DRAWN
@given(seed=st.integers(0, 2**32))
def test_a_second_speedup_is_exact_too(seed: int) -> None:
    model, x, masks = drawn(SeededChoices(seed), 6)
    if not is_tame(model, masks, x):
        return
    first = check_exact(model, x, masks, trains=False)
    before = {n: p.shape for n, p in model.named_parameters()}
    check_exact(model, x, {path: dict(each) for path, each in first.masks.items()})
    assert all(p.numel() <= before[n].numel() for n, p in model.named_parameters() if n in before)


@DRAWN
@given(seed=st.integers(0, 2**32))
def test_masks_already_on_the_model_count(seed: int) -> None:
    """Half of the masks applied before, half given: as all of them given."""
    model, x, masks = drawn(SeededChoices(seed), 5)
    if not is_tame(model, masks, x) or not masks:
        return
    both = copy.deepcopy(model)
    check_exact(both, x, masks, trains=False)
    check_exact_applied(model, x, masks, both)


def check_exact_applied(model: nn.Module, x: Tensor, masks: MaskDict, expected: nn.Module) -> None:
    paths = list(masks)
    Masks({p: masks[p] for p in paths[::2]}).apply(model)
    ModelSpeedup(model, x, {p: masks[p] for p in paths[1::2]}).speedup_model()
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in expected.named_parameters()
    ]
    # Up to the last bit: torch 2.4 rounds the statistics of an InstanceNorm when it reads them.
    torch.testing.assert_close(
        model.state_dict(), expected.state_dict(), rtol=1e-14, atol=1e-14, equal_nan=True
    )
