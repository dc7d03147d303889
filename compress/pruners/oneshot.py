"""The one-shot pruners: a criterion with its NNI name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress import allocate, criteria
from compress.allocate import expand_filters
from compress.errors import closest
from compress.masks import Masks, raw_parameter
from compress.pruners.base import Layer, Pruner, foreign_layers, raise_all
from compress.pruners.patterns import (
    as_matrix,
    from_matrix,
    join_blocks,
    parse_pattern,
    sizes_of,
    split_blocks,
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WITH_FILTERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class LevelPruner(Pruner):
    """Masks single weights, the smallest by magnitude: Han et al. 2015. Biases are left alone.

    Supports convolutions, transposed convolutions, Linear, Bilinear and embeddings. It has no
    ``round_to``, ``min_channels`` or dependency-aware mode, as it masks no channels. Patterns are
    those of the weight's matrix: see `compress.pruners.patterns`.

    Args:
        mode: "normal", "global", or "balanced": in every row of the matrix (or what ``balance``
            says) the same fraction goes.
        block_size: ``(outputs, inputs)``: blocks of neighbours go together, ranked by mean |w|.
        balance: for ``mode="balanced"``: None, a row at a time; ``(rows, columns)`` of regions,
            counted in blocks; or "n:m", as in "2:4": of every m neighbouring inputs n stay (Zhou et
            al. 2021, N:M structured sparsity), for which the sparsity has to be 1 - n/m.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = (
        *_WITH_FILTERS,
        nn.Bilinear,
        nn.Embedding,
        nn.EmbeddingBag,
    )
    granularity: ClassVar[str] = "single weights"
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
        pattern, problems = parse_pattern(block_size, balance, mode == "balanced")
        raise_all(type(self).__name__, problems)
        self.pattern = pattern
        super().__init__(model, config_list, mode=mode)
        raise_all(type(self).__name__, self._pattern_problems())

    def score(self, layer: Layer) -> Tensor:
        if not self._patterned:  # the order of the entries decides about ties
            return criteria.magnitude(layer.weight)
        matrix = as_matrix(layer.weight, *inputs_first(layer.module))
        scores = criteria.magnitude(matrix).reshape(matrix.shape)
        return self.pattern.units(scores).flatten()

    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        if not self._patterned:
            return {"weight": keep.reshape(layer.weight.shape)}
        rows = sizes_of(layer.weight, *inputs_first(layer.module))[0] // self.pattern.block[0]
        matrix = self.pattern.entries(keep.reshape(rows, -1))
        return {"weight": from_matrix(matrix, layer.weight, *inputs_first(layer.module))}

    @property
    def _patterned(self) -> bool:
        return self.mode == "balanced" or self.pattern.block != (1, 1)

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        if self.mode != "balanced":
            return super()._allocate(layers, scores)
        shapes, regions, split, pruned = {}, {}, {}, {}
        for target in self.targets:
            name, layer = target.name, layers[target.name]
            rows = sizes_of(layer.weight, *inputs_first(layer.module))[0] // self.pattern.block[0]
            shapes[name] = rows, len(scores[name]) // rows
            regions[name] = self.pattern.region or (1, shapes[name][1])
            split[name] = split_blocks(scores[name].reshape(shapes[name]), *regions[name])
            units = split[name].shape[1]
            assert target.sparsity is not None, "mode 'balanced' has no total_sparsity"
            kept = self.pattern.kept
            pruned[name] = (
                allocate.prune_count(units, target.sparsity) if kept is None else (units - kept)
            )
        keep = allocate.balanced(split, pruned)
        joined = {name: join_blocks(keep[name], shapes[name], *regions[name]) for name in keep}
        return {name: matrix.flatten() for name, matrix in joined.items()}, Masks()

    def _pattern_problems(self) -> list[str]:
        problems = []
        wanted = self.pattern.sparsity
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            weight = raw_parameter(module, "weight")
            assert weight is not None, f"{target.name} was checked by resolve"
            problem = self.pattern.problem(*sizes_of(weight, *inputs_first(module)))
            if self._patterned and problem:
                problems.append(f"{target.name!r}: {problem}; exclude it, or choose other sizes")
            if wanted is not None and abs((target.sparsity or 0) - wanted) > 1e-6:
                problems.append(
                    f"{target.name!r}: got sparsity {target.sparsity}; balance masks {wanted:g}"
                )
        return problems


