"""Masks as a plain value: what is kept of which parameter."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console, JustifyMethod
from rich.table import Table
from torch import Tensor, nn

from compress.errors import MaskError
from compress.masks.apply import apply_masks, make_permanent, put_torch_masks
from compress.masks.entries import copy_entry, full_name, raise_all, typed
from compress.masks.files import read_masks, write_masks
from compress.masks.locate import locate
from compress.masks.torch_prune import torch_masks


class Masks(Mapping[str, Mapping[str, Tensor]]):
    """Which entries of which parameters are kept: ``{module path: {parameter name: tensor}}``.

    Every tensor is boolean, True = kept, of the shape of the parameter that it masks. The path is
    that of ``model.named_modules()`` (``""`` is the model itself); the name is the parameter's own
    name in that module, so a parametrised weight goes by its raw name, for instance
    ``{"conv.parametrizations.weight": {"original0": ...}}``. Modules with no masked parameter are
    dropped.

    Args:
        entries: nested mapping with boolean tensors, or tensors of any number type that hold only
            0 and 1. They are copied: a `Masks` shares no memory with what it was made of.

    Raises:
        MaskError: lists everything that is not such a tensor, by path.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}
        given = {} if entries is None else entries
        if not isinstance(given, Mapping):
            raise MaskError(
                f"masks: got {typed(given)}; expected a dict {{module path: {{parameter name: 0/1 "
                "tensor}}"
            )
        problems: list[str] = []
        for path, parameters in given.items():
            copied = copy_entry(path, parameters, problems)
            if copied:
                self._entries[path] = copied
        raise_all("these are not masks", problems)

    def __getitem__(self, path: str) -> Mapping[str, Tensor]:
        return MappingProxyType(self._entries[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        mine, theirs = self.flat(), other.flat()
        return mine.keys() == theirs.keys() and all(
            mask.shape == theirs[name].shape and torch.equal(mask.cpu(), theirs[name].cpu())
            for name, mask in mine.items()
        )

    def __and__(self, other: Masks) -> Masks:
        """What both keep: the logical and where both have a mask, the one there is elsewhere.

        Raises:
            MaskError: names the entries whose shapes differ.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        both = Masks(self)
        both &= other
        return both

    def __iand__(self, other: Masks) -> Masks:
        """The same in place; what only ``other`` has is copied.

        Raises:
            MaskError: as ``&``; nothing is changed.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        if not other:
            return self
        theirs = other.flat()
        problems = [
            f"{name}: shapes {tuple(mask.shape)} and {tuple(theirs[name].shape)} differ"
            for name, mask in self.flat().items()
            if name in theirs and theirs[name].shape != mask.shape
        ]
        raise_all("these masks cannot be combined", problems)
        for path, parameters in other.items():
            mine = self._entries.setdefault(path, {})
            for name, mask in parameters.items():
                before = mine.get(name)
                # A new tensor: one made under inference_mode cannot be written outside of it.
                mine[name] = mask.clone() if before is None else before & mask.to(before.device)
        return self

    def __repr__(self) -> str:
        tensors = sum(len(parameters) for parameters in self._entries.values())
        return f"Masks({len(self)} layers, {tensors} tensors, sparsity={self.sparsity:.4f})"

    def __str__(self) -> str:
        table = Table(title="Masks")
        columns: dict[str, JustifyMethod] = {
            "layer": "left", "parameter": "left", "shape": "left", "masked": "right",
            "sparsity": "right",
        }  # fmt: skip
        for column, justify in columns.items():
            table.add_column(column, justify=justify, overflow="fold")
        for path, parameters in self.items():
            for name, mask in parameters.items():
                masked = mask.numel() - _kept(mask)
                table.add_row(
                    path or "(model)", name, "×".join(map(str, mask.shape)) or "scalar",
                    f"{masked:,} / {mask.numel():,}", f"{_fraction(masked, mask.numel()):.2%}",
                )  # fmt: skip
        masked, total = _count(self.flat().values())
        table.add_section()
        table.add_row("total", "", "", f"{masked:,} / {total:,}", f"{self.sparsity:.2%}")
        text = io.StringIO()
        Console(file=text, width=200, color_system=None, markup=False).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    @property
    def sparsity(self) -> float:
        """Masked entries / all entries of the tensors that have a mask; 0.0 when there is none."""
        return _fraction(*_count(self.flat().values()))

    @property
    def sparsity_per_layer(self) -> dict[str, float]:
        """`sparsity` of each module by itself, over all of its masked parameters."""
        return {path: _fraction(*_count(self[path].values())) for path in self}

    def flat(self) -> dict[str, Tensor]:
        """The same tensors by full parameter name: ``{"conv1.weight": tensor}``."""
        return {
            full_name(path, name): mask
            for path, parameters in self._entries.items()
            for name, mask in parameters.items()
        }

    def to(self, device: str | torch.device) -> Masks:
        """A copy on ``device``."""
        return Masks({path: {k: v.to(device) for k, v in self[path].items()} for path in self})

    def validate(self, model: nn.Module) -> None:
        """Check that every mask names a parameter of ``model`` and has its shape.

        Raises:
            MaskError: lists every module path or parameter name that does not exist, with the
                closest one that does, and every shape that differs.
        """
        locate(self, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all (the old file stays if it fails).

        Raises:
            MaskError: the file cannot be written.
        """
        write_masks(path, self.flat())

    @staticmethod
    def load(path: str | os.PathLike[str], map_location: str | torch.device | None = None) -> Masks:
        """Read a file written by `save`; nothing in it is ever executed or unpickled.

        Args:
            path: the file.
            map_location: device to put the masks on; the CPU by default.

        Raises:
            MaskError: names the file and what is wrong with it: missing, not a file, truncated,
                not safetensors, not masks, of a newer version, of a wrong type.
        """
        name = os.fspath(path)
        tensors = read_masks(name)
        entries: dict[str, dict[str, Tensor]] = {}
        for key, mask in tensors.items():
            module, _, parameter = key.rpartition(".")
            entries.setdefault(module, {})[parameter] = mask
        try:
            masks = Masks(entries)
        except MaskError as error:
            raise MaskError(f"{name}: {error}") from error
        return masks if map_location is None else masks.to(map_location)

    @staticmethod
    def coerce(obj: Any, map_location: str | torch.device | None = None) -> Masks:
        """`Masks` from a `Masks`, a nested dict, or the path of a file; always a copy.

        Raises:
            MaskError: it is none of these, or not valid.
        """
        if isinstance(obj, (str, os.PathLike)):
            return Masks.load(obj, map_location)
        if not isinstance(obj, Mapping):
            raise MaskError(
                f"masks: got {typed(obj)}; expected Masks, a dict {{module path: {{parameter "
                "name: 0/1 tensor}}, or the path of a file written by Masks.save"
            )
        masks = Masks(obj)
        return masks if map_location is None else masks.to(map_location)

    def apply(self, model: nn.Module) -> None:
        """Make ``model`` compute with these masks, in place, until `remove_masks`.

        The masked entries are 0 in the forward, whatever their stored value (NaN too), and get a
        zero gradient. Weight decay still moves the stored values; the forward never sees them. The
        `Parameter` objects stay the ones that they were, so an optimizer made before goes on
        working. A parameter that has a mask already keeps what both keep. A parameter used by
        several modules (a tied embedding and head) is masked in all of them.

        While masked, ``state_dict()`` has for each masked parameter two entries in the place of
        one: ``conv.parametrizations.weight.original`` (the raw values) and
        ``conv.parametrizations.weight.0.mask`` (bool). It loads into a model with masks on the same
        parameters, so that training can be resumed; for a file with the plain names use
        `Pruner.export_model`, or call `remove_masks` first. ``copy.deepcopy`` works; pickling the
        whole module does not (a limit of torch's parametrizations).

        Raises:
            MaskError: as `validate`, or a parameter is on the meta device; the model is untouched.
        """
        apply_masks(self, model)

    @staticmethod
    def from_torch_prune(model: nn.Module) -> Masks:
        """The masks of a model that ``torch.nn.utils.prune`` pruned, by whatever method.

        Read from what the model computes with, so that several methods on one parameter are one
        mask. Names are the plain ones: ``{"conv": {"weight": mask}}``. The model is not touched. A
        speedup, a pruner and `apply` take such a model as it is; these masks are for looking at,
        saving and combining.

        Raises:
            MaskError: nothing in the model is pruned so; a mask is not of 0 and 1; a parameter that
                modules share is pruned in one of them only, or in another way.
        """
        if not isinstance(model, nn.Module):
            raise MaskError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
        found = torch_masks(model)
        if not found:
            raise MaskError(
                f"{type(model).__name__}: torch.nn.utils.prune masks nothing in it; prune it "
                "first, for instance with torch.nn.utils.prune.l1_unstructured(model.conv1, "
                '"weight", 0.5), and pass it before prune.remove'
            )
        entries: dict[str, dict[str, Tensor]] = {}
        for one in found:
            entries.setdefault(one.path, {})[one.name] = one.mask
        return Masks(entries)

    def apply_torch_prune(self, model: nn.Module) -> None:
        """Prune ``model`` with these masks as ``torch.nn.utils.prune`` does, in place.

        Every masked ``weight`` becomes ``weight_orig``, ``weight_mask`` and a pre-hook, in all
        modules that have the parameter. What torch has masked before stays masked; masks of ours on
        the model are taken along and are torch's after.

        Raises:
            MaskError: as `validate`; the model is untouched.
        """
        put_torch_masks(self, model)

    def make_permanent(self, model: nn.Module) -> None:
        """Write the zeros of these masks into the parameters of ``model``, in place.

        As torch's ``prune.remove``: a plain model, with the same `Parameter` objects. Masks that
        were on it, ours or torch's, are written in and taken off, too.

        Raises:
            MaskError: as `apply`; the model is untouched.
        """
        make_permanent(self, model)


def _kept(mask: Tensor) -> int:
    return int(mask.count_nonzero())  # several times as fast as sum


def _count(masks: Iterable[Tensor]) -> tuple[int, int]:
    """(masked entries, all entries)"""
    pairs = [(mask.numel() - _kept(mask), mask.numel()) for mask in masks]
    return sum(masked for masked, _ in pairs), sum(total for _, total in pairs)


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
