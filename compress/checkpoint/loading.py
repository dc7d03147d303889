"""``compress.load``: the small model again, of the user's class and a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from compress.checkpoint.building import build_light, build_whole, fill
from compress.checkpoint.files import Checkpoint, read_checkpoint
from compress.checkpoint.fitting import carry_out, names_of
from compress.checkpoint.weights import read_checked
from compress.errors import CheckpointError, MaskError
from compress.graph.walk import leaves_of
from compress.masks import Masks
from compress.speedup.history import remember_all


def load(
    build: Callable[[], nn.Module],
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
) -> nn.Module:
    """The small model of a file of `compress.save`, or a folder of `compress.shrink_checkpoint`.

    Nothing in the files is ever executed or unpickled. The model is built by ``build``, shrunk by
    the recipe, and given the weights: what it computes is bit for bit what the saved one does. It
    is in the mode (train or eval) that ``build`` leaves it in, and knows how it was shrunk.

    Args:
        build: makes the model as it was before any speedup: ``lambda: resnet18(num_classes=10)``.
            Its parameters take no memory where the rest of the model does not depend on their
            values; where it does, the function is called once more.
        path: the file or folder.
        map_location: the device to put the model on; else the one that ``build`` takes.

    Raises:
        CheckpointError: the file is damaged, of a newer release, of another model or of other
            weights; says what differs. What ``build`` raises itself is left as it is.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise CheckpointError(
            f"load: got a {type(build).__name__} as what builds the model; expected a function "
            "without arguments, such as lambda: resnet18(num_classes=10)"
        )
    checkpoint = read_checkpoint(path)
    device = None if map_location is None else torch.device(map_location)
    with torch.inference_mode(False):  # the parameters must be ordinary tensors
        read = {
            name: read_checked(name, place, checkpoint.recipe.tensors[name])
            for name, place in checkpoint.places.items()
        }
        restorer = _Restorer(checkpoint, read, device)
        model = build_light(build)
        if model is not None:
            try:
                return restorer.restore(model)
            except CheckpointError:
                del model  # it may be another one with the values of its weights
        return restorer.restore(build_whole(build))


@dataclass
class _Restorer:
    """What is needed to make a fresh model the one of a checkpoint."""

    checkpoint: Checkpoint
    read: dict[str, Tensor]
    device: torch.device | None

    def restore(self, model: nn.Module) -> nn.Module:
        """Shrink and fill a model, or leave it as it was."""
        _check_built(model)
        undo = carry_out(model, self.checkpoint.recipe, self.checkpoint.where)
        try:
            masks, values = self._masks(model), self._values(model)
            left = [p for p, t, _ in leaves_of(model) if t.is_meta and p not in values]
            if left:
                raise CheckpointError(
                    f"{self.checkpoint.where}: {left[0]} is on the meta device and has no values "
                    "in the file; build the model on a real device"
                )
        except BaseException:
            undo()
            raise
        fill(model, values)
        if self.device is not None:
            model.to(self.device)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # cuDNN wants them in one piece of memory
        masks.apply(model)
        remember_all(model, self.checkpoint.recipe.plans)
        return model

    def _values(self, model: nn.Module) -> dict[str, Tensor]:
        """Every tensor of the file that the model has, by first path."""
        names, leaves = names_of(model), {path: tensor for path, tensor, _ in leaves_of(model)}
        values: dict[str, Tensor] = {}
        for name, value in self.read.items():
            path = names.get(name)
            if name in self.checkpoint.recipe.masks or path is None:
                continue
            if leaves[path].shape != value.shape:
                continue  # a cache, say, which grew while the model ran: it grows again
            own = torch.device("cpu") if leaves[path].is_meta else leaves[path].device
            values[path] = value.to(own if self.device is None else self.device)
        return values

    def _masks(self, model: nn.Module) -> Masks:
        """The masks of the file, which fit the model."""
        entries: dict[str, dict[str, Tensor]] = {}
        wanted = {parameter: name for name, parameter in self.checkpoint.recipe.masks.items()}
        for parameter in sorted(wanted, key=list(names_of(model)).index):
            mask = self.read[wanted[parameter]]
            module, _, own = parameter.rpartition(".")
            entries.setdefault(module, {})[own] = mask
        try:
            masks = Masks(entries)
            masks.validate(model)
        except MaskError as error:
            raise CheckpointError(f"{self.checkpoint.where}: {error}") from error
        return masks


def _check_built(model: nn.Module) -> None:
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise CheckpointError(
            f"{lazy[0]}: the parameter is lazy; run the model once in the function that builds it"
        )
