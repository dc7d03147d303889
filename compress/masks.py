"""Masks as a value, and masks on a model.

`Masks` says which entries of which parameters are kept: it prints, compares, combines, is checked
against a model, and is saved without pickle. `Masks.apply` makes a model compute with them (and
train: masked entries are 0 in the forward and get a zero gradient), `suspend_masks` takes them off
for a while, `remove_masks` writes the zeros into the parameters for good.

A mask on a model is a `torch.nn.utils.parametrize` parametrization. Putting one on is torch's own
function; taking it off is ours, because torch's edits the class of the module, which a deepcopy
shares with its original, and puts the parameter back at the end of the module.
"""

from __future__ import annotations

import difflib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from compress.errors import MaskError

FORMAT = "compress.masks"
FORMAT_VERSION = 1


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
                f"masks: got {_typed(given)}; expected a dict {{module path: {{parameter name: 0/1 "
                "tensor}}"
            )
        problems: list[str] = []
        for path, parameters in given.items():
            copied = _copy_entry(path, parameters, problems)
            if copied:
                self._entries[path] = copied
        _raise_all("these are not masks", problems)

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

    __hash__ = None  # type: ignore[assignment]  # holds tensors, which can change

    def __and__(self, other: Masks) -> Masks:
        """What both keep: the logical and where both have a mask, the one there is elsewhere.

        Raises:
            MaskError: names the entries whose shapes differ.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        theirs = other.flat()
        problems = [
            f"{name}: shapes {tuple(mask.shape)} and {tuple(theirs[name].shape)} differ"
            for name, mask in self.flat().items()
            if name in theirs and theirs[name].shape != mask.shape
        ]
        _raise_all("these masks cannot be combined", problems)
        both: dict[str, dict[str, Tensor]] = {path: dict(self[path]) for path in self}
        for path, parameters in other.items():
            mine = both.setdefault(path, {})
            for name, mask in parameters.items():
                mine[name] = mine[name] & mask.to(mine[name].device) if name in mine else mask
        return Masks(both)

    def __repr__(self) -> str:
        tensors = sum(len(parameters) for parameters in self._entries.values())
        return f"Masks({len(self)} layers, {tensors} tensors, sparsity={self.sparsity:.4f})"

    def __str__(self) -> str:
        table = Table(title="Masks")
        for column, justify in (("layer", "left"), ("parameter", "left"), ("shape", "left"),
                                ("masked", "right"), ("sparsity", "right")):  # fmt: skip
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
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
            _full_name(path, name): mask
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
        _locate(self, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all (the old file stays if it fails).

        Raises:
            MaskError: the file cannot be written.
        """
        tensors = {name: mask.cpu().contiguous().clone() for name, mask in self.flat().items()}
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION)}
        try:
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as error:
            raise MaskError(f"{os.fspath(path)}: the masks cannot be saved: {error}") from error

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
        tensors = _read_file(name)
        entries: dict[str, dict[str, Tensor]] = {}
        for full_name, mask in tensors.items():
            module, _, parameter = full_name.rpartition(".")
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
                f"masks: got {_typed(obj)}; expected Masks, a dict {{module path: {{parameter "
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
        wanted = _by_parameter(_locate(self, model))
        owners = _owners(model)
        attached: list[_Applied] = []
        narrowed: list[tuple[MaskParametrization, Tensor]] = []
        try:
            for key, (mask, named) in wanted.items():
                for slot in owners[key]:
                    present = _mask_on(slot.module, slot.name)
                    explicit = (id(slot.module), slot.name) in named
                    if present is not None:
                        present.named |= explicit
                        narrowed.append((present, mask))
                        continue
                    parameter = _raw(slot)
                    part = MaskParametrization(mask.to(parameter.device, copy=True), explicit)
                    applied = _Applied(slot.path, slot.module, slot.name, part)
                    _attach(applied)
                    attached.append(applied)
        except BaseException:
            for applied in reversed(attached):
                _detach(applied)
            raise
        for present, mask in narrowed:
            present.mask &= mask.to(present.mask.device)


