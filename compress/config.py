"""config_list → `Targets`: the only reader of the dicts that users write.

A config_list is a list of dicts. Each has one sparsity (or ``exclude: True``) and at least one
selector:

| key | meaning |
|---|---|
| ``sparsity``, ``sparsity_per_layer`` | the same: fraction to mask in every layer, in [0, 1) |
| ``total_sparsity`` | fraction of the weights of all the selected layers together, in [0, 1) |
| ``max_sparsity_per_layer`` | with ``total_sparsity``: the most that a layer may lose; see below |
| ``exclude`` | True: the selected layers are not pruned; False says nothing |
| ``op_types`` | class names, subclasses match; ``"default"``: all types that the pruner supports,
but for those that it prunes only where they are named (`Pruner.optional_types`) |
| ``op_names`` | module paths, whole |
| ``op_partial_names`` | parts of module paths |
| ``op_names_re`` | regular expressions, found anywhere in the path (``re.search``) |

``max_sparsity_per_layer`` is a number in [0, 1] or ``{layer name: number}``. One regular expression
may be given as a plain string.

Within one selector a layer has to match any of the values; several selectors must all match, as in
NNI. A layer takes the **last** entry that matches it, and is not pruned if that one excludes it.
The list is read, never changed.

A module of several weights has several layers, which go by the paths of their (first) weights:
``lstm.weight_ih_l0``, ``attention.in_proj_weight``. What matches the module matches all of them.

A sparsity below 1 cannot empty a layer, since ``floor(sparsity · units)`` units go. A
``total_sparsity`` that the limits of the layers do not allow is refused by `compress.allocate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from compress.config_entry import SELECTORS, Entry, parse, short
from compress.errors import ConfigError, closest
from compress.masks import raw_parameter

DEFAULT = "default"
WEIGHT = ("weight",)  # what most layers have


@dataclass(frozen=True)
class Target:
    """One layer to prune.

    Attributes:
        name: module path, the first where a module has several; where the module has several
            weights, the path of the first in ``weights``.
        sparsity: fraction of its units; None where ``group`` decides.
        group: index into `Targets.groups`, or None.
        max_sparsity: the most that it may lose under ``total_sparsity``.
        tied: other selected layers with the same weight, which take the same mask.
        entry: index of the entry in the config_list.
        weights: names of its parameters in the module.
    """

    name: str
    sparsity: float | None
    group: int | None = None
    max_sparsity: float = 1.0
    tied: tuple[str, ...] = ()
    entry: int = field(default=0, compare=False)
    weights: tuple[str, ...] = WEIGHT

    @property
    def modules(self) -> tuple[str, ...]:
        """The module path of the layer, and those of the layers that are tied to it."""
        return tuple(self._module(name) for name in (self.name, *self.tied))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths of the layer's own weights."""
        module = self.modules[0]
        return tuple(f"{module}.{name}" if module else name for name in self.weights)

    def _module(self, name: str) -> str:
        return name if self.weights == WEIGHT else name.rpartition(".")[0]


