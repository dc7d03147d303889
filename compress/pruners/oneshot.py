"""The one-shot pruners: a criterion with its NNI name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress import criteria
from compress.allocate import expand_filters
from compress.masks import raw_parameter
from compress.pruners.base import Layer, foreign_layers
from compress.pruners.blocks import BlockPruner, PatternPruner
from compress.pruners.parts import COMPOUND, Part, row_parts, weight_parts

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WITH_FILTERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class WeightPruner(PatternPruner):
    """Masks single weights; biases are left alone. A subclass is a score.

    Supports convolutions, transposed convolutions, Linear, Bilinear, embeddings, and, where an
    entry names them, each weight of recurrent modules and of MultiheadAttention. It has no
    ``round_to``, ``min_channels`` or dependency-aware mode, as it masks no channels. Patterns
    (rows, blocks, N:M) are those of `PatternPruner`.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = (
        *_WITH_FILTERS,
        nn.Bilinear,
        nn.Embedding,
        nn.EmbeddingBag,
    )
    optional_types: ClassVar[tuple[type[nn.Module], ...]] = COMPOUND
    granularity: ClassVar[str] = "single weights"

    @classmethod
    def parts(cls, module: nn.Module) -> Sequence[Part]:
        return weight_parts(module)

    @classmethod
    def by_unit(cls, layer: Layer, values: Tensor) -> Tensor:
        return values.reshape(-1, 1)

    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        (name,) = layer.part.weights
        return {name: keep.reshape(layer.weight.shape)}


class LevelPruner(WeightPruner):
    """Masks single weights, the smallest by magnitude: Han et al. 2015."""

    def score(self, layer: Layer) -> Tensor:
        return criteria.magnitude(layer.weight)


class LAMPPruner(WeightPruner):
    """Masks single weights, the smallest beside those of their layer that are larger.

    The score w² / Σ v², over the v of the layer that are not smaller, makes magnitudes of different
    layers comparable: Lee et al. 2021, section 2. So it is for one ranking under a
    ``total_sparsity``; in a layer by itself it ranks as `LevelPruner` does.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        mode: str = "global",
        **options: Any,
    ) -> None:
        super().__init__(model, config_list, mode=mode, **options)

    def score(self, layer: Layer) -> Tensor:
        return criteria.lamp(layer.weight)


class ChannelPruner(BlockPruner):
    """Masks whole filters: the weights that make an output channel, and its bias.

    Supports convolutions and transposed convolutions, grouped ones too, Linear, transformers'
    Conv1D. Where an entry names them, other units go just so: the features of an Embedding (with
    ``mode="dependency_aware"`` this is how the width of a language model's residual stream
    shrinks), the hidden units of LSTM, GRU, RNN and their cells with the rows of all gates, the
    heads of MultiheadAttention with their queries, keys and values (`compress.pruners.parts`).
    Blocks and heads are those of `BlockPruner`. A subclass is a score.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = _WITH_FILTERS
    optional_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, *COMPOUND)
    granularity: ClassVar[str] = "whole filters"

    @classmethod
    def parts(cls, module: nn.Module) -> Sequence[Part]:
        return row_parts(module)

    @classmethod
    def unit_axis(cls, module: nn.Module) -> int:
        return filter_axis(module)[0]

    @classmethod
    def by_unit(cls, layer: Layer, values: Tensor) -> Tensor:
        return criteria.filters(values, *filter_axis(layer.module))

    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        if layer.part.units is not None:
            return layer.part.masks(layer.module, keep)
        masks = {"weight": expand_filters(keep, layer.weight, *filter_axis(layer.module))}
        if raw_parameter(layer.module, "bias") is not None:
            masks["bias"] = keep
        return masks


class FilterPruner(ChannelPruner):
    """Masks whole filters by their weights alone; a subclass is a criterion."""

    @abstractmethod
    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        """``(output channels,)``, the score of each filter: see `compress.criteria`."""

    def score(self, layer: Layer) -> Tensor:
        return self.criterion(layer.weight, *filter_axis(layer.module))


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

    def _prepare(self) -> None:
        self._generator.manual_seed(self.seed)

    def criterion(self, weight: Tensor, axis: int, groups: int) -> Tensor:
        return criteria.random(weight, axis, groups, generator=self._generator)


def filter_axis(module: nn.Module) -> tuple[int, int]:
    """``(axis, groups)`` of the output channels in a module's weight: see `compress.criteria`."""
    if isinstance(module, _TRANSPOSED):
        return 1, module.groups
    return (1, 1) if isinstance(module, (nn.Embedding, *foreign_layers())) else (0, 1)
