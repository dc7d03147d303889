"""Let the config of a transformers model say the sizes of the small one, where it can.

``from_pretrained`` builds a model of its config alone. Which numbers of the config make which
sizes is found by building the class with other numbers, never by their names.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import prod
from typing import Any

from torch import nn

from compress.checkpoint.building import build_light, build_whole, fill
from compress.checkpoint.fitting import persistent_names
from compress.errors import CheckpointError
from compress.graph.walk import leaves_of
from compress.masks import applied_masks
from compress.speedup.compare import verify

Field = tuple[str, ...]  # attributes, from the config to a number in it or in a config of its own
Axis = tuple[str, int]  # a parameter and one of its axes
_MOST_CHOICES = 100_000


def update_config(model: nn.Module, dummy_input: Any) -> dict[str, tuple[int, int]]:
    """Set the numbers of ``model.config`` to the sizes of a small transformers model.

    After it ``model.save_pretrained(folder)`` writes what ``from_pretrained(folder)`` reads: a
    model built of the config computes the same with these weights, which is checked on inputs like
    ``dummy_input``. A config has one number for all layers, so that it works where they have kept
    equally many (hidden units, heads), and where no attribute beside it was set by the speedup.

    Args:
        model: the small model, without masks.
        dummy_input: as for `ModelSpeedup`.

    Returns:
        The numbers that were changed: ``{"intermediate_size": (128, 64)}``.

    Raises:
        CheckpointError: no numbers of the config give this model; the config is as it was.
            `compress.save` keeps any small model.
    """
    _check(model)
    shapes = _shapes(model)
    dense = _shapes(_built(model, {}))
    ratios = _ratios(dense, shapes)
    if ratios is None:
        raise _impossible(model, "it has other parameters than its class makes of the config")
    wanted = {axis: ratio for axis, ratio in ratios.items() if ratio != 1}
    if not wanted:
        return {}
    effects = dict(_effects(model, dense, set(wanted.values())))
    for change in _choices(effects, ratios):
        built = _build(model, change)
        if built is not None and _shapes(built) == shapes and _same(built, model, dummy_input):
            return _set(model, change, built, dummy_input)
    axis, ratio = next(iter(wanted.items()))
    raise _impossible(model, f"no numbers of it leave {ratio} of axis {axis[1]} of {axis[0]}")


def _check(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        raise CheckpointError(
            f"update_config: got a {type(model).__name__}, which has no config of transformers; "
            "keep it with compress.save"
        )
    if applied_masks(model):
        raise CheckpointError(
            "update_config: masks are on the model; write them into the weights first "
            "(compress.masks.remove_masks(model))"
        )


def _impossible(model: nn.Module, why: str) -> CheckpointError:
    return CheckpointError(
        f"update_config: no config of {type(model).__name__} says what this model is ({why}): "
        "layers keep different numbers, perhaps, or sizes that the class takes from others; keep "
        "it with compress.save, which takes any, or prune with equal numbers in each layer"
    )


# -- building ------------------------------------------------------------------------------


def _built(model: nn.Module, change: Mapping[Field, int]) -> nn.Module:
    """A model of the same class and a changed config; without weights where that is possible."""

    def build() -> nn.Module:
        config = copy.deepcopy(model.config)
        _put(config, change)
        return type(model)(config)

    return build_light(build) or build_whole(build)


def _build(model: nn.Module, change: Mapping[Field, int]) -> nn.Module | None:
    """The same; None where the class does not take such numbers."""
    try:
        return _built(model, change)
    except Exception:  # whatever the class raises
        return None


def _put(config: Any, change: Mapping[Field, int]) -> None:
    for field, value in change.items():
        owner = config
        for name in field[:-1]:
            owner = getattr(owner, name)
        setattr(owner, field[-1], value)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(t.shape) for path, t, kind in leaves_of(model) if kind == "parameter"}


def _ratios(
    dense: Mapping[str, tuple[int, ...]], small: Mapping[str, tuple[int, ...]]
) -> dict[Axis, Fraction] | None:
    """How much is left of each axis; None where the parameters are not the same ones."""
    if dense.keys() != small.keys() or any(len(dense[n]) != len(small[n]) for n in dense):
        return None
    return {
        (name, axis): Fraction(after, before) if before else Fraction(1)
        for name in dense
        for axis, (before, after) in enumerate(zip(dense[name], small[name], strict=True))
    }


# -- which numbers -------------------------------------------------------------------------


def _fields(config: Any, within: Field = ()) -> Iterator[tuple[Field, int]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield (*within, name), value
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _fields(value, (*within, name))


Effects = Mapping[tuple[Field, int], Mapping[Axis, Fraction]]


def _effects(
    model: nn.Module, dense: Mapping[str, tuple[int, ...]], wanted: set[Fraction]
) -> Iterator[tuple[tuple[Field, int], dict[Axis, Fraction]]]:
    """What each number alone does to the sizes, for each value that it could take."""
    for field, value in _fields(model.config):
        for ratio in wanted:
            new = value * ratio
            built = _build(model, {field: int(new)}) if new.denominator == 1 else None
            found = None if built is None else _ratios(dense, _shapes(built))
            changed = {axis: r for axis, r in (found or {}).items() if r != 1}
            if changed:
                yield (field, int(new)), changed


def _choices(effects: Effects, ratios: Mapping[Axis, Fraction]) -> list[dict[Field, int]]:
    """The changes that together give the sizes, those of few numbers first."""
    options: dict[Field, list[int | None]] = {}
    for field, new in effects:
        options.setdefault(field, [None]).append(new)
    if prod(len(values) for values in options.values()) > _MOST_CHOICES:
        return []
    found = []
    for values in itertools.product(*options.values()):
        pairs = zip(options, values, strict=True)
        change = {field: value for field, value in pairs if value is not None}
        total: dict[Axis, Fraction] = {}
        for pair in change.items():
            for axis, ratio in effects[pair].items():
                total[axis] = total.get(axis, Fraction(1)) * ratio
        if all(total.get(axis, 1) == ratio for axis, ratio in ratios.items()):
            found.append(change)
    return sorted(found, key=len)


# -- do they compute the same --------------------------------------------------------------


def _same(built: nn.Module, model: nn.Module, dummy_input: Any) -> bool:
    """Whether a model of the config computes what the small one does, with its weights."""
    kept = persistent_names(model)
    values = {path: t.detach() for path, t, _ in leaves_of(model) if path in kept}
    if {path for path, _, _ in leaves_of(built)} < values.keys():
        return False
    fill(built, values)
    return verify(built, model, dummy_input).same


def _set(
    model: nn.Module, change: Mapping[Field, int], built: nn.Module, dummy_input: Any
) -> dict[str, tuple[int, int]]:
    """Change the config of the small model itself, whose code may read it while it runs."""
    before = {field: value for field, value in _fields(model.config) if field in change}
    _put(model.config, change)
    if not verify(model, built, dummy_input).same:
        _put(model.config, before)
        raise _impossible(model, "its code reads numbers of the config while it runs")
    return {".".join(field): (before[field], new) for field, new in change.items()}
