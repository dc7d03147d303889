"""What all pruners do: config_list → scores → masks → a model that computes with them."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress import allocate
from compress.config import Target, resolve
from compress.errors import CompressError, ConfigError
from compress.files import write_atomically
from compress.masks import (
    Masks,
    applied_masks,
    masked_state_dict,
    raw_parameter,
    remove_masks,
    suspend_masks,
)

MODES = ("normal", "global", "dependency_aware", "isomorphic")


@dataclass(frozen=True)
class Layer:
    """A layer to be scored.

    Attributes:
        name: module path.
        module: the user's module.
        weight: its weight, detached; 0 where a mask from before the pruner is.
    """

    name: str
    module: nn.Module
    weight: Tensor


def foreign_layers() -> tuple[type[nn.Module], ...]:
    """Layers of libraries that are in use: transformers' Conv1D, a Linear with weight (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return () if library is None else (library.Conv1D,)


class Pruner(ABC):
    """Scores the units of the selected layers and masks the lowest.

    A subclass says what it supports, how it scores a layer, and which parameters a unit is.
    Everything is checked when the pruner is made; only `compress` and `unwrap_model` touch the
    model.

    Args:
        model: the model to prune; masked in place.
        config_list: which layers, and how much of them: see `compress.config`.
        mode: "normal" takes every layer by itself; "global" is one ranking over all the layers of a
            ``total_sparsity`` entry; "dependency_aware" scores and masks the layers together that
            can only shrink together, found by running the model on ``dummy_input``; "isomorphic"
            does so, too, with one ranking under a ``total_sparsity`` for each kind of structure, so
            that scores of different kinds (attention, MLP, residual stream) are not compared. Those
            of one kind are, as they are; ``max_sparsity_per_layer`` bounds what a layer may lose.
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
        self.targets = resolve(
            model,
            config_list,
            self._layer_types(),
            optional_types=self.optional_types,
            unit_axis=self.unit_axis,
            pruner=type(self).__name__,
            granularity=self.granularity,
        )
        self._check_mode()
        self._masks: Masks | None = None
        self._before = Masks()

    def _layer_types(self) -> tuple[type[nn.Module], ...]:
        """What ``op_types: ["default"]`` means now."""
        return self.supported_types + foreign_layers()

    def unit_axis(self, module: nn.Module) -> int:
        """The axis of a layer's weight that its units lie along."""
        return 0

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """``(units,)``, one score per unit; the lowest are masked first."""

    @abstractmethod
    def expand(self, layer: Layer, keep: Tensor) -> dict[str, Tensor]:
        """The masks of a layer, by parameter, where the units ``keep``, bool ``(units,)``, stay."""

    @property
    def masks(self) -> Masks:
        """A copy of the masks of the last `compress`.

        Raises:
            CompressError: `compress` has not been called.
        """
        if self._masks is None:
            raise CompressError(f"{type(self).__name__} has no masks yet; call compress() first")
        return Masks(self._masks)

    @property
    def runs_the_model(self) -> bool:
        """Whether the mode asks the channel graph what goes together."""
        return self.mode in ("dependency_aware", "isomorphic")

    def calc_masks(self) -> Masks:
        """The masks for the model's present weights; nothing is touched.

        Scores are of the raw weights, without what an earlier `compress` of this pruner masked, so
        that the same weights give the same masks. Masks that the model had before it stay: what
        they mask counts as 0 in the scores, and is masked in the result.

        Raises:
            ConfigError: a ``total_sparsity`` cannot be reached.
            MaskError: a layer has NaN or infinite scores.
        """
        before = self._masks_before()
        layers = self._layers(before)
        scores = {name: self.score(layer) for name, layer in layers.items()}
        keep, extra = self._allocate(layers, scores)
        entries: dict[str, dict[str, Tensor]] = {}
        modules = dict(self.model.named_modules())
        for target in self.targets:
            layer = layers[target.name]
            for name in (target.name, *target.tied):
                one = Layer(name, modules[name], layer.weight)
                entries[name] = self.expand(one, keep[target.name])
        masks = Masks(entries)
        masks &= extra
        masks &= before
        return masks

    def compress(self) -> tuple[nn.Module, Masks]:
        """Mask the model, in place.

        Called again, it takes its own masks off and computes new ones from the present weights.

        Returns:
            The model that was given, and a copy of the masks that it computes with now.

        Raises:
            ConfigError, MaskError: as `calc_masks`; the model is as it was.
        """
        before, masks = self._masks_before(), self.calc_masks()
        suspended = suspend_masks(self.model)
        try:
            masks.apply(self.model)
        except BaseException:
            suspended.restore()
            raise
        self._before, self._masks = before, masks
        return self.model, self.masks

    def unwrap_model(self) -> nn.Module:
        """Write the masks' zeros into the parameters and take the masks off, in place.

        Returns:
            The same model, now a plain one: same classes, names and `Parameter` objects. A second
            call changes nothing.
        """
        remove_masks(self.model)
        return self.model

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Save the pruned model, as NNI v1 does; the model is as masked as before.

        Args:
            model_path: for its ``state_dict()`` with the masks applied, under the plain names.
            mask_path: for the masks, if wanted (safetensors).
            onnx_path: for an ONNX file of the model in eval mode, if wanted; needs
                ``pip install compress-torch[onnx]``.
            input_shape: shape of the model's input, batch included, for ONNX.
            device: where to run the ONNX export; where the model is, by default.

        Raises:
            CompressError: `compress` has not been called, or what ONNX needs is missing; nothing is
                written then.
        """
        masks = self.masks
        if onnx_path is not None:
            _check_onnx(input_shape)
        state = masked_state_dict(self.model)
        write_atomically(model_path, lambda path: torch.save(state, path))
        if mask_path is not None:
            masks.save(mask_path)
        if onnx_path is not None and input_shape is not None:
            _export_onnx(self.model, onnx_path, input_shape, device)

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
                "config_list that selects a layer has one; give total_sparsity, or leave mode out"
            ]
        raise_all(type(self).__name__, problems)

    def _masks_before(self) -> Masks:
        """The masks on the model that are not this pruner's."""
        applied = applied_masks(self.model)
        return self._before if applied == self._masks else applied

    def _layers(self, before: Masks) -> dict[str, Layer]:
        modules = dict(self.model.named_modules())
        masked = {
            id(raw_parameter(modules[path], name)): mask
            for path, parameters in before.items()
            for name, mask in parameters.items()
        }
        layers = {}
        for target in self.targets:
            module = modules[target.name]
            raw = raw_parameter(module, "weight")
            if raw is None:
                raise CompressError(
                    f"{target.name!r}: its weight was there when {type(self).__name__} was made "
                    "and is no plain parameter now; make a new pruner for the changed model"
                )
            weight = raw.detach()
            if id(raw) in masked:
                weight = weight.masked_fill(~masked[id(raw)].to(weight.device), 0)
            layers[target.name] = Layer(target.name, module, weight)
        return layers

    def _allocate(
        self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Masks]:
        """A keep vector for every target, and masks of other parameters that follow from them."""
        if self.runs_the_model:
            return self._allocate_coupled(scores)
        keep = allocate.per_layer(
            scores,
            {one.name: one.sparsity for one in self.targets if one.sparsity is not None},
            **self._limits(),
        )
        for number, group in enumerate(self.targets.groups):
            members = [one for one in self.targets if one.group == number]
            keep |= self._allocate_group(members, layers, scores, group.sparsity)
        return keep, Masks()

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

    def _allocate_coupled(self, scores: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
        # Imported here: it needs the graph engine, which the other modes do without.
        from compress.pruners.dependency import coupled_masks

        # The graph is that of the plain model, whatever masks are on it.
        with suspend_masks(self.model):
            keep, extra = coupled_masks(
                self.model,
                self.targets,
                scores,
                self.dummy_input,
                round_to=self.round_to,
                min_channels=self.min_channels,
                blocks=self._blocks,
                whole_heads=self._whole_heads,
                isomorphic=self.mode == "isomorphic",
            )
        return dict(keep), Masks.coerce(extra)


def raise_all(who: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join([f"{who} cannot be made:", *problems]))


def _check_onnx(input_shape: Sequence[int] | None) -> None:
    if input_shape is None:
        raise ConfigError(
            "export_model: got onnx_path without input_shape; expected the shape of the model's "
            "input, such as input_shape=(1, 3, 224, 224)"
        )
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompressError(
            f"export_model: onnx_path needs {' and '.join(missing)}, not installed here: "
            "pip install compress-torch[onnx]"
        )


def _export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    device: str | torch.device | None,
) -> None:
    """Export a plain copy of ``model`` in eval mode; ``model`` is not touched."""
    plain = deepcopy(model)
    remove_masks(plain)
    plain.eval()
    if device is not None:
        plain.to(device)
    first = next(plain.parameters())
    # Only the shape of the input counts, so that the user's random state can be left alone.
    sample = torch.zeros(*input_shape, device=first.device, dtype=first.dtype)
    # torch 2.4 has only the exporter without dynamo. The weights go into the one file.
    wanted = {"dynamo": True, "external_data": False}
    known = inspect.signature(torch.onnx.export).parameters
    options: dict[str, Any] = {key: value for key, value in wanted.items() if key in known}

    def write(temporary: Path) -> None:
        torch.onnx.export(plain, (sample,), str(temporary), **options)

    write_atomically(path, write)
