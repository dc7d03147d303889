"""What all pruners do: config_list → scores → masks → a model that computes with them."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from compress import allocate
from compress.config import Target, Targets, resolve
from compress.config_entry import Entry
from compress.errors import CompressError, ConfigError
from compress.masks import Masks, applied_masks, raw_parameter, suspend_masks
from compress.pruners.export import MaskedModel
from compress.pruners.parts import ITS_WEIGHT, Part, part_of

if TYPE_CHECKING:
    from compress.graph.channels import ChannelGraph
    from compress.pruners.dependency import Coupling

MOST_TRIALS = 3  # choices of what goes, each of which is tried on the model
MODES = ("normal", "global", "dependency_aware", "isomorphic")


@dataclass(frozen=True)
class Layer:
    """A layer to be scored.

    Attributes:
        name: module path; of a module of several weights, that of the layer's first weight.
        module: the user's module.
        weight: its weight, detached; 0 where a mask from before the pruner is. Of hidden units and
            heads their rows, ``(units, entries)``: `Part.gathered`.
        mask: that mask, of the weight's shape; None where there is none.
        part: what of the module it is.
    """

    name: str
    module: nn.Module
    weight: Tensor
    mask: Tensor | None = None
    part: Part = ITS_WEIGHT


@dataclass(frozen=True)
class ScoredAtoms:
    """What can go of a model and what it is worth, and the masks without it.

    Attributes:
        coupling: the atoms, their scores, and `Coupling.choose`.
        masks: the masks for a ``gone`` of the coupling, with those that the model had before.
        again: the same scores, on what the coupling's graph has learned since.
    """

    coupling: Coupling
    masks: Callable[[np.ndarray], Masks]
    again: Callable[[], ScoredAtoms]


def foreign_layers() -> tuple[type[nn.Module], ...]:
    """Layers of libraries that are in use: transformers' Conv1D, a Linear with weight (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return () if library is None else (library.Conv1D,)


