"""Tensors that no recorded function makes: out of caches of earlier runs, or of numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from oracle import MaskDict, check_exact, outputs, randomise
from torch import Tensor, nn

from compress.graph.channels import ChannelGraph

GONE = [1, 4, 6]


@lru_cache
def table_of_places(places: int) -> Tensor:
    return torch.arange(places).float().div(places).sin()[:, None]


@lru_cache
def table_of_shape(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.arange(shape[0], device=device).float().div(shape[0]).cos()[:, None]


class Tabled(nn.Module):
    """Two layers, and between them a table that an earlier run may have made."""

    def __init__(self, table: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.first, self.second = table, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x * self.table(x))


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "by places": lambda x: table_of_places(x.shape[1]),
    "by shape": lambda x: table_of_shape(x.shape[1:], x.device),
    "of numbers": lambda x: torch.FloatTensor([x.shape[1] + 0.5]).to(x.device)[0],
    "of numbers, as they are": lambda x: torch.LongTensor([[2]] * x.shape[1]).to(x.device),
}


def masked_first() -> MaskDict:
    keep = torch.ones(8, dtype=torch.bool)
    keep[GONE] = False
    return {"first": {"weight": keep[:, None].expand(8, 5).clone(), "bias": keep}}


@pytest.mark.parametrize("name", TABLES)
def test_what_comes_out_of_a_cache_holds_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, x = Tabled(TABLES[name]), torch.randn(2, 4, 5)
    randomise(model)
    outputs(model, x)
    ChannelGraph(model, x)
    speedup = check_exact(model, x, masked_first())
    assert speedup.graph.trace.complete
    assert model.second.in_features == 5


def test_what_goes_through_numpy_stays() -> None:
    torch.manual_seed(0)
    model = Tabled(lambda x: torch.from_numpy(x.detach().numpy() * 2))
    randomise(model)
    check_exact(model, torch.randn(2, 4, 5), masked_first())
    assert model.second.in_features == 8
