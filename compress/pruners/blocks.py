"""Units of several filters (blocks of neighbours, attention heads), and patterns of single weights.

What a pruner of filters or of weights is besides its score: scores come in one for each filter or
weight, are pooled to units, and what stays of the units is given back filter by filter, or weight
by weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from compress import allocate
from compress.config import Target
from compress.errors import closest
from compress.masks import Masks
from compress.pruners.base import Layer, Pruner, raise_all
from compress.pruners.patterns import (
    as_matrix,
    from_matrix,
    inputs_first,
    join_blocks,
    parse_pattern,
    sizes_of,
    split_blocks,
)


class PatternPruner(Pruner):
    """Masks single weights, in patterns of the weight's matrix: see `compress.pruners.patterns`.

    Args:
        model: as in `Pruner`, and so is ``config_list``.
        mode: "normal", "global", or "balanced": in every row of the matrix (or what ``balance``
            says) the same fraction goes.
        block_size: ``(outputs, inputs)``: blocks of neighbours go together, ranked by their mean.
        balance: for ``mode="balanced"``: None, a row at a time; ``(rows, columns)`` of regions,
            counted in blocks; or "n:m", as in "2:4": of every m neighbouring inputs n stay (Zhou et
            al. 2021, N:M structured sparsity), for which the sparsity has to be 1 - n/m.
    """

    modes: ClassVar[tuple[str, ...]] = ("normal", "global", "balanced")

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        mode: str = "normal",
        block_size: tuple[int, int] = (1, 1),
        balance: str | tuple[int, int] | None = None,
    ) -> None:
        self.pattern, problems = parse_pattern(block_size, balance, mode == "balanced")
        raise_all(type(self).__name__, problems)
        super().__init__(model, config_list, mode=mode)
        raise_all(type(self).__name__, self._pattern_problems())

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        if not self._patterned:  # the order of the weights decides about ties
            return super()._allocate(layers, scores)
        matrices = {
            name: self.pattern.units(
                as_matrix(values.reshape(layers[name].weight.shape), *inputs_of(layers[name]))
            )
            for name, values in scores.items()
        }
        if self.mode == "balanced":
            keep, extra = self._balance(matrices), Masks()
        else:
            flat = {name: matrix.flatten() for name, matrix in matrices.items()}
            keep, extra = super()._allocate(layers, flat)
        for name, units in keep.items():
            entries = self.pattern.entries(units.reshape(matrices[name].shape))
            weight = layers[name].weight
            keep[name] = from_matrix(entries, weight, *inputs_of(layers[name])).flatten()
        return keep, extra

    def _balance(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep matrices of units ``(rows, columns)`` in which all regions lose equally many."""
        split, pruned, sizes = {}, {}, {}
        for target in self.targets:
            matrix = matrices[target.name]
            size = self.pattern.region or (1, matrix.shape[1])
            units = size[0] * size[1]
            sizes[target.name] = size
            split[target.name] = split_blocks(matrix, *size)
            pruned[target.name] = self._pruned_of(units, target)
        keep = allocate.balanced(split, pruned)
        return {
            name: join_blocks(blocks, matrices[name].shape[0], *sizes[name])
            for name, blocks in keep.items()
        }

    def _pruned_of(self, units: int, target: Target) -> int:
        if self.pattern.kept is not None:  # 1 - n/m may have no exact number
            return units - self.pattern.kept
        assert target.sparsity is not None, "mode 'balanced' has no total_sparsity"
        return allocate.prune_count(units, target.sparsity)

    @property
    def _patterned(self) -> bool:
        return self.mode == "balanced" or self.pattern.block != (1, 1)

    def _pattern_problems(self) -> list[str]:
        problems = []
        wanted = self.pattern.sparsity
        for target in self.targets if self._patterned else ():
            layer = self.layer(self.model, target)
            problem = self.pattern.problem(*sizes_of(layer.weight, *inputs_of(layer)))
            if problem:
                problems.append(f"{target.name!r}: {problem}; exclude it, or choose other sizes")
            if wanted is not None and abs((target.sparsity or 0) - wanted) > 1e-6:
                problems.append(
                    f"{target.name!r}: got sparsity {target.sparsity}; balance masks {wanted:g}"
                )
        return problems