class FilterPruner(Pruner):
    """Masks whole filters: the weights that make an output channel, and its bias.

    Supports convolutions and transposed convolutions, grouped ones too, Linear, transformers'
    Conv1D, and, where an entry names it, Embedding (its features, which with
    ``mode="dependency_aware"`` is how the width of a language model's residual stream shrinks). A
    subclass is a criterion.

    Args:
        block_size: so many neighbouring filters are one unit, scored by their mean.
        heads: attention heads as units. In the modes that run the model ``"auto"``: heads as the
            run shows them, whole in all their layers. In the others ``{layer: number}``: the
            layer's filters are so many heads, one behind the other (for a fused qkv layer 3 times
            as many); where a head's values are masked, a speedup takes its queries and keys along.
        **options: as `Pruner`.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = _WITH_FILTERS
    optional_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    granularity: ClassVar[str] = "whole filters"

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
        self._blocks, problems = self._block_sizes(block_size, heads)
        self._whole_heads = heads == "auto"
        raise_all(type(self).__name__, problems)

    @abstractmethod
    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        """``(output channels,)``, the score of each filter: see `compress.criteria`."""

    def unit_axis(self, module: nn.Module) -> int:
        return filter_axis(module)[0]

    def score(self, layer: Layer) -> Tensor:
        return self.criterion(layer.weight, *filter_axis(layer.module))

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        if self.runs_the_model:
            return super()._allocate(layers, scores)
        blocks = {name: self._blocks.get(name, 1) for name in scores}
        means = {
            name: values.reshape(-1, blocks[name]).mean(1) if blocks[name] > 1 else values
            for name, values in scores.items()
        }
        keep, extra = super()._allocate(layers, means)
        return {name: one.repeat_interleave(blocks[name]) for name, one in keep.items()}, extra

    def _block_sizes(
        self, block_size: int, heads: str | Mapping[str, int] | None
    ) -> tuple[dict[str, int], list[str]]:
        """Filters per unit of each target, where they are several, and what is wrong."""
        names = [target.name for target in self.targets]
        problems = self._argument_problems(block_size, heads, names)
        if problems:
            return {}, problems
        given = heads if isinstance(heads, Mapping) else {}
        blocks: dict[str, int] = {}
        for name in names:
            module = self.model.get_submodule(name)
            axis, groups = filter_axis(module)
            weight = raw_parameter(module, "weight")
            assert weight is not None, f"{name} was checked by resolve"
            filters = weight.shape[axis] * (groups if axis == 1 else 1)
            if name in given and filters % given[name]:
                problems.append(
                    f"heads[{name!r}]: got {given[name]}; expected a divisor of {filters}, its "
                    "number of filters"
                )
            elif name not in given and filters % block_size:
                problems.append(
                    f"{name!r}: its {filters} filters are no multiple of block_size={block_size}; "
                    "exclude it, or choose another size"
                )
            size = filters // given[name] if name in given else block_size
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

    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        masks = {"weight": expand_filters(keep, layer.weight, *filter_axis(layer.module))}
        if raw_parameter(layer.module, "bias") is not None:
            masks["bias"] = keep
        return masks


class L1FilterPruner(FilterPruner):
    """Masks the filters with the smallest Σ|w|: Li et al. 2017."""

    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        return criteria.l1(weight, axis, groups)


class L2FilterPruner(FilterPruner):
    """Masks the filters with the smallest √Σw²."""

    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        return criteria.l2(weight, axis, groups)


class FPGMPruner(FilterPruner):
    """Masks the filters nearest to all others, Σⱼ‖wᵢ − wⱼ‖₂: He et al. 2019."""

    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        return criteria.fpgm(weight, axis, groups)


class RandomFilterPruner(FilterPruner):
    """Masks random filters: the baseline of every comparison.

    Args:
        seed: of the pruner's own generator; the same seed gives the same masks every time, and the
            global random state is not touched.
        **options: as `Pruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, config_list, **options)
        self.seed = seed
        self._generator = torch.Generator()

    def calc_masks(self) -> Masks:
        self._generator.manual_seed(self.seed)
        return super().calc_masks()

    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        return criteria.random(weight, axis, groups, generator=self._generator)


def filter_axis(module: nn.Module) -> tuple[int, int]:
    """``(axis, groups)`` of the output channels in a module's weight: see `compress.criteria`."""
    if isinstance(module, _TRANSPOSED):
        return 1, module.groups
    return (1, 1) if isinstance(module, (nn.Embedding, *foreign_layers())) else (0, 1)


def inputs_first(module: nn.Module) -> tuple[bool, int]:
    """``(inputs first, groups)``: whether a weight has its inputs along axis 0."""
    if isinstance(module, _TRANSPOSED):
        return True, module.groups
    return isinstance(module, foreign_layers()), 1
