"""Finding the parameter that a mask means, and everywhere that it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from compress.errors import closest
from compress.masks.entries import full_name, raise_all
from compress.masks.parametrization import is_ours, mask_on, masks_on, parts_of, raw_parameter
from compress.masks.torch_prune import pruning_hook


@dataclass(frozen=True)
class Slot:
    """A parameter as one module holds it: ``module.name``, or under our mask there."""

    path: str
    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        found = raw_parameter(self.module, self.name)
        assert found is not None, f"{self.path}.{self.name} was checked by locate"
        return found


def locate(
    masks: Mapping[str, Mapping[str, Tensor]], model: nn.Module
) -> list[tuple[Slot, Tensor]]:
    """The slot that each mask means; raises one MaskError with every problem."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    found: list[tuple[Slot, Tensor]] = []
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
                problems.append(f"{full_name(path, name)!r}: {problem}")
            else:
                found.append((slot, mask))
    raise_all(f"these masks do not fit the model ({type(model).__name__})", problems)
    return found


def _slot(modules: Mapping[str, nn.Module], path: str, name: str) -> Slot:
    """The slot of ``path``.``name``; the raw name of a parameter under our mask is its owner's."""
    module = modules[path]
    if name == "original" and isinstance(module, parametrize.ParametrizationList):
        owner_path, _, tensor_name = path.rpartition(".parametrizations.")
        if not owner_path and not tensor_name:
            owner_path, tensor_name = "", path.removeprefix("parametrizations.")
        owner = modules[owner_path]
        if mask_on(owner, tensor_name) is not None:
            return Slot(owner_path, owner, tensor_name)
    return Slot(path, module, name)


def _slot_problem(slot: Slot, mask: Tensor) -> str:
    """Why this mask cannot be put here; empty if it can."""
    parameter = raw_parameter(slot.module, slot.name)
    kind = type(slot.module).__name__
    if parameter is None:
        if parametrize.is_parametrized(slot.module, slot.name):
            parts = parts_of(slot.module, slot.name)
            raw = [name for name, _ in parts.named_parameters(recurse=False)]
            where = full_name(slot.path, f"parametrizations.{slot.name}")
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
    plain = slot.name.removesuffix("_orig")
    if plain != slot.name and pruning_hook(slot.module, plain) is not None:
        return f"torch.nn.utils.prune keeps {plain!r} under this name; mask it as {plain!r}"
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
    yield from masks_on(module)


def by_parameter(
    found: list[tuple[Slot, Tensor]],
) -> dict[int, tuple[Tensor, set[tuple[int, str]]]]:
    """Per parameter object (by id): the and of its masks, and the slots that were named."""
    wanted: dict[int, tuple[Tensor, set[tuple[int, str]]]] = {}
    problems: list[str] = []
    for slot, mask in found:
        parameter = slot.parameter
        if parameter.is_meta:
            problems.append(
                f"{full_name(slot.path, slot.name)!r}: the parameter is on the meta device, "
                "where a mask has no values; move the model to a real device first"
            )
            continue
        before, named = wanted.get(id(parameter), (None, set()))
        named.add((id(slot.module), slot.name))
        together = mask if before is None else before & mask.to(before.device)
        wanted[id(parameter)] = (together, named)
    raise_all("these masks cannot be applied", problems)
    return wanted


def parameter_slots(model: nn.Module) -> Iterator[Slot]:
    """The first slot of each parameter object, by its plain name, under masks or not."""
    for slots in owners(model).values():
        slot = slots[0]
        plain = slot.name.removesuffix("_orig")
        pruned = plain != slot.name and pruning_hook(slot.module, plain) is not None
        yield Slot(slot.path, slot.module, plain) if pruned else slot


def owners(model: nn.Module) -> dict[int, list[Slot]]:
    """Every slot of each parameter object, by its id; a shared module counts once."""
    found: dict[int, list[Slot]] = {}
    for path, module in model.named_modules():
        for name in _parameter_names(module):
            # A ParametrizationList of ours is the inside of a slot, not one of its own.
            if not (isinstance(module, parametrize.ParametrizationList) and is_ours(module)):
                slot = Slot(path, module, name)
                found.setdefault(id(slot.parameter), []).append(slot)
    return found
