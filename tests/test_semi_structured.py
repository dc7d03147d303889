"""Handing 2:4 weights to torch's sparse kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress import LevelPruner
from compress.errors import CompressError
from compress.semi_structured import to_semi_structured

CONFIG = [{"sparsity": 0.5, "op_names": ["0"]}]


def pruned() -> tuple[LevelPruner, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    pruner = LevelPruner(model, CONFIG, mode="balanced", balance="2:4")
    pruner.compress()
    return pruner, model


def test_what_is_missing_is_said() -> None:
    pruner, model = pruned()
    with pytest.raises(CompressError, match=r"masks are on the model.*unwrap_model"):
        to_semi_structured(model)
    pruner.unwrap_model()
    weight = model[0].weight
    with pytest.raises(CompressError, match=r"0: its weight is torch\.float32 on cpu; .*NVIDIA"):
        to_semi_structured(model)
    assert model[0].weight is weight
    with pytest.raises(CompressError, match="no Linear layer has 2:4 weights"):
        to_semi_structured(nn.Sequential(nn.Linear(8, 8)))


def test_only_2_of_4_layers_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner, model = pruned()
    pruner.unwrap_model()
    monkeypatch.setattr("compress.semi_structured._check_place", lambda name, weight: None)
    monkeypatch.setattr("compress.semi_structured.to_sparse_semi_structured", torch.clone)
    dense, before = model[2].weight, model[0].weight.detach().clone()
    assert to_semi_structured(model) == ["0"]
    assert model[2].weight is dense
    assert not model[0].weight.requires_grad and torch.equal(model[0].weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse kernels")
def test_the_sparse_layer_computes_the_same() -> None:
    pruner, model = pruned()
    pruner.unwrap_model()
    model = model.half().cuda()
    x = torch.rand(64, 128, device="cuda", dtype=torch.half)
    expected = model(x)
    assert to_semi_structured(model) == ["0"]
    assert type(model[0].weight.data).__name__.startswith("SparseSemiStructured")
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