@dataclass(frozen=True)
class TotalGroup:
    """Layers that share a ``total_sparsity``.

    Attributes:
        entry: index of the entry in the config_list.
        sparsity: fraction of the weights of all layers together.
        layers: names of its targets, in model order.
    """

    entry: int
    sparsity: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Targets:
    """What a config_list asks for: the layers in model order, and the groups under one sparsity."""

    layers: tuple[Target, ...]
    groups: tuple[TotalGroup, ...] = ()

    def __iter__(self) -> Iterator[Target]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def resolve(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    supported_types: tuple[type[nn.Module], ...],
    *,
    optional_types: tuple[type[nn.Module], ...] = (),
    unit_axis: Callable[[nn.Module], int] = lambda module: 0,
    weights: Callable[[nn.Module], Sequence[tuple[str, ...]]] = lambda module: (WEIGHT,),
    pruner: str = "this pruner",
    granularity: str = "weights",
    entry_type: type[Entry] = Entry,
) -> Targets:
    """The layers of ``model`` that ``config_list`` selects, with their sparsities.

    Args:
        model: read only.
        config_list: see the module.
        supported_types: what the pruner can prune, subclasses included; ``"default"``.
        optional_types: what it prunes besides where an entry names the type or the layer itself.
        unit_axis: the axis of a layer's weight that its units lie along. Layers that share a weight
            are one target where they share the axis, too.
        weights: the names of the weights of each layer that a supported module has.
        pruner: its name, for messages.
        granularity: what it masks, for messages: "whole filters".
        entry_type: what an entry may say.

    Raises:
        ConfigError: lists every problem, with the entry's index, what it got and what it expected.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise ConfigError(
            f"config_list: got {short(config_list)}; expected a list of dicts with at least one, "
            'such as [{"sparsity": 0.5, "op_types": ["default"]}]'
        )
    every = supported_types + optional_types
    ability = f"{pruner} masks {granularity} of {_types(every)}"
    book = _Book(model, every, optional_types, unit_axis, weights, ability)
    problems: list[str] = []
    chosen: dict[str, tuple[int, Entry]] = {}
    for index, raw in enumerate(config_list):
        where = f"config_list[{index}]"
        entry = parse(where, raw, problems, entry_type)
        if entry is not None:
            chosen |= dict.fromkeys(book.select(where, entry, problems), (index, entry))
    targets = Targets(())
    if not problems:
        targets = _targets(book, chosen, problems)
    if problems:
        raise ConfigError("this config_list cannot be carried out:", problems)
    return targets


# ---------------------------------------------------------------------------------------------
# An entry against a model


class _Book:
    """The modules of a model by path and by type, as config_lists name them."""

    def __init__(
        self,
        model: nn.Module,
        supported: tuple[type[nn.Module], ...],
        optional: tuple[type[nn.Module], ...],
        unit_axis: Callable[[nn.Module], int],
        weights: Callable[[nn.Module], Sequence[tuple[str, ...]]],
        ability: str,
    ) -> None:
        self.supported = supported
        self.optional = optional
        self.unit_axis = unit_axis
        self.ability = ability
        self.modules: dict[str, nn.Module] = {}
        self.paths: dict[str, tuple[str, ...]] = {}
        first: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" in path.split("."):
                continue  # the inside of a parametrised parameter, ours or torch's, is no layer
            name = first.setdefault(id(module), path)
            self.modules[name] = module
            self.paths[name] = (*self.paths.get(name, ()), path)
        self.weights: dict[str, tuple[str, ...]] = {}  # of each layer
        self.layers = {n: self._layers(n, m, weights) for n, m in self.modules.items()}
        self.modules = {
            each: module
            for name, module in self.modules.items()
            for each in dict.fromkeys((name, *self.layers[name]))
        }
        self.owner = {layer: name for name, layers in self.layers.items() for layer in layers}
        self.paths = {n: self.paths.get(n, (n,)) for n in self.modules}
        self.names = {path: name for name, paths in self.paths.items() for path in paths}
        self.types = {
            name: {cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
            for name, module in self.modules.items()
        }

    def _layers(
        self,
        name: str,
        module: nn.Module,
        weights: Callable[[nn.Module], Sequence[tuple[str, ...]]],
    ) -> tuple[str, ...]:
        """The layers of a module: itself, or names of their own."""
        if not isinstance(module, self.supported):
            return (name,)
        named = {
            name if names == WEIGHT else f"{name}.{names[0]}".removeprefix("."): names
            for names in weights(module)
        }
        self.weights |= named
        return tuple(named)

    def prunable(self, name: str) -> bool:
        return isinstance(self.modules[name], self.supported)

    def by_default(self, name: str) -> bool:
        return self.prunable(name) and not isinstance(self.modules[name], self.optional)

    def units_of(self, name: str) -> tuple[object, ...]:
        """What layers have in common that have the same units: weights, their names and axis."""
        module, names = self.modules[name], self.weights[name]
        return (
            *(id(raw_parameter(module, each)) for each in names),
            *names,
            self.unit_axis(module),
        )

    def kind(self, name: str) -> str:
        """The class name that the user knows the module by."""
        return parametrize.type_before_parametrizations(self.modules[name]).__name__

    def select(self, where: str, entry: Entry, problems: list[str]) -> list[str]:
        """The layers that one entry is about, in model order."""
        matches: dict[str, set[str]] = {}
        asked: set[str] = set()  # by type or by name
        before = len(problems)
        for key in SELECTORS:
            values = getattr(entry, key)
            if values is None:
                continue
            matches[key] = set()
            for value in values:
                found, problem = self._match(key, value)
                if not problem and not entry.exclude and key in ("op_types", "op_names"):
                    problem = self._refusal(found, by_name=key == "op_names")
                if problem:
                    problems.append(f"{where}[{key!r}]: got {value!r}; {problem}")
                matches[key] |= found
                if key == "op_names" or (key == "op_types" and value != DEFAULT):
                    asked |= found
        if len(problems) > before:
            return []
        both = set.intersection(*matches.values())
        selected = [name for name in self.modules if name in both]
        every = asked if not entry.exclude else set(selected)
        layers = [n for n in selected if self.by_default(n) or (n in every and self.prunable(n))]
        problem = self._emptiness(entry, matches, selected, layers)
        if problem:
            problems.append(f"{where}: {problem}")
            return []
        layers = list(dict.fromkeys(x for name in layers for x in self.layers.get(name, (name,))))
        problems.extend(self._wrong_limits(where, entry, layers))
        return layers

    def _match(self, key: str, value: str) -> tuple[set[str], str]:
        """The modules that one value of a selector matches, and what is wrong with it."""
        if key == "op_types":
            if value == DEFAULT:
                found = {name for name in self.modules if self.by_default(name)}
                nothing = f"the model has no layer for it: {self.ability}{self._others()}"
            else:
                found = {name for name, types in self.types.items() if value in types}
                kinds = {kind for types in self.types.values() for kind in types}
                nothing = f"the model has no module of this type{closest(value, kinds)}"
        elif key == "op_names":
            found = {self.names[value]} if value in self.names else set()
            nothing = f"the model has no module of this name{closest(value, self.names)}"
        else:
            try:
                pattern = re.compile(value if key == "op_names_re" else re.escape(value))
            except re.error as error:
                return set(), f"it is no regular expression: {error}"
            found = {self.names[path] for path in self.names if pattern.search(path)}
            nothing = f"no module name of the model matches{closest(value, self.names)}"
        return found, "" if found else nothing

    def _others(self) -> str:
        """What of the model ``"default"`` leaves out, for a message."""
        named = [n for n in self.layers if self.prunable(n) and not self.by_default(n)]
        if not named:
            return ""
        return (
            f'; it leaves out {self.described(named[0])}: add "{self.kind(named[0])}" to op_types'
        )

    def _refusal(self, found: set[str], by_name: bool) -> str:
        """Why the pruner cannot prune what was asked for by name or type; empty if it can."""
        if any(self.prunable(name) for name in found):
            return ""
        named = [self.described(name) for name in self.layers if name in found]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        hint = ""
        if by_name and any(True for name in found for _ in self.modules[name].children()):
            prefix = f"{next(iter(found))}."
            hint = f'; for the layers inside, use "op_partial_names": ["{prefix}"]'
        return f"{self.ability}; {', '.join(named[:3])}{more} has none{hint}"

    def _emptiness(
        self,
        entry: Entry,
        matches: Mapping[str, set[str]],
        selected: list[str],
        layers: list[str],
    ) -> str:
        """Why an entry selects nothing; empty if it selects something."""
        counts = " and ".join(
            f"{key} ({len({self.owner.get(name, name) for name in found})} modules)"
            for key, found in matches.items()
        )
        if not selected:
            return f"it selects no layer: no module matches all of {counts}"
        if entry.exclude:
            # To exclude a layer that is never pruned is fine; to exclude a container is a mistake.
            if all(self._is_container(name) for name in selected):
                return (
                    f"it excludes no layer, only {self.described(selected[0])}, which holds "
                    f'others; for the layers inside, use "op_partial_names": ["{selected[0]}."]'
                )
            return ""
        if not layers:
            named = ", ".join(self.described(name) for name in selected[:3])
            return f"it selects no layer that can be pruned ({named}): {self.ability}"
        return ""

    def _is_container(self, name: str) -> bool:
        module = self.modules[name]
        has_parts = any(not isinstance(part, nn.ModuleDict) for part in module.children())
        return has_parts and not self.prunable(name) and not any(module.parameters(recurse=False))

    def _wrong_limits(self, where: str, entry: Entry, layers: list[str]) -> list[str]:
        limits = entry.max_sparsity_per_layer
        if not isinstance(limits, dict):
            return []
        return [
            f"{where}['max_sparsity_per_layer']: got {name!r}, which is no layer of this entry"
            f"{closest(name, layers)}"
            for name in limits
            if not set(self._layers_at(name)) & set(layers)
        ]

    def _layers_at(self, path: str) -> tuple[str, ...]:
        """The layers that a path means: that of a layer, or of a module with several."""
        name = self.names.get(path)
        return () if name is None else self.layers.get(name, (name,))

    def described(self, name: str) -> str:
        """``Conv2d 'layer1.conv1'``, for messages."""
        return f"{self.kind(name)} {name!r}"

    def weight_problem(self, name: str) -> str:
        """Why the weight of a supported layer cannot be pruned now; empty if it can."""
        module = self.modules[name]
        found = (_problem_of(module, weight) for weight in self.weights[name])
        return next((problem for problem in found if problem), "")


def _problem_of(module: nn.Module, name: str) -> str:
    """Why a parameter cannot be pruned now; empty if it can."""
    weight = raw_parameter(module, name)
    if weight is None and getattr(module, name, module) is None:
        return "it has no weight (affine=False); exclude it"
    if weight is None:
        return (
            "its weight is computed from other parameters (weight_norm or another "
            "parametrization); remove that first (torch.nn.utils.parametrize."
            "remove_parametrizations), or exclude the layer"
        )
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet; run the model once on a batch first"
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load the weights first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; expected a floating-point one, or exclude it"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}; exclude it"
    return ""


# ---------------------------------------------------------------------------------------------
# All entries together


def _targets(book: _Book, chosen: Mapping[str, tuple[int, Entry]], problems: list[str]) -> Targets:
    """Targets of the entries that won, or problems."""
    pruned = {name: chosen[name] for name in book.modules if name in chosen}
    excluded = [name for name, (_, entry) in pruned.items() if entry.exclude]
    pruned = {name: pair for name, pair in pruned.items() if not pair[1].exclude}
    if not pruned:
        problems.append("it selects no layer: every one that it selects is excluded again")
    for name in pruned:
        problem = book.weight_problem(name)
        if problem:
            problems.append(f"{book.described(name)}: {problem}")
    if problems:
        return Targets(())
    entries = dict.fromkeys(
        index for index, entry in pruned.values() if entry.total_sparsity is not None
    )
    groups = {entry: number for number, entry in enumerate(sorted(entries))}
    layers: dict[tuple[object, ...], Target] = {}
    for name, (index, entry) in pruned.items():
        key = book.units_of(name)
        target = _target(name, book, index, entry, groups)
        if key not in layers:
            layers[key] = target
        elif replace(target, name=layers[key].name) == replace(layers[key], tied=()):
            layers[key] = replace(layers[key], tied=(*layers[key].tied, name))
        else:
            problems.append(
                f"{book.described(name)} has the same weight as {layers[key].name!r}, but another "
                "sparsity; select them in one entry"
            )
    for name in excluded:
        key = book.units_of(name)
        if key in layers:
            problems.append(
                f"{book.described(name)} is excluded, but has the same weight as "
                f"{layers[key].name!r}, which is not; exclude both or none"
            )
    return _grouped(tuple(layers.values()), groups, pruned)


def _target(name: str, book: _Book, index: int, entry: Entry, groups: Mapping[int, int]) -> Target:
    if entry.total_sparsity is None:
        (sparsity,) = entry.sparsities().values()
        return Target(name, sparsity, entry=index, weights=book.weights[name])
    # Limits may name the module by any of its paths.
    paths = {*book.paths[name], *book.paths[book.owner[name]]}
    limit = min(entry.limit(path) for path in paths)
    return Target(name, None, groups[index], limit, entry=index, weights=book.weights[name])


def _grouped(
    layers: tuple[Target, ...],
    groups: Mapping[int, int],
    pruned: Mapping[str, tuple[int, Entry]],
) -> Targets:
    entries = dict(pruned.values())
    return Targets(
        layers,
        tuple(
            TotalGroup(
                index,
                entries[index].total_sparsity or 0.0,
                tuple(target.name for target in layers if target.group == number),
            )
            for index, number in groups.items()
        ),
    )


def _types(supported: tuple[type[nn.Module], ...]) -> str:
    return ", ".join(cls.__name__ for cls in supported)
