"""Indices, new tensors, looked-up places and norms between layers: what is whole may shrink."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import check_exact, randomise
from test_speedup import filters, pictures
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ModelSpeedup

BOXES = [[0, 0.0, 0.0, 4.0, 4.0], [1, 2.0, 1.0, 9.0, 9.0]]


def rows() -> Tensor:
    return torch.tensor([2, 0, 1])


class Between(nn.Module):
    """Half of the channels of one layer masked, then a function, then a layer that reads them."""

    def __init__(self, function: Callable[[Tensor], Tensor], out: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1) if out is nn.Conv2d else nn.Linear(8, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x)))


def shrunk(function: Callable[[Tensor], Tensor], out: type[nn.Module] = nn.Conv2d) -> ModelSpeedup:
    torch.manual_seed(0)
    model = Between(function, out).double().eval()
    randomise(model)
    return check_exact(model, pictures(), {"body": filters(model.body, 0, 3, 4)}, trains=False)


def written(y: Tensor, index: object) -> Tensor:
    """What is in y at an index, written into zeros of its size."""
    result = torch.zeros(y.shape, dtype=y.dtype)
    result[index] = y[index]
    return result


def places(batch: int) -> Tensor:
    """Some of them are outside of the picture."""
    return torch.linspace(-1.5, 1.5, batch * 30, dtype=torch.float64).reshape(batch, 3, 5, 2)


def by_level(y: Tensor) -> Tensor:
    """Rows of results computed in two parts, as detectors do for the levels of a pyramid."""
    rows = y.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)
    even = torch.arange(len(y)) % 2 == 0
    result = torch.zeros((len(y), y.shape[1], 2, 2), dtype=y.dtype)
    for level in (even, ~even):
        at = torch.where(level)[0]
        result[at] = rows[at] * 2
    return result


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda y: y[rows() % len(y)],
    "rows as a list": lambda y: y[[0, 0]],
    "columns": lambda y: y[..., rows()],
    "places": lambda y: y[:, :, torch.tensor([[1, 3], [0, 2]]), 0],
    "two apart": lambda y: y[rows() % len(y), :, rows()].unsqueeze(-1),
    "two together": lambda y: y[:, :, rows(), rows()].unsqueeze(-1),
    "after a new axis": lambda y: y[:, None, :, rows()].squeeze(1),
    "a number and a tensor": lambda y: y[0, :, rows()][None],
    "a tensor of one": lambda y: y[:, :, torch.tensor(1)].unsqueeze(-1),
    "mask of rows": lambda y: y[torch.arange(len(y)) != 1],
    "mask of places": lambda y: y[:, :, torch.eye(8) > 0].unsqueeze(-1),
    "write rows": lambda y: written(y, rows() % len(y)),
    "write columns": lambda y: written(y, (..., rows())),
    "write a part": lambda y: written(y, (slice(None), slice(None), slice(1, 3))),
    "write all": lambda y: written(y, ...),
    "write a number": lambda y: y.index_fill(3, rows(), 0.0) * written(y, 0).ne(5),
    "write by level": by_level,
    "full": lambda y: y * torch.full((y.shape[1], 1, 1), 0.5, dtype=y.dtype),
    "new_ones": lambda y: y + y.new_ones(1, y.shape[1], 1, 1),
    "grid_sample": lambda y: F.grid_sample(y, places(len(y)), align_corners=False),
    "normalize": lambda y: F.normalize(y),
    "normalize after relu": lambda y: F.normalize(y.relu(), p=3.0, dim=1),
    "sum": lambda y: y * y.sum(1, keepdim=True),
    "norm": lambda y: y * y.norm(dim=1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_an_axis_that_is_taken_whole_shrinks(name: str) -> None:
    kept = 8 if name == "write a number" else 5
    assert shrunk(WHOLE[name]).model.head.in_channels == kept


def test_regions_of_a_picture_keep_its_channels() -> None:
    ops = pytest.importorskip("torchvision.ops")
    for pool in (ops.roi_align, ops.roi_pool):
        speedup = shrunk(lambda y, pool=pool: pool(y, y.new_tensor(BOXES[: len(y)]), (2, 2), 0.5))
        assert speedup.model.head.in_channels == 5


FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": lambda y: y[:, torch.arange(8)],
    "list of channels": lambda y: y[:, [*range(8)]],
    "mask of channels": lambda y: y[:, torch.ones(8) > 0],
    "channels written": lambda y: written(y, (slice(None), torch.arange(8))),
    "literal size": lambda y: y + torch.zeros((1, 8, 1, 1), dtype=y.dtype),
    "mean": lambda y: y + y.mean(1, keepdim=True),
    "largest": lambda y: F.normalize(y, p=-1.0),
}


@pytest.mark.parametrize("name", FIXED)
def test_an_axis_of_which_positions_are_named_stays(name: str) -> None:
    speedup = shrunk(FIXED[name])
    assert speedup.model.head.in_channels == 8
    (body,) = speedup.report.layers
    assert sum(body.kept.values()) == 3


def test_a_table_of_positions_loses_columns() -> None:
    """The relative positions of attention: rows by a tensor of indices, a column for each head."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(9, 8))
            self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.register_buffer("index", torch.randint(0, 9, (8, 8)))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) * self.table[self.index].permute(2, 0, 1))

    torch.manual_seed(0)
    model = Table().double().eval()
    randomise(model)
    keep = torch.ones(9, 8)
    keep[:, [1, 6]] = 0
    masks = {"": {"table": keep}, "body": filters(model.body, 1, 2)}
    check_exact(model, pictures(), masks, trains=False)
    assert model.table.shape == (9, 5)
    assert model.head.in_channels == 5