class Pruner(MaskedModel, ABC):
    """Scores the units of the selected layers and masks the lowest.

    A subclass says what it supports, how it scores a layer, and which parameters a unit is.
    Everything is checked when the pruner is made; only `compress` and `unwrap_model` touch the
    model.

    Args:
        model: the model to prune; masked in place.
        config_list: which layers, and how much of them: see `compress.config`.
        mode: "normal" takes every layer by itself; "global" is one ranking over all the layers of a
            ``total_sparsity`` entry; "dependency_aware" scores and masks the layers together that
            can only shrink together, found by running the model on ``dummy_input``, and masks what
            goes in a cut on trial, which is undone; "isomorphic" does so, too, with one ranking
            under a ``total_sparsity`` for each kind of structure, so that scores of different kinds
            (attention, MLP, residual stream) are not compared. Those of one kind are, as they are;
            ``max_sparsity_per_layer`` bounds what a layer may lose.
        dependency_aware: NNI v1's way to say ``mode="dependency_aware"``.
        dummy_input: an input of the model, for the last two: a tensor, tuple, or dict of arguments.
        round_to: the number of kept units is rounded up to a multiple of this.
        min_channels: units that every layer keeps (all of them, if it has fewer).

    Raises:
        ConfigError: lists what is wrong with the config_list or the other arguments.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]]
    optional_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    granularity: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES
    _blocks: Mapping[str, int] = MappingProxyType({})  # filters that go together, where several do
    _whole_heads = False

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        mode: str = "normal",
        dependency_aware: bool = False,
        dummy_input: Any = None,
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
        if isinstance(model, torch.jit.ScriptModule):
            raise ConfigError(f"model: got a {type(model).__name__}; pass it before it is scripted")
        if dependency_aware:
            if mode not in ("normal", "dependency_aware"):
                raise ConfigError(f"got mode={mode!r} and dependency_aware=True; choose one")
            mode = "dependency_aware"
        self.model = model
        self.mode = mode
        self.dummy_input = dummy_input
        self.round_to = round_to
        self.min_channels = min_channels
        self._check_arguments()
        self.targets = self.resolve(model, config_list)
        self._check_mode()
        self._masks: Masks | None = None
        self._before = Masks()

    @classmethod
    def resolve(
        cls,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        entry_type: type[Entry] = Entry,
    ) -> Targets:
        """What a config_list asks of this pruner: see `compress.config`."""
        return resolve(
            model,
            config_list,
            cls._layer_types(),
            optional_types=cls.optional_types,
            unit_axis=cls.unit_axis,
            weights=lambda module: [part.weights for part in cls.parts(module)],
            pruner=cls.__name__,
            granularity=cls.granularity,
            entry_type=entry_type,
        )

    @classmethod
    def _layer_types(cls) -> tuple[type[nn.Module], ...]:
        """What ``op_types: ["default"]`` means now."""
        return cls.supported_types + foreign_layers()

    @classmethod
    def unit_axis(cls, module: nn.Module) -> int:
        """The axis of a layer's weight that its units lie along."""
        return 0

    @classmethod
    def parts(cls, module: nn.Module) -> Sequence[Part]:
        """The layers that a module has."""
        return (ITS_WEIGHT,)

    @classmethod
    def part(cls, model: nn.Module, target: Target) -> Part:
        """What of its module a target is."""
        return part_of(cls.parts(model.get_submodule(target.modules[0])), target.name)

    @classmethod
    def layer(cls, model: nn.Module, target: Target) -> Layer:
        """A target as its parameters are stored, whatever masks are on it.

        Raises:
            CompressError: one of them is no plain parameter.
        """
        module, part = model.get_submodule(target.modules[0]), cls.part(model, target)
        weights = [raw_parameter(module, name) for name in part.weights]
        found = [weight.detach() for weight in weights if weight is not None]
        if len(found) < len(weights):
            raise CompressError(
                f"{target.name!r}: its weight was there when {cls.__name__} was made and is no "
                "plain parameter now; make a new pruner for the changed model"
            )
        return Layer(target.name, module, part.gathered(found), None, part)

    @classmethod
    def by_unit(cls, layer: Layer, values: Tensor) -> Tensor:
        """``(units, entries)`` of a tensor of the shape of the layer's weight."""
        return values.reshape(len(values), -1)

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """``(units,)``, one score per unit; the lowest are masked first."""

    @abstractmethod
    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        """The masks of a layer, by parameter, where the units ``keep``, bool ``(units,)``, stay."""

    @property
    def masks(self) -> Masks:
        """A copy of the masks of the last `compress`; before it, of those that the model came with.

        At any moment: under a schedule, those of now.
        """
        return Masks(applied_masks(self.model) if self._masks is None else self._masks)

    @property
    def runs_the_model(self) -> bool:
        """Whether the mode asks the channel graph what goes together."""
        return self.mode in ("dependency_aware", "isomorphic")

    def calc_masks(self) -> Masks:
        """The masks for the model's present weights; nothing is touched.

        Scores are of the raw weights, without what an earlier `compress` of this pruner masked, so
        that the same weights give the same masks. Masks that the model had before it stay: what
        they mask counts as 0 in the scores, and is masked in the result. Units that are masked
        whole already are the first to go, whatever their scores, so that they count towards the
        sparsity.

        Raises:
            ConfigError: a ``total_sparsity`` cannot be reached.
            MaskError: a layer has NaN or infinite scores.
        """
        self._prepare()
        before = self._masks_before()
        layers, scores = self._scored(before)
        keep, extra = self._allocate(layers, scores)
        return self._masks_of(layers, keep, extra, before)

    def scored_atoms(self) -> ScoredAtoms:
        """The scores of now, kept: the masks of other sparsities follow without new ones.

        Only in the modes that run the model.

        Raises:
            ConfigError: the mode is none of these.
            MaskError: a layer has NaN or infinite scores.
        """
        if not self.runs_the_model:
            raise ConfigError(
                f"scored_atoms: mode {self.mode!r} does not see what goes together; make the "
                "pruner with mode='dependency_aware' and a dummy_input"
            )
        self._prepare()
        before = self._masks_before()
        layers, scores = self._scored(before)

        def atoms(graph: ChannelGraph | None = None) -> ScoredAtoms:
            coupling = self._coupling(scores, graph)
            return ScoredAtoms(
                coupling,
                lambda gone: self._masks_of(
                    layers, coupling.keep(gone), coupling.following(gone), before
                ),
                lambda: atoms(coupling.graph),
            )

        return atoms()

    def compress(self) -> tuple[nn.Module, Masks]:
        """Mask the model, in place.

        Called again, it takes its own masks off and computes new ones from the present weights.

        Returns:
            The model that was given, and a copy of the masks that it computes with now.

        Raises:
            ConfigError, MaskError: as `calc_masks`; the model is as it was.
        """
        return self.put(self.calc_masks())

    def put(self, masks: Masks) -> tuple[nn.Module, Masks]:
        """Mask the model, in place, in the place of this pruner's last masks.

        Args:
            masks: with those that the model had before.

        Returns:
            As `compress`.
        """
        before = self._masks_before()
        applied = applied_masks(self.model)
        if applied and masks & applied == masks:  # they only grow: what is on the model is changed
            masks.apply(self.model)
        else:
            suspended = suspend_masks(self.model)
            try:
                masks.apply(self.model)
            except BaseException:
                suspended.restore()
                raise
        self._before, self._masks = before, masks
        return self.model, self.masks

    def _prepare(self) -> None:
        """What scoring needs first: measuring, say; the model is as before."""

    def _scored(self, before: Masks) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        layers = self._layers(before)
        scores = {name: self.score(layer) for name, layer in layers.items()}
        return layers, self._masked_first(layers, scores)

    def _masks_of(
        self, layers: Mapping[str, Layer], keep: Mapping[str, Tensor], extra: Masks, before: Masks
    ) -> Masks:
        """The masks where these units of the layers stay."""
        entries: dict[str, dict[str, Tensor]] = {}
        modules = dict(self.model.named_modules())
        for target in self.targets:
            layer = layers[target.name]
            for name, path in zip((target.name, *target.tied), target.modules, strict=True):
                part = part_of(self.parts(modules[path]), name)
                one = Layer(name, modules[path], layer.weight, None, part)
                entries.setdefault(path, {}).update(self.expand(one, keep[target.name]))
        masks = Masks(entries)
        masks &= extra
        masks &= before
        return masks

    def _check_arguments(self) -> None:
        problems = []
        if self.mode not in self.modes:
            problems.append(
                f"mode: got {self.mode!r}; {type(self).__name__} has {', '.join(self.modes)}"
            )
        elif self.runs_the_model and self.dummy_input is None:
            problems.append(
                f"dummy_input: got None; mode {self.mode!r} runs the model to see which layers "
                "depend on each other: pass an input of it, such as torch.rand(1, 3, 224, 224)"
            )
        for name in ("round_to", "min_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name}: got {value!r}; expected a whole number ≥ 1")
        raise_all(type(self).__name__, problems)

    def _check_mode(self) -> None:
        """Whether the mode is about what the config_list has."""
        problems = []
        if self.mode in ("normal", "balanced"):
            problems = [
                f"config_list[{group.entry}]: total_sparsity is one ranking over several layers, "
                f"and mode={self.mode!r} takes every layer by itself; pass mode='global', or give "
                "sparsity_per_layer"
                for group in self.targets.groups
            ]
        elif self.mode in ("global", "isomorphic") and not self.targets.groups:
            problems = [
                f"mode={self.mode!r} is one ranking under a total_sparsity, and no entry of the "
                "config_list that selects a layer has one; give total_sparsity, or another mode, "
                f"such as mode={self.modes[0]!r}"
            ]
        raise_all(type(self).__name__, problems)

    def _masks_before(self) -> Masks:
        """The masks on the model that are not this pruner's."""
        applied = applied_masks(self.model)
        return self._before if applied == self._masks else applied

    def _layers(self, before: Masks) -> dict[str, Layer]:
        masks = {
            id(raw_parameter(module, name)): mask
            for path, parameters in before.items()
            for module in (self.model.get_submodule(path),)
            for name, mask in parameters.items()
        }
        return {one.name: _masked(self.layer(self.model, one), masks) for one in self.targets}

    def _masked_first(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The scores, with those of units that are masked whole below all others.

        Hardly below, as the coupled modes divide by a layer's mean.
        """
        found = dict(scores)
        masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
        # Over all layers, since one ranking may be of all. NaN is for the allocation to refuse.
        lowest = min((float(s.nan_to_num().min()) for s in scores.values() if masks), default=0.0)
        lowest = min(lowest, 0.0)
        for name, mask in masks.items():
            gone = ~self.by_unit(layers[name], mask).any(dim=1)
            own = scores[name].float() if scores[name].element_size() < 4 else scores[name]
            margin = 1e-6 * max(float(own.nan_to_num().abs().max()), -lowest, 1e-30)
            found[name] = own.masked_fill(gone, lowest - margin)
        return found

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        """A keep vector for every target, and masks of other parameters that follow from them."""
        if self.runs_the_model:
            return self._allocate_coupled(layers, scores)
        keep = allocate.per_layer(
            scores,
            {one.name: one.sparsity for one in self.targets if one.sparsity is not None},
            **self._limits(),
        )
        for number, group in enumerate(self.targets.groups):
            members = [one for one in self.targets if one.group == number]
            keep |= self._allocate_group(members, layers, scores, group.sparsity)
        return keep, Masks()

    def _allocate_coupled(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        """What goes together: chosen anew as long as a cut on trial tells why some of it stays."""
        coupling, before, most = self._coupling(scores), self._masks_before(), -1
        for _ in range(MOST_TRIALS):
            gone = coupling.choose()
            keep, extra = coupling.keep(gone), coupling.following(gone)
            masks = self._masks_of(layers, keep, extra, before)
            with suspend_masks(self.model):
                trial = coupling.tried(self.model, self.dummy_input, masks, gone)
            if trial.removed < most:  # what is counted together can be too much to go at once
                break
            most, best = trial.removed, (coupling, gone, keep, extra)
            if not trial.stayed:
                break
            if trial.learned:
                coupling = self._coupling(scores, coupling.graph)
            else:
                coupling.hold(trial)
        coupling, gone, keep, extra = best
        coupling.warn_of_untouched(gone)
        return keep, extra

    def _allocate_group(
        self,
        members: Sequence[Target],
        layers: Mapping[str, Layer],
        scores: Mapping[str, Tensor],
        sparsity: float,
    ) -> dict[str, Tensor]:
        return allocate.global_(
            {one.name: scores[one.name] for one in members},
            {one.name: layers[one.name].weight.numel() // len(scores[one.name]) for one in members},
            sparsity,
            max_sparsity={one.name: one.max_sparsity for one in members},
            **self._limits(),
        )

    def _limits(self) -> dict[str, allocate.Limit]:
        """``round_to`` and ``min_channels``, counted in what goes at once."""
        if not self._blocks:
            return {"round_to": self.round_to, "min_channels": self.min_channels}
        sizes = {one.name: self._blocks.get(one.name, 1) for one in self.targets}
        return {
            "round_to": {n: math.lcm(self.round_to, size) // size for n, size in sizes.items()},
            "min_channels": {n: -(-self.min_channels // size) for n, size in sizes.items()},
        }

    def _coupling(
        self, scores: Mapping[str, Tensor], graph: ChannelGraph | None = None
    ) -> Coupling:
        # Imported here: it needs the graph engine, which the other modes do without.
        from compress.pruners.dependency import Coupling

        allocate.check_finite(scores)
        # The graph is that of the plain model, whatever masks are on it.
        with suspend_masks(self.model):
            return Coupling(
                self.model,
                self.targets,
                scores,
                self.dummy_input,
                round_to=self.round_to,
                min_channels=self.min_channels,
                parts={one.name: self.part(self.model, one) for one in self.targets},
                blocks=self._blocks,
                whole_heads=self._whole_heads,
                isomorphic=self.mode == "isomorphic",
                graph=graph,
            )


def _masked(layer: Layer, masks: Mapping[int, Tensor]) -> Layer:
    """The layer under masks, by the ids of the parameters that they are of."""
    raw = [raw_parameter(layer.module, name) for name in layer.part.weights]
    if not any(id(weight) in masks for weight in raw):
        return layer
    every = [masks.get(id(w), torch.ones_like(w, dtype=torch.bool)) for w in raw if w is not None]
    mask = layer.part.gathered([each.to(layer.weight.device) for each in every])
    return replace(layer, weight=layer.weight.masked_fill(~mask, 0), mask=mask)


def raise_all(who: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{who} cannot be made:", problems)
