"""Indices, new tensors, looked-up places and norms between layers: what is whole may shrink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import check_exact, randomise
from test_speedup import filters, pictures
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ModelSpeedup
from compress.graph.channels import ChannelGraph

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


class Sliced(nn.Module):
    """Channels in two parts, of which each is worked on by itself; ``bound`` says where they part.

    The first ``lead`` stay as they are.
    """

    def __init__(self, bound: Callable[[nn.Module, int], int], lead: int = 0) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)
        self.half, self.bound, self.lead = 4, bound, lead

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(x)).relu()
        at = self.bound(self, y.shape[1])
        first, second = y[:, self.lead : at], y[:, at:]  # sliced
        return self.head(torch.cat([y[:, : self.lead], first * 2, second.tanh()], 1))


@pytest.mark.parametrize(
    ("bound", "lead", "gone", "left"),
    [
        (lambda m, size: size // 2, 0, (1, 6), 6),  # counted anew
        (lambda m, size: -(size // 2), 0, (1, 6), 6),
        (lambda m, size: m.half, 0, (1, 2, 5), 5),  # set
        (lambda m, size: 4, 0, (5, 7), 6),  # nothing goes in front of the number
        (lambda m, size: size // 2, 0, (1, 2, 6), 5),  # 5 // 2 is what is left of the first
        (lambda m, size: size // 2, 0, (1, 2, 3), 8),
        (lambda m, size: 4, 0, (1, 5), 8),
        (lambda m, size: 6, 2, (1, 6), 8),  # as many as before, but others
    ],
)
def test_a_slice_shrinks_where_its_bounds_follow(
    bound: Callable[[nn.Module, int], int], lead: int, gone: tuple[int, ...], left: int
) -> None:
    torch.manual_seed(0)
    model = Sliced(bound, lead).double().eval()
    randomise(model)
    masks = {"body": filters(model.body, *gone), "norm": filters(model.norm, *gone)}
    speedup = check_exact(model, pictures(), masks, trains=False)
    assert model.head.in_channels == left
    if left == 8:
        text = str(speedup.why("body", gone[0]))
        source = Path(__file__).read_text().splitlines()
        line = next(i for i, text in enumerate(source, 1) if "# sliced" in text)
        assert (
            f"is sliced at a fixed position at the model's forward (test_indexing.py:{line})"
            in text
        )


def interleaved(y: Tensor) -> Tensor:
    return torch.stack([-y[:, 1::2], y[:, ::2]], 2).flatten(1, 2)


def halves(y: Tensor) -> Tensor:
    n = y.shape[1] // 2
    return torch.cat([-y[:, n:], y[:, :n]], 1)


@pytest.mark.parametrize(("turn", "gone"), [(interleaved, (2, 3, 6, 7)), (halves, (1, 3, 5, 7))])
def test_rotated_dims_go_in_pairs(turn: Callable[[Tensor], Tensor], gone: tuple[int, ...]) -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("angle", torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            angle = self.angle.repeat_interleave(2) if turn is interleaved else self.angle.repeat(2)
            y = self.body(x)
            return self.head(y * angle.cos() + turn(y) * angle.sin())

    torch.manual_seed(0)
    model = Rotated().double()
    check_exact(model, torch.rand(2, 3).double(), {"body": filters(model.body, *gone)})
    assert model.angle.shape == (2,)
    assert model.body.out_features == 4


class ZeroedBias(nn.Module):
    """A part of the bias is written through a view of a copy of it (Swin v2's keys)."""

    def __init__(self, index: Callable[[int], slice]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 12), nn.Linear(12, 2)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        bias = self.body.bias.clone()
        bias[self.index(bias.numel() // 3)].zero_()
        bias[-1:].add_(1.0)
        q, k, v = F.linear(x, self.body.weight, bias).chunk(3, -1)
        return self.head(torch.cat([q, k.relu(), v], -1))


def test_what_is_written_through_a_slice_is_part_of_the_whole() -> None:
    torch.manual_seed(0)
    model = ZeroedBias(lambda n: slice(n, 2 * n)).double()
    masks = {"body": filters(model.body, 1, 5, 9)}
    check_exact(model, torch.rand(2, 3).double(), masks)
    assert model.body.out_features == 9


class Positions(nn.Module):
    """Its tables are longer than the input: a parameter, and numbers that look up another one."""

    def __init__(self, longer: int) -> None:
        super().__init__()
        self.longer = longer
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.table = nn.Parameter(torch.randn(64, 16))
        self.embedding = nn.Embedding(64, 16)
        self.register_buffer("places", torch.arange(64))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        table = self.table[: n + self.longer].unsqueeze(0)[:, :n]
        y = self.first(x) + table + self.embedding(self.places[: n + self.longer][:n])
        return self.second(y.relu())


@pytest.mark.parametrize("longer", [0, 3])
def test_places_that_a_run_does_not_read_stay(longer: int) -> None:
    torch.manual_seed(0)
    model = Positions(longer).double().eval()
    randomise(model)
    columns = torch.ones(64, 16)
    columns[:, [1, 6]] = 0
    masks = {"": {"table": columns}, "embedding": {"weight": columns}}
    masks["first"] = filters(model.first, 1, 6)
    x = torch.rand(2, 12, 8).double()
    graph = ChannelGraph(model, x)
    for table in ("table", "places"):
        labels = graph.axis(graph.trace.leaves[table], 0)
        assert (graph.root[labels] == 0).all()  # no run is needed to find that out
    check_exact(model, x, masks)
    assert model.table.shape == model.embedding.weight.shape == (64, 14)
    assert model.places.shape == (64,)
    assert model(torch.rand(2, 40, 8).double()).shape == (2, 40, 4)