class MaskParametrization(nn.Module):
    """What stands between a raw parameter and its module: ``where(mask, raw, 0)``.

    Args:
        mask: bool, the shape of the parameter.
        named: whether the user's masks named this parameter here, rather than reached it because
            another module has the same one.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, named: bool = True) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.named = named
        # The order of the module's parameters before the first mask: see _detach.
        self.order: tuple[str, ...] = ()

    def forward(self, raw: Tensor) -> Tensor:
        """The masked parameter; a product instead would let NaN and inf through."""
        return torch.where(self.mask, raw, torch.zeros((), dtype=raw.dtype, device=raw.device))


@dataclass(frozen=True)
class _Applied:
    """One mask on one parameter of one module object."""

    path: str
    module: nn.Module
    name: str
    parametrization: MaskParametrization


@dataclass
class SuspendedMasks:
    """Masks taken off a model for a while; also a context manager that restores them.

    Attributes:
        masks: what was applied, empty where nothing was.
    """

    masks: Masks
    _applied: list[_Applied] = field(repr=False)

    def restore(self) -> None:
        """Put every mask back where it was. A second call does nothing."""
        while self._applied:
            _attach(self._applied[0])
            self._applied.pop(0)

    def __enter__(self) -> SuspendedMasks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def applied_masks(model: nn.Module) -> Masks:
    """A copy of the masks that ``model`` computes with now; empty where there are none.

    A tied parameter is listed under the modules that the masks named; a module registered under
    several paths under the first.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for applied in _applied_to(model):
        if applied.parametrization.named:
            entries.setdefault(applied.path, {})[applied.name] = applied.parametrization.mask
    return Masks(entries)


def suspend_masks(model: nn.Module) -> SuspendedMasks:
    """Take our masks off ``model``: plain parameters with the raw, unmasked values.

    Names, order of the parameters, `Parameter` objects and classes are those of the plain model.
    Other people's parametrizations are left alone.

    Raises:
        MaskError: something was parametrised on top of a mask; the model is untouched.
    """
    masks, applied = applied_masks(model), _applied_to(model)
    for one in applied:
        _detach(one)
    return SuspendedMasks(masks, applied)


def remove_masks(model: nn.Module) -> Masks:
    """Write the zeros of our masks into the parameters, in place, and take the masks off.

    Returns:
        What was applied, as `applied_masks`. A model without masks is left as it is.

    Raises:
        MaskError: as `suspend_masks`.
    """
    masks, applied = applied_masks(model), _applied_to(model)
    for one in applied:
        _detach(one)
        with torch.no_grad():
            cast(nn.Parameter, raw_parameter(one.module, one.name)).masked_fill_(
                ~one.parametrization.mask, 0
            )
    return masks


