"""Patterns of masked weights: blocks, rows and regions that lose equally many, and N:M.

They are patterns of the *matrix* of a weight: one row for each output, and along a row the inputs
of the first kernel position, those of the second, and so on. So a run of neighbours along a row is
a run of neighbouring inputs, as the kernels for sparse matrices want it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.pruners.base import foreign_layers


def inputs_first(module: nn.Module) -> tuple[bool, int]:
    """``(inputs first, groups)``: whether a layer's weight has its inputs along axis 0."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return True, module.groups
    return isinstance(module, foreign_layers()), 1


def as_matrix(weight: Tensor, inputs_first: bool = False, groups: int = 1) -> Tensor:
    """``(outputs, kernel positions · inputs)`` of a weight.

    Args:
        weight: ``(out, in/groups, k...)``, or with ``inputs_first`` ``(in, out/groups, k...)``.
        groups: matters with ``inputs_first`` only, as in `compress.criteria`.
    """
    if inputs_first:
        weight = weight.reshape(groups, -1, weight.shape[1], *weight.shape[2:])
        weight = weight.transpose(1, 2).flatten(0, 1)
    if weight.dim() == 2:
        return weight
    return weight.flatten(2).transpose(1, 2).flatten(1)


def from_matrix(
    matrix: Tensor, like: Tensor, inputs_first: bool = False, groups: int = 1
) -> Tensor:
    """What `as_matrix` made a matrix of, in the shape of the weight ``like``."""
    kernel = like[0, 0].numel()
    rows = matrix.reshape(len(matrix), kernel, -1).transpose(1, 2)  # (outputs, inputs, kernel)
    if inputs_first:
        rows = rows.reshape(groups, -1, *rows.shape[1:]).transpose(1, 2)
    return rows.reshape(like.shape).contiguous()


def split_blocks(matrix: Tensor, height: int, width: int) -> Tensor:
    """``(blocks, height · width)``: the blocks of a matrix, row by row, with their entries."""
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)
    return blocks.reshape(-1, height * width)


def join_blocks(blocks: Tensor, rows: int, height: int, width: int) -> Tensor:
    """The matrix of so many rows that `split_blocks` split."""
    return blocks.reshape(rows // height, -1, height, width).transpose(1, 2).reshape(rows, -1)


@dataclass(frozen=True)
class Pattern:
    """Which entries of a weight's matrix go together, and where equally many go.

    Attributes:
        block: ``(outputs, inputs)`` of a unit.
        region: ``(rows, columns)`` of units that lose equally many; None: a whole row.
        kept: units that stay in each region, for N:M; None: what the sparsity says.
    """

    block: tuple[int, int] = (1, 1)
    region: tuple[int, int] | None = None
    kept: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The only sparsity that an N:M pattern has."""
        if self.kept is None or self.region is None:
            return None
        return 1 - self.kept / self.region[1]

    def units(self, matrix: Tensor) -> Tensor:
        """``(rows, columns)`` of units: the mean of the entries of each."""
        height, width = self.block
        if self.block == (1, 1):
            return matrix
        means = split_blocks(matrix, height, width).mean(dim=1)
        return means.reshape(matrix.shape[0] // height, matrix.shape[1] // width)

    def entries(self, units: Tensor) -> Tensor:
        """Every unit's value in all of its entries."""
        return units.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)

    def problem(self, outputs: int, inputs: int) -> str:
        """Why a layer of this size cannot have the pattern; empty if it can."""
        tall, wide = self.block
        for what, size, block in (("outputs", outputs, tall), ("inputs", inputs, wide)):
            if size % block:
                return f"its {size} {what} are no multiple of {block}, of block_size={self.block}"
        if self.region is not None:
            sizes = ("outputs", outputs, tall * self.region[0]), (
                "inputs", inputs, wide * self.region[1],
            )  # fmt: skip
            for what, size, region in sizes:
                if size % region:
                    return f"its {size} {what} are no multiple of {region}, which balance asks for"
        return ""


def parse_pattern(block_size: Any, balance: Any, balanced: bool) -> tuple[Pattern, list[str]]:
    """The pattern that the arguments of a `LevelPruner` mean, and what is wrong with them."""
    problems = []
    if not _is_pair(block_size):
        problems.append(
            f"block_size: got {block_size!r}; expected (outputs, inputs), two whole numbers ≥ 1, "
            "such as (4, 4)"
        )
        block_size = (1, 1)
    if balance is not None and not balanced:
        problems.append(f"balance: got {balance!r}; it is an option of mode='balanced'")
    region, kept = None, None
    ratio = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", balance) if isinstance(balance, str) else None
    if ratio is not None and int(ratio[1]) < int(ratio[2]):
        kept, region = int(ratio[1]), (1, int(ratio[2]))
    elif _is_pair(balance):
        region = tuple(balance)
    elif balance is not None:
        problems.append(
            f"balance: got {balance!r}; expected 'n:m' with n < m, such as '2:4', or (rows, "
            "columns) of the regions that lose equally many, or None: each row"
        )
    return Pattern(tuple(block_size), region, kept), problems


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(type(size) is int and size >= 1 for size in value)
    )


def sizes_of(weight: Tensor, inputs_first: bool = False, groups: int = 1) -> tuple[int, int]:
    """``(outputs, inputs)`` of a weight, the inputs those of one kernel position."""
    if inputs_first:
        return weight.shape[1] * groups, weight.shape[0] // groups
    return weight.shape[0], weight.shape[1]
