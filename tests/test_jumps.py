"""Results that rounding can flip: a second run takes them from the first where it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import check_exact, masked_copy
from test_speedup import filters, made, pictures
from torch import Tensor, nn

from compress import ModelSpeedup
from compress.graph.jumps import Jumps, Settled, relative_error
from compress.speedup.verify import compute, error_of

NEAR = torch.tensor([0.5, 0.5 + 6e-8, 0.25])  # the largest is a matter of the last bit
FLIPPED = torch.tensor([0.5 + 6e-8, 0.5, 0.25])
JUMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda x: x.argmax(),
    "topk": lambda x: x.topk(2).indices,
    "comparison": lambda x: x > 0.5,
    "floor": lambda x: (x * 2 - 1e-7).floor(),
    "cast": lambda x: (x * 2 - 1e-7).long(),
    "item": lambda x: torch.zeros(1 + (x[0] > 0.5).item()),
    "bool": lambda x: x * 2 if x[0] > 0.5 else x,
    "nms": lambda x: torch.ops.torchvision.nms(torch.tensor([[0.0, 0, 4, 4]]).expand(3, 4), x, 0.5),
}


@pytest.mark.parametrize("name", JUMPS)
def test_a_jump_that_rounding_flips_is_taken_from_the_first_run(name: str) -> None:
    pytest.importorskip("torchvision")
    jump = JUMPS[name]
    first = Jumps()
    with first:
        expected = jump(NEAR)
    own = jump(FLIPPED)
    assert own.shape != expected.shape or not torch.equal(own, expected)
    settled = Settled(first.calls)
    with settled:
        torch.testing.assert_close(jump(FLIPPED), expected)
    assert 0 < settled.error < 1e-6


def test_a_jump_of_something_else_is_the_runs_own() -> None:
    first = Jumps()
    with first:
        NEAR.argmax()
        NEAR.argmin()
        NEAR.topk(2)
    settled = Settled(first.calls)
    with settled:
        assert int(torch.tensor([0.6, 0.5, 0.25]).argmax()) == 0
        assert int((FLIPPED * 2)[:2].argmin()) == 1  # fewer of them
        assert FLIPPED.topk(1).indices.tolist() == [0]  # another number
    assert settled.error == 0


def test_after_another_path_nothing_is_settled() -> None:
    first = Jumps()
    with first:
        NEAR.argmin()
        NEAR.argmax()
    with Settled(first.calls):
        assert int(FLIPPED.argmax()) == 0
        assert int(FLIPPED.argmax()) == 0


def test_sizes_and_dtypes_are_no_jumps() -> None:
    jumps = Jumps()
    with jumps:
        x = torch.rand(2, 3)
        assert x.numel() + x.dim() + len(x) + x.size(0) + x.stride(0) and x.is_floating_point()
        x.sort(1).values.topk(1)
        torch.arange(3).argmax()  # of whole numbers: nothing rounds
    assert [jump.name for jump in jumps.calls] == ["sort", "topk"]


def test_what_is_decided_by_counts_as_error() -> None:
    """The same class, but of scores that are not the same."""
    scores = torch.tensor([1.0, 2.0, 3.0])
    model = Scored(scores)
    expected = compute(model, torch.ones(3))
    model.scores = scores * torch.tensor([1 + 1e-3, 1, 1])
    assert error_of(model, torch.ones(3), expected, None) == 0  # its own choice is the same
    assert error_of(model, torch.ones(3), expected, 1.0) == pytest.approx(1e-3 / 3, rel=0.01)
    model.scores = scores.flip(0)
    assert error_of(model, torch.ones(3), expected, None) == float("inf")


class Scored(nn.Module):
    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scores).argmax()


# -- in a speedup --------------------------------------------------------------------------


class Picky(nn.Module):
    """As many outputs as there are places with a high score: masks and rounding change which."""

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.score, self.head = (
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Linear(8, 2)
        )  # fmt: skip
        self.decide = decide

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        places = self.decide(self.score(y).flatten())
        rows = y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])[places]
        return self.head(rows), places


DECISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda s: s > s.mean(),
    "nonzero": lambda s: (s > s.mean()).nonzero()[:, 0],
    "where": lambda s: torch.where(s > s.median())[0],
    "count": lambda s: s.topk(int((s > 0).sum())).indices,
    "loop": lambda s: torch.tensor([i for i in range(len(s)) if s[i] > s.mean()]),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_size_that_the_data_gives_stops_no_channel(name: str) -> None:
    torch.manual_seed(0)
    model = made(Picky(DECISIONS[name]))
    masks = {"body": filters(model.body, 0, 3, 4)}
    check_exact(model, pictures(), masks, trains=False)
    assert model.body.out_channels == 5
    assert model.head.in_features == 5


def test_a_path_that_the_masks_change_is_the_masked_one() -> None:
    """Unmasked, the sum is positive; masked, it is negative, and another layer runs."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.left(y) if y.sum().item() > 0 else self.right(y)

    torch.manual_seed(0)
    model = made(Forked())
    with torch.no_grad():
        model.body.weight *= 0.01
        model.body.bias.copy_(torch.tensor([9.0, -1.0, -1.0, -1.0]))
    speedup = ModelSpeedup(model, pictures(), {"body": filters(model.body, 0)})
    x = pictures()
    speedup.speedup_model()
    assert model.body.out_channels == 3
    assert model.right.in_channels == 3
    assert bool(model(x).isfinite().all())


@pytest.mark.parametrize("constants", ["fold", "drop"])
def test_an_inexact_cut_may_decide_otherwise(constants: str) -> None:
    torch.manual_seed(0)
    model = made(Picky(DECISIONS["mask"]))
    layers = [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    whole = made(nn.Sequential(*layers, nn.Conv2d(3, 3, 3, padding=1), model))
    with torch.no_grad():
        whole[1].bias.fill_(2.0)
        whole[1].running_mean.zero_()
    speedup = ModelSpeedup(
        whole, pictures(), {"0": filters(whole[0], 1)}, constants=constants
    )  # fmt: skip
    speedup.speedup_model()
    assert whole[0].out_channels == 2
    assert 0 < speedup.report.relative_error < float("inf")


def test_a_number_that_a_masked_parameter_holds_is_the_masked_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x) * self.conv.bias.abs().max().item())

    torch.manual_seed(0)
    model = made(Scaled())
    largest = int(model.conv.bias.abs().argmax())
    check_exact(model, pictures(), {"conv": filters(model.conv, largest)}, trains=False)


class RoundsAside(nn.Module):
    """Keeps the rows of which one sum is larger than the same sum in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score, self.head = nn.Linear(6, 64), nn.Linear(64, 1), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        score = (y * self.score.weight).sum(-1) + self.score.bias
        return self.head(y[self.score(y)[:, 0] > score])


def test_what_rounding_alone_decides_is_no_difference() -> None:
    torch.manual_seed(0)
    model = made(RoundsAside()).float()
    masks = {"body": filters(model.body, *range(0, 64, 3))}
    reference = masked_copy(model, masks)
    x = torch.randn(400, 6)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert model.body.out_features == 42
    assert speedup.report.relative_error < 1e-5
    assert len(model(x)) != len(reference(x))  # else this is no test


def test_noise_in_place_of_zeros_is_no_difference():
    noise = torch.tensor([2e-12, -1e-12], dtype=torch.float64)
    assert relative_error(noise, -noise) == 0.0
    assert relative_error(noise * 1e3, -noise * 1e3) == 2.0