def masked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` as the plain model has it: plain names in order, masked entries 0.

    ``model`` keeps its masks. Only masked parameters are copied, once each where they are tied.

    Raises:
        MaskError: as `suspend_masks`.
    """
    with suspend_masks(model) as suspended:
        masks = {
            id(raw_parameter(one.module, one.name)): one.parametrization.mask
            for one in suspended._applied
        }
        state: dict[str, Tensor] = model.state_dict()
        zeroed: dict[int, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            key = id(parameter)
            if key in masks and name in state:
                if key not in zeroed:
                    zeroed[key] = parameter.detach().masked_fill(~masks[key], 0)
                state[name] = zeroed[key]
    return state


def raw_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The stored `Parameter` behind ``module.name``, under our mask if there is one.

    None where ``name`` is no parameter of ``module``, or is parametrised by somebody else.
    """
    found = dict(module._parameters.items()).get(name)  # a scripted module's has no get()
    if found is None and _mask_on(module, name) is not None:
        found = _parts(module, name)._parameters.get("original")
    return found


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there: whole or not at all.

    Raises:
        OSError: the folder is missing or cannot be written, or ``path`` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def closest(name: str, existing: Iterable[str]) -> str:
    """The part of a message that suggests the existing name most like ``name``; may be empty."""
    found = difflib.get_close_matches(name, list(existing), n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""


# ---------------------------------------------------------------------------------------------
# Finding the parameter that a mask means


@dataclass(frozen=True)
class _Slot:
    """A parameter as one module holds it: ``module.name``, or under our mask there."""

    path: str
    module: nn.Module
    name: str


def _locate(masks: Masks, model: nn.Module) -> list[tuple[_Slot, Tensor]]:
    """The slot that each mask means; raises one MaskError with every problem."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    found: list[tuple[_Slot, Tensor]] = []
    for path, parameters in masks.items():
        if path not in modules:
            problems.append(
                f"{path!r}: the model has no module of this name{closest(path, modules)}"
            )
            continue
        for name, mask in parameters.items():
            slot = _slot(modules, path, name)
            problem = _slot_problem(slot, mask)
            if problem:
                problems.append(f"{_full_name(path, name)!r}: {problem}")
            else:
                found.append((slot, mask))
    _raise_all(f"these masks do not fit the model ({type(model).__name__})", problems)
    return found


def _slot(modules: Mapping[str, nn.Module], path: str, name: str) -> _Slot:
    """The slot of ``path``.``name``; the raw name of a parameter under our mask is its owner's."""
    module = modules[path]
    if name == "original" and isinstance(module, parametrize.ParametrizationList):
        owner_path, _, tensor_name = path.rpartition(".parametrizations.")
        if not owner_path and not tensor_name:
            owner_path, tensor_name = "", path.removeprefix("parametrizations.")
        owner = modules[owner_path]
        if _mask_on(owner, tensor_name) is not None:
            return _Slot(owner_path, owner, tensor_name)
    return _Slot(path, module, name)


def _slot_problem(slot: _Slot, mask: Tensor) -> str:
    """Why this mask cannot be put here; empty if it can."""
    parameter = raw_parameter(slot.module, slot.name)
    kind = type(slot.module).__name__
    if parameter is None:
        if parametrize.is_parametrized(slot.module, slot.name):
            parts = _parts(slot.module, slot.name)
            raw = [name for name, _ in parts.named_parameters(recurse=False)]
            where = _full_name(slot.path, f"parametrizations.{slot.name}")
            return (
                f"it is parametrised ({', '.join(type(p).__name__ for p in parts)}); mask its "
                f"raw name instead (module {where!r}, parameter {' or '.join(map(repr, raw))}), or "
                "call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if slot.name in slot.module._buffers:
            return f"it is a buffer of this {kind}; only parameters can be masked"
        names = list(_parameter_names(slot.module))
        has = f"it has {', '.join(map(repr, names))}" if names else "it has none"
        return f"this {kind} has no such parameter; {has}{closest(slot.name, names)}"
    if isinstance(parameter, UninitializedParameter):
        return "the parameter has no shape yet; run the model once on a batch before masking it"
    if parameter.shape != mask.shape:
        return (
            f"got a mask of shape {tuple(mask.shape)}; expected the shape of the parameter, "
            f"{tuple(parameter.shape)}"
        )
    return ""


def _parameter_names(module: nn.Module) -> Iterator[str]:
    """Names of the parameters of ``module`` itself, those under our masks included."""
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    yield from _masks_on(module)


def _by_parameter(
    found: list[tuple[_Slot, Tensor]],
) -> dict[int, tuple[Tensor, set[tuple[int, str]]]]:
    """Per parameter object (by id): the and of its masks, and the slots that were named."""
    wanted: dict[int, tuple[Tensor, set[tuple[int, str]]]] = {}
    problems: list[str] = []
    for slot, mask in found:
        parameter = _raw(slot)
        if parameter.is_meta:
            problems.append(
                f"{_full_name(slot.path, slot.name)!r}: the parameter is on the meta device, "
                "where a mask has no values; move the model to a real device first"
            )
            continue
        before, named = wanted.get(id(parameter), (None, set()))
        named.add((id(slot.module), slot.name))
        together = mask if before is None else before & mask.to(before.device)
        wanted[id(parameter)] = (together, named)
    _raise_all("these masks cannot be applied", problems)
    return wanted


def _owners(model: nn.Module) -> dict[int, list[_Slot]]:
    """Every slot of each parameter object, by its id; a shared module counts once."""
    owners: dict[int, list[_Slot]] = {}
    for path, module in model.named_modules():
        for name in _parameter_names(module):
            # A ParametrizationList of ours is the inside of a slot, not one of its own.
            if not (isinstance(module, parametrize.ParametrizationList) and _is_ours(module)):
                slot = _Slot(path, module, name)
                owners.setdefault(id(_raw(slot)), []).append(slot)
    return owners


def _raw(slot: _Slot) -> nn.Parameter:
    parameter = raw_parameter(slot.module, slot.name)
    assert parameter is not None, f"{slot.path}.{slot.name} was checked by _locate"
    return parameter


# ---------------------------------------------------------------------------------------------
# Putting masks on and off


def _parts(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    every = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, every[name])


def _is_ours(parts: parametrize.ParametrizationList) -> bool:
    return "0" in parts._modules and isinstance(parts[0], MaskParametrization)


def _masks_on(module: nn.Module) -> dict[str, MaskParametrization]:
    """Our masks on the parameters of ``module`` itself, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    names = list(cast(nn.ModuleDict, module.parametrizations))
    return {
        name: cast(MaskParametrization, _parts(module, name)[0])
        for name in names
        if _is_ours(_parts(module, name))
    }


def _mask_on(module: nn.Module, name: str) -> MaskParametrization | None:
    return _masks_on(module).get(name)


def _applied_to(model: nn.Module) -> list[_Applied]:
    """All our masks on ``model``, in module order; raises if one cannot be taken off."""
    applied = [
        _Applied(path, module, name, part)
        for path, module in model.named_modules()
        for name, part in _masks_on(module).items()
    ]
    problems = [
        f"{_full_name(one.path, one.name)!r}: it was parametrised again on top of its mask; call "
        "torch.nn.utils.parametrize.remove_parametrizations on it first"
        for one in applied
        if "1" in _parts(one.module, one.name)._modules
    ]
    _raise_all("these masks cannot be taken off", problems)
    return applied


def _attach(applied: _Applied) -> None:
    """Put one mask on; the module's first mask remembers the order of its parameters."""
    module, part = applied.module, applied.parametrization
    others = _masks_on(module)
    part.order = next(iter(others.values())).order if others else tuple(module._parameters)
    if parametrize.is_parametrized(module):
        _unshare_class(module)
    parametrize.register_parametrization(module, applied.name, part)
    if isinstance(module, nn.RNNBase):
        _make_copyable(module)


def _detach(applied: _Applied) -> None:
    """Take one mask off: the raw parameter goes back to its name, place and class."""
    module, name = applied.module, applied.name
    original = _parts(module, name).original
    parts = cast(nn.ModuleDict, module.parametrizations)
    del parts[name]
    if len(parts) == 0:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    else:
        _unshare_class(module, without=name)
    setattr(module, name, original)
    order = {key: place for place, key in enumerate(applied.parametrization.order)}
    items = sorted(module._parameters.items(), key=lambda item: order.get(item[0], len(order)))
    module._parameters.clear()
    module._parameters.update(items)


def _make_copyable(module: nn.RNNBase) -> None:
    """Let a masked LSTM, GRU or RNN be deepcopied after a training step.

    It caches its weights as of the last forward; masked ones belong to that step's autograd graph,
    which cannot be copied.
    """
    copy_rest = type(module).__deepcopy__  # type: ignore[attr-defined]

    def deepcopy(self: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
        with torch.no_grad():
            self._init_flat_weights()
        return cast(nn.RNNBase, copy_rest(self, memo))

    type(module).__deepcopy__ = deepcopy  # type: ignore[attr-defined]


def _unshare_class(module: nn.Module, without: str | None = None) -> None:
    """Give a parametrised module a class of its own, without the property ``without``.

    torch makes one class per parametrised module and keeps the tensors' properties on it; a
    deepcopy has the same class, so that editing it for one would break the other.
    """
    cls = type(module)
    attributes = {
        key: value
        for key, value in vars(cls).items()
        if key not in ("__dict__", "__weakref__", without)
    }
    module.__class__ = type(cls.__name__, cls.__bases__, attributes)


# ---------------------------------------------------------------------------------------------
# Small parts


def _copy_entry(path: object, parameters: object, problems: list[str]) -> dict[str, Tensor]:
    """Boolean copies of one module's masks; what is wrong is added to ``problems``."""
    if not isinstance(path, str):
        problems.append(f"{path!r}: got {_typed(path)} as a module path; expected a string")
        return {}
    if not isinstance(parameters, Mapping):
        problems.append(
            f"{path!r}: got {_typed(parameters)}; expected a dict {{parameter name: 0/1 tensor}}, "
            "as in {'conv1': {'weight': mask}}"
        )
        return {}
    copied: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if value is None:  # as NNI has it for a layer without bias
            continue
        if not isinstance(name, str) or not name or "." in name:
            problems.append(
                f"{path!r}: got the parameter name {name!r}; expected the parameter's own name, "
                "such as 'weight', and the rest in the module path"
            )
            continue
        problem = _value_problem(value)
        if problem:
            problems.append(f"{_full_name(path, name)!r}: {problem}")
        else:
            copied[name] = value.detach().to(torch.bool, copy=True)
    return copied


def _value_problem(value: object) -> str:
    """Why this is no mask; empty if it is one."""
    if not isinstance(value, Tensor):
        return f"got {_typed(value)}; expected a tensor of 0 and 1, or of bools"
    if value.is_meta:
        return "got a tensor on the meta device, which has no values; expected 0 and 1, or bools"
    if value.layout != torch.strided or value.is_quantized:
        return f"got a {value.layout} tensor of {value.dtype}; expected a dense one (.to_dense())"
    if value.dtype != torch.bool:
        wrong = value.detach()[~((value == 0) | (value == 1))]
        if wrong.numel():
            return (
                f"got {wrong.numel()} of {value.numel()} entries that are neither 0 nor 1, the "
                f"first {wrong[0].item()}; expected 0 (masked) and 1 (kept), or bools"
            )
    return ""


def _read_file(name: str) -> dict[str, Tensor]:
    """The tensors of a mask file; raises MaskError on anything else."""
    if not os.path.exists(name):
        raise MaskError(f"{name}: no such file; expected one written by Masks.save")
    if not os.path.isfile(name):
        raise MaskError(f"{name}: it is no file; expected one written by Masks.save")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(name, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(
            f"{name}: it cannot be read as a safetensors file ({error}): truncated, or of another "
            "kind; expected one written by Masks.save"
        ) from error
    wrong = [
        f"{key!r}: got {tensor.dtype}; expected bool or uint8"
        for key, tensor in tensors.items()
        if tensor.dtype not in (torch.bool, torch.uint8)
    ]
    _raise_all(f"{name}: these are not masks", wrong)
    return tensors


def _check_metadata(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise MaskError(
            f"{name}: a safetensors file, but not of masks (its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); expected one written by Masks.save"
        )
    version = metadata.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= FORMAT_VERSION:
        raise MaskError(
            f"{name}: masks of format version {version!r}; this release reads up to "
            f"{FORMAT_VERSION}; install a newer compress"
        )


def _raise_all(what: str, problems: list[str]) -> None:
    if problems:
        raise MaskError("\n  ".join([f"{what}:", *problems]))


def _typed(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _kept(mask: Tensor) -> int:
    return int(mask.count_nonzero())  # several times as fast as sum


def _count(masks: Iterable[Tensor]) -> tuple[int, int]:
    """(masked entries, all entries)"""
    pairs = [(mask.numel() - _kept(mask), mask.numel()) for mask in masks]
    return sum(masked for masked, _ in pairs), sum(total for _, total in pairs)


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
