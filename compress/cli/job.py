"""The file that says what to prune and how, checked whole before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from compress.cli.pruner_names import PRUNERS, entry_problems, parameters_of
from compress.config_entry import short
from compress.errors import ConfigError, closest

REFERENCE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
_Reference = Annotated[str, Field(pattern=REFERENCE)]
_Size = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Factory(_Strict):
    """What makes the model: a function or a class, and what it is called with."""

    factory: Annotated[
        _Reference, Field(description="module:function, as in my_package.nets:small")
    ]
    args: Annotated[list[Any], Field(description="a list of arguments")] = []
    kwargs: Annotated[dict[str, Any], Field(description="a dict of keyword arguments")] = {}


class TensorSpec(_Strict):
    """One input; whole numbers and bools are drawn below ``high``, floats from a normal."""

    shape: Annotated[list[_Size], Field(description="a list of sizes, such as [1, 3, 224, 224]")]
    dtype: Annotated[str, Field(pattern="|".join(f"^{d}$" for d in DTYPES))] = Field(
        default="float32", description=f"one of {', '.join(DTYPES)}"
    )
    high: Annotated[int, Field(ge=1, description="a whole number ≥ 1")] = 2


class Inputs(_Strict):
    """What the model is called with."""

    positional: list[TensorSpec] = []
    named: dict[str, TensorSpec] = {}


class PrunerSpec(_Strict):
    """A pruner by name; ``hooks`` are those of its arguments that are functions."""

    name: Annotated[str, Field(description=f"one of {', '.join(PRUNERS)}")]
    arguments: Annotated[dict[str, Any], Field(description="a dict {argument: value}")] = {}
    hooks: Annotated[
        dict[str, _Reference], Field(description="a dict {argument: module:function}")
    ] = {}


def _as_factory(value: object) -> object:
    return {"factory": value} if isinstance(value, str) else value


def _as_pruner(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _as_spec(value: object) -> object:
    sizes = isinstance(value, list) and all(type(size) is int for size in value)
    return {"shape": value} if sizes else value


def _as_inputs(value: object) -> object:
    if isinstance(value, Mapping) and "shape" not in value:
        return {"named": {name: _as_spec(each) for name, each in value.items()}}
    if isinstance(value, list) and value and not all(type(size) is int for size in value):
        return {"positional": [_as_spec(each) for each in value]}
    return {"positional": [_as_spec(value)]}


class SpeedupOptions(_Strict):
    """Arguments of `ModelSpeedup`."""

    constants: Annotated[
        str,
        Field(pattern="^(exact|fold|drop)$", description="one of exact, fold, drop"),
    ] = "exact"
    exact: Annotated[bool, Field(description="true or false")] = True
    verify: Annotated[bool, Field(description="true or false")] = True
    round_to: Annotated[_Size, Field(description="a whole number ≥ 1")] = 1
    min_channels: Annotated[_Size, Field(description="a whole number ≥ 1")] = 1


class Job(_Strict):
    """All that a command may need; what it does not get, it says."""

    model: Annotated[
        Factory | None,
        BeforeValidator(_as_factory),
        Field(description="module:function, or a dict with factory, args and kwargs"),
    ] = None
    weights: Annotated[str | None, Field(description="the path of a file of weights")] = None
    dummy_input: Annotated[
        Inputs | None,
        BeforeValidator(lambda value: None if value is None else _as_inputs(value)),
        Field(
            description="a shape such as [1, 3, 224, 224], a dict with shape, dtype and high, a "
            "list of these, or a dict {argument: one of these}"
        ),
    ] = None
    config_list: Annotated[
        list[dict[str, Any]] | None, Field(description="a list of dicts, as for a pruner")
    ] = None
    pruner: Annotated[
        PrunerSpec,
        BeforeValidator(_as_pruner),
        Field(description="a name, or a dict with name, arguments and hooks"),
    ] = PrunerSpec(name="L1FilterPruner")
    speedup: Annotated[SpeedupOptions, Field(description="a dict of options of ModelSpeedup")] = (
        SpeedupOptions()
    )
    evaluator: Annotated[
        _Reference | None,
        Field(description="module:function, which takes nothing and returns a compress.Evaluator"),
    ] = None
    train: Annotated[
        _Reference | None,
        Field(description="module:function, which takes the small model and trains it"),
    ] = None
    masks: Annotated[str | None, Field(description="the path of a file of masks")] = None
    small: Annotated[str | None, Field(description="the path of a file for the small model")] = None
    device: Annotated[str, Field(description="a device of torch, such as cpu or cuda")] = "cpu"
    seed: Annotated[int, Field(ge=0, description="a whole number ≥ 0")] = 0


def read_file(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file says, unchecked; raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: it cannot be read ({' '.join(str(error).split())}); expected a YAML or a "
            ".json file"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: got {short(content)}; expected a dict with model, dummy_input, config_list …"
        )
    return content


def parse_job(where: str, raw: Mapping[str, Any]) -> Job:
    """The job, or a ConfigError with every problem; nothing is imported or loaded."""
    try:
        job = Job.model_validate(dict(raw))
    except ValidationError as error:
        told = dict.fromkeys(_problem(dict(one)) for one in error.errors(include_url=False))
        raise ConfigError(f"{where} cannot be carried out:", list(told)) from error
    problems = _pruner_problems(job.pruner) + _file_problems(job)
    if not problems and job.config_list is not None:
        problems = entry_problems(job.pruner.name, job.config_list)
    if problems:
        raise ConfigError(f"{where} cannot be carried out:", problems)
    return job


def _pruner_problems(pruner: PrunerSpec) -> list[str]:
    if pruner.name not in PRUNERS:
        hint = closest(pruner.name, PRUNERS)
        return [f"pruner: got {pruner.name!r}; expected one of {', '.join(PRUNERS)}{hint}"]
    known = parameters_of(PRUNERS[pruner.name])
    return [
        f"pruner.{kind}: {pruner.name} has no argument {name!r}"
        f"{closest(name, known) or '; it has ' + ', '.join(known)}"
        for kind, given in (("arguments", pruner.arguments), ("hooks", pruner.hooks))
        for name in given
        if name not in known
    ]


def _file_problems(job: Job) -> list[str]:
    """One file for both: the second that is written would take the place of the first."""
    if job.masks is None or job.small is None:
        return []
    same = Path(job.masks).resolve() == Path(job.small).resolve()
    return [f"masks, small: got {job.small!r} for both; expected two files"] if same else []


def _problem(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in the words of all other messages."""
    place = [part for part in error["loc"] if part not in ("positional", "named")]
    where = ".".join(map(str, place))
    fields, expected = dict(Job.model_fields), ""
    for part in error["loc"]:
        field = fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue  # an index, or a key of the user's
        expected = field.description or expected
        fields = dict(_nested(field.annotation))
    if error["type"] == "extra_forbidden":
        inner = _siblings(error["loc"])
        hint = closest(str(place[-1]), inner) or f"; expected one of {', '.join(inner)}"
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: it is missing; expected {expected}"
    return f"{where}: got {short(error['input'])}; expected {expected}"


def _siblings(loc: tuple[Any, ...]) -> list[str]:
    """The keys that are known where an unknown one is."""
    fields = dict(Job.model_fields)
    for part in loc[:-1]:
        if part in fields:
            fields = dict(_nested(fields[part].annotation))
    return list(fields)


def _nested(annotation: Any) -> Mapping[str, Any]:
    """The fields of the model class somewhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    for part in getattr(annotation, "__args__", ()):
        if found := _nested(part):
            return found
    return {}
