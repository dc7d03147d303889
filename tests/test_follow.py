"""Sizes that the model's own code compares with an attribute, or hands on."""

from __future__ import annotations

import pytest
import torch
from oracle import MaskDict, check_exact, randomise
from torch import Tensor, nn

from compress import L1FilterPruner

GONE = [1, 4, 6]


def rows(module: nn.Module, gone: list[int]) -> dict[str, Tensor]:
    """The masks of a layer of which some outputs are masked."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in module.named_parameters()}
    for mask in masks.values():
        mask[gone] = False
    return masks


class Checked(nn.Module):
    """A part that refuses another width than its own, before any of its layers runs."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.width, self.how, self.inner = width, how, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "assert":
            assert x.shape[-1] == self.width
        elif x.size(-1) != self.width:
            raise ValueError(f"got {x.size(-1)} features, expected {self.width}")
        return self.inner(x)


@pytest.mark.parametrize("how", ["assert", "raise"])
def test_what_a_module_compares_its_input_with_is_set(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Checked(8, how), nn.ReLU(), Checked(8, how))
    model.append(nn.Linear(8, 3))
    randomise(model)
    masks: MaskDict = {"0": rows(model[0], GONE), "1.inner": rows(model[1].inner, [0, 2])}
    check_exact(model, torch.randn(4, 5), masks)
    assert (model[0].out_features, model[1].width, model[3].width) == (5, 5, 6)


class Modulation(nn.Module):
    """``y.split((c, c, 3))`` with c read off the input, as FocalNet writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(width, 2 * width + 3), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        query, context, gates = self.both(x).split((c, c, 3), -1)
        return x + self.out(query * torch.tanh(context) * gates.sum(-1, keepdim=True))


def test_pieces_of_the_inputs_size_shrink_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Modulation(8), Modulation(8), nn.Linear(8, 3))
    randomise(model)
    masks: MaskDict = {"0": rows(model[0], GONE)}
    for part in ("1", "2"):
        block = model.get_submodule(part)
        masks[f"{part}.both"] = rows(block.both, [0, 2, 3, 8, 10, 11])
        masks[f"{part}.out"] = rows(block.out, GONE)
    check_exact(model, torch.randn(4, 5), masks)
    assert model[1].both.weight.shape == (13, 5)
    assert model[3].in_features == 5


def test_of_unequal_pieces_no_fewer_go_than_of_the_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Modulation(8), nn.Linear(8, 3))
    randomise(model)
    masks: MaskDict = {"0": rows(model[0], GONE), "1.out": rows(model[1].out, GONE)}
    masks["1.both"] = rows(model[1].both, [0, 8, 10])  # two of the products are 0
    check_exact(model, torch.randn(4, 5), masks)
    assert model[1].both.weight.shape == (15, 6)


class Widening(nn.Module):
    """Two attributes say whether a layer is there at all."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width, self.out = width, out
        self.proj, self.inner = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.width != self.out:
            x = self.proj(x).view(b, n, self.out)
        return x + self.inner(x)


def test_attributes_that_choose_a_way_are_set_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Widening(6, 12), nn.Linear(12, 3))
    randomise(model)
    gone = [0, 2, 3, 5, 7, 10]
    masks: MaskDict = {"0": rows(model[0], [1, 2, 4])}
    masks |= {f"1.{name}": rows(model[1].get_submodule(name), gone) for name in ("proj", "inner")}
    check_exact(model, torch.randn(2, 4, 5), masks)
    assert (model[1].width, model[1].out) == (3, 6)  # out became what width was
    assert model[1].proj.weight.shape == (6, 3)


class Windowed(nn.Module):
    """Heads within windows of places; the window may be as large as a head."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, self.width = heads, window, width
        self.head_dim, self.scale = width // heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        windows = n // self.window
        qkv = self.qkv(x).reshape(b, self.window, windows, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5).unbind(0)
        y = ((q * self.scale) @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 3).reshape(b, -1, self.width))


def test_a_number_that_is_like_a_size_stays_where_another_block_is_set() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), Windowed(16, 1, 16), nn.Linear(16, 32))
    model.extend([Windowed(32, 2, 4), Windowed(32, 2, 4), nn.Linear(32, 3)])
    randomise(model)
    x = torch.randn(2, 16, 5)
    config = [{"sparsity": 0.5, "op_names": [n for n, m in model.named_modules() if "." in n]}]
    config[0]["op_names"] += ["0", "2"]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
    masks = {path: dict(each) for path, each in pruner.calc_masks().items()}
    check_exact(model, x, masks, trains=False)
    assert [model[i].window for i in (1, 3, 4)] == [16, 4, 4]
    assert [model[i].head_dim for i in (1, 3, 4)] == [8, 8, 8]
    assert model[5].in_features == 16