class BlockPruner(Pruner):
    """Masks filters, one by one or several as a unit.

    Args:
        model: as in `Pruner`, and so is ``config_list``.
        block_size: so many neighbouring filters are one unit, scored by their mean.
        heads: attention heads as units. In the modes that run the model ``"auto"``: heads as the
            run shows them, whole in all their layers. In the others ``{layer: number}``: the
            layer's filters are so many heads, one behind the other (for a fused qkv layer 3 times
            as many); where a head's values are masked, a speedup takes its queries and keys along.
        **options: as `Pruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        block_size: int = 1,
        heads: str | Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, config_list, **options)
        names = [target.name for target in self.targets]
        problems = self._argument_problems(block_size, heads, names)
        if not problems:
            given = heads if isinstance(heads, Mapping) else {}
            self._blocks, problems = self._block_sizes(block_size, given)
        self._whole_heads = heads == "auto"
        raise_all(type(self).__name__, problems)

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        if self.runs_the_model or not self._blocks:
            return super()._allocate(layers, scores)
        sizes = {name: self._blocks.get(name, 1) for name in scores}
        means = {
            name: values.reshape(-1, sizes[name]).mean(1) if sizes[name] > 1 else values
            for name, values in scores.items()
        }
        keep, extra = super()._allocate(layers, means)
        return {name: units.repeat_interleave(sizes[name]) for name, units in keep.items()}, extra

    def _block_sizes(
        self, block_size: int, heads: Mapping[str, int]
    ) -> tuple[dict[str, int], list[str]]:
        """Filters per unit of each layer, where they are several, and what is wrong."""
        problems = []
        blocks: dict[str, int] = {}
        for target in self.targets:
            name, layer = target.name, self.layer(self.model, target)
            # Where groups share an axis of the weight (transposed convolutions) there are more.
            axis = self.unit_axis(layer.module)
            filters: int = getattr(layer.module, "out_channels", layer.weight.shape[axis])
            if name in heads and filters % heads[name]:
                problems.append(
                    f"heads[{name!r}]: got {heads[name]}; expected a divisor of {filters}, its "
                    "number of filters"
                )
            elif name not in heads and filters % block_size:
                problems.append(
                    f"{name!r}: its {filters} filters are no multiple of block_size={block_size}; "
                    "exclude it, or choose another size"
                )
            size = filters // heads[name] if name in heads else block_size
            blocks |= {name: size} if size > 1 else {}
        return blocks, problems

    def _argument_problems(
        self, block_size: object, heads: object, names: Sequence[str]
    ) -> list[str]:
        problems = []
        if type(block_size) is not int or block_size < 1:
            problems.append(f"block_size: got {block_size!r}; expected a whole number ≥ 1")
        if isinstance(heads, Mapping) and self.runs_the_model:
            problems.append(
                f"heads: got numbers of heads, and mode {self.mode!r} finds them by itself; pass "
                "heads='auto'"
            )
        elif isinstance(heads, Mapping):
            for name, number in heads.items():
                if name not in names:
                    hint = closest(str(name), names)
                    problems.append(f"heads: got {name!r}, no layer of the config_list{hint}")
                elif type(number) is not int or number < 1:
                    problems.append(f"heads[{name!r}]: got {number!r}; expected a whole number ≥ 1")
        elif heads not in (None, "auto"):
            problems.append(f"heads: got {heads!r}; expected 'auto' or {{layer: number of heads}}")
        elif heads == "auto" and not self.runs_the_model:
            problems.append(
                "heads='auto' finds the heads by running the model; pass mode='dependency_aware' "
                "and a dummy_input, or {layer: number of heads}"
            )
        return problems


def inputs_of(layer: Layer) -> tuple[bool, int]:
    return inputs_first(layer.module)
