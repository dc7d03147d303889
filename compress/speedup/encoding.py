"""Plans as JSON values, and back: their structure, without the values that constants have.

Whoever carries out such a plan has the values already: the small model's weights are beside it.
What is read is checked for types and ranges only; whether it fits a model is for the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from compress.speedup.plan import Attribute, Plan, Replacement, Slice

PlanData = dict[str, Any]
_LARGEST = 2**48  # no axis is longer, and numpy's integers hold it


class Strict(BaseModel):
    """What is read from a file: no other keys, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _decoded(value: Any) -> Any:
    """An attribute's value: numbers, strings, None, lists; a tuple is ``{"tuple": [...]}``."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        if list(value) != ["tuple"] or not isinstance(value["tuple"], list):
            raise ValueError("expected a number, a string, null, a list or {'tuple': [...]}")
        return tuple(_decoded(each) for each in value["tuple"])
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError("expected a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"expected a number up to {_LARGEST}")
    return value


def _encoded(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_encoded(each) for each in value]}
    if isinstance(value, list):
        return [_encoded(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Value = Annotated[Any, AfterValidator(_decoded)]


class _Gather(Strict):
    axis: Count
    positions: list[list[Count]]

    @model_validator(mode="after")
    def _is_rectangular(self) -> _Gather:
        if len({len(row) for row in self.positions}) != 1:
            raise ValueError("positions: the rows are not of one length")
        return self


class _Slice(Strict):
    keep: list[Count | None]
    gather: _Gather | None = None


class _NewBias(Strict):
    weight: str
    size: Count


class _Attribute(Strict):
    module: str
    name: str
    old: Value
    new: Value


class _Replacement(Strict):
    module: str
    kind: str
    state: dict[str, bool | int | float]


class _Plan(Strict):
    """``indices`` are the kept positions; several axes may keep the same ones."""

    shapes: dict[str, list[Count]]
    indices: list[list[Count]]
    slices: dict[str, _Slice]
    new_biases: dict[str, _NewBias]
    attributes: list[_Attribute]
    replacements: list[_Replacement]


def encode_plan(plan: Plan) -> PlanData:
    """The structure of a plan: slices, new biases with their sizes, attributes, replacements."""
    table, slices = _encoded_slices(plan.slices)
    return {
        "shapes": {path: list(shape) for path, shape in plan.shapes.items()},
        "indices": table,
        "slices": slices,
        "new_biases": {
            path: {"weight": weight, "size": len(plan.biases[path])}
            for path, weight in plan.new_biases.items()
        },
        "attributes": [
            {
                "module": each.module,
                "name": each.name,
                "old": _encoded(each.old),
                "new": _encoded(each.new),
            }
            for each in plan.attributes
        ],
        "replacements": [
            {"module": each.module, "kind": each.kind, "state": dict(each.state)}
            for each in plan.replacements
        ],
    }


def _encoded_slices(cuts: Mapping[str, Slice]) -> tuple[list[list[int]], dict[str, Any]]:
    """All kept positions, each once, and the slices with their numbers among them."""
    numbers: dict[bytes, int] = {}
    table: list[list[int]] = []

    def number(keep: np.ndarray | None) -> int | None:
        if keep is None:
            return None
        key = keep.tobytes()
        if key not in numbers:
            numbers[key] = len(table)
            table.append(keep.tolist())
        return numbers[key]

    slices: dict[str, Any] = {}
    for path, cut in cuts.items():
        slices[path] = {"keep": [number(keep) for keep in cut.keep]}
        if cut.gather is not None:
            axis, positions = cut.gather
            slices[path]["gather"] = {"axis": axis, "positions": positions.tolist()}
    return table, slices


def decode_plan(data: Any) -> Plan:
    """The plan of `encode_plan`; the biases that it makes are 0.

    Raises:
        ValueError: says which value is of which wrong type.
    """
    read = _Plan.model_validate(data)
    table = [np.asarray(each, dtype=np.int64) for each in read.indices]
    return Plan(
        slices={path: _slice(path, each, table) for path, each in read.slices.items()},
        # Of one number: a file may name any size, and only a model tells whether it is right.
        biases={
            path: np.lib.stride_tricks.as_strided(np.zeros(1), (each.size,), (0,))
            for path, each in read.new_biases.items()
        },
        new_biases={path: each.weight for path, each in read.new_biases.items()},
        attributes=[Attribute(a.module, a.name, a.old, a.new) for a in read.attributes],
        replacements=[Replacement(r.module, r.kind, r.state) for r in read.replacements],
        shapes={path: tuple(shape) for path, shape in read.shapes.items()},
    )


def _slice(path: str, read: _Slice, table: list[np.ndarray]) -> Slice:
    wrong = [n for n in read.keep if n is not None and n >= len(table)]
    if wrong:
        raise ValueError(f"slices.{path}: there are no indices of number {wrong[0]}")
    keep = tuple(None if n is None else table[n] for n in read.keep)
    if read.gather is None:
        return Slice(keep)
    return Slice(keep, (read.gather.axis, np.asarray(read.gather.positions, dtype=np.int64)))


def below(data: PlanData, path: str) -> PlanData:
    """A plan of a module as one of a model that has it at ``path``."""
    return _renamed(data, lambda name: f"{path}.{name}" if name else path)


def within(data: PlanData, path: str) -> PlanData:
    """The opposite of `below`: a plan as one of the module that all of it is in."""
    return _renamed(data, lambda name: name.removeprefix(path).removeprefix("."))


def names_in(data: PlanData) -> list[str]:
    """The parameters and modules that a plan changes."""
    parts = (data["shapes"], data["slices"], data["new_biases"])
    found = [name for part in parts for name in part]
    modules = [each["module"] for kind in ("attributes", "replacements") for each in data[kind]]
    return found + [f"{module}." for module in modules]


def _renamed(data: PlanData, rename: Callable[[str], str]) -> PlanData:
    return {
        **data,
        "shapes": {rename(name): each for name, each in data["shapes"].items()},
        "slices": {rename(name): each for name, each in data["slices"].items()},
        "new_biases": {
            rename(name): {**each, "weight": rename(each["weight"])}
            for name, each in data["new_biases"].items()
        },
        **{
            kind: [{**each, "module": rename(each["module"])} for each in data[kind]]
            for kind in ("attributes", "replacements")
        },
    }
