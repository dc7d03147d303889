"""Where a checkpoint's parts are: one safetensors file, or a folder with shards and a recipe."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.recipe import (
    FORMAT,
    FORMAT_VERSION,
    Recipe,
    digest,
    parse_json,
    parse_recipe,
    raise_problems,
)
from compress.checkpoint.weights import LARGEST_HEADER, Place, read_header, record_problems
from compress.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECIPE = "recipe.json"
_KEY = "compress"


@dataclass(frozen=True)
class Checkpoint:
    """A recipe and where its tensors are; the two are of each other, as far as headers tell."""

    where: str
    recipe: Recipe
    places: dict[str, Place]


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """What a checkpoint says of itself: plans, tensors, versions, and the ``provenance`` given.

    Raises:
        CheckpointError: as `compress.load`.
    """
    return read_checkpoint(path).recipe


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The recipe and places of a file of `compress.save`, or a folder of `shrink_checkpoint`.

    Raises:
        CheckpointError: it is neither, or its parts are not of each other.
    """
    where, target = os.fspath(path), Path(path)
    if target.is_dir() and (target / RECIPE).exists():
        recipe = _recipe_of_folder(target / RECIPE)
        places, _ = read_weights(target)
    else:
        places, metadata = read_weights(target)
        recipe = _recipe_of_file(where, metadata)
    raise_problems(f"{where}: weights and recipe differ", record_problems(places, recipe.tensors))
    unknown = [name for name in recipe.masks if name not in recipe.tensors]
    raise_problems(f"{where}: no such masks", unknown)
    return Checkpoint(where, recipe, places)


def read_weights(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """All tensors of a safetensors file, or of a folder with one or with shards and their index.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    if not path.is_dir():
        return read_header(path)
    if not (path / INDEX).exists():
        return read_header(path / WEIGHTS)
    shards = _shards(path / INDEX)
    headers = {shard: read_header(path / shard)[0] for shard in dict.fromkeys(shards.values())}
    problems = [
        f"{name}: it is not in {shard}"
        for name, shard in shards.items()
        if name not in headers[shard]
    ]
    raise_problems(f"{path / INDEX}: not what the shards hold", problems)
    return {name: headers[shard][name] for name, shard in shards.items()}, {}


def recipe_metadata(text: str) -> dict[str, str]:
    """`recipe_text` for the header of a safetensors file; other libraries ask for "pt"."""
    return {"format": "pt", _KEY: json.dumps(_envelope_of(text)), f"{_KEY}.recipe": text}


def recipe_json(text: str) -> str:
    """`recipe_text` for a file of its own."""
    return json.dumps({**_envelope_of(text), "recipe": json.loads(text)})


def _envelope_of(text: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": FORMAT_VERSION, "sha256": digest(text)}


def _recipe_of_file(where: str, metadata: dict[str, str]) -> Recipe:
    if _KEY not in metadata or f"{_KEY}.recipe" not in metadata:
        raise CheckpointError(
            f"{where}: these weights have no recipe; expected a file written by compress.save "
            "(plain weights are for the model's load_state_dict)"
        )
    envelope = _envelope(where, parse_json(where, metadata[_KEY]))
    text = metadata[f"{_KEY}.recipe"]
    return parse_recipe(where, text, envelope.get("version"), envelope.get("sha256"))


def _recipe_of_folder(file: Path) -> Recipe:
    envelope = _envelope(str(file), _small_json(file))
    text = json.dumps(envelope.get("recipe"))
    return parse_recipe(str(file), text, envelope.get("version"), envelope.get("sha256"))


def _envelope(where: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{where}: no recipe of compress; expected one that it has written")
    return data


def _small_json(file: Path) -> Any:
    try:
        if file.stat().st_size > LARGEST_HEADER:
            raise CheckpointError(f"{file}: larger than {LARGEST_HEADER:,} bytes")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: it cannot be read ({error})") from error
    return parse_json(str(file), text)


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> file name, which must be one of the same folder."""
    data = _small_json(index)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict):
        raise CheckpointError(f"{index}: expected a dict with a weight_map")
    wrong = [
        f"{name}: {shard!r} is not the name of a safetensors file"
        for name, shard in shards.items()
        if not isinstance(shard, str)
        or not shard.endswith(".safetensors")
        or any(part in shard for part in ("/", "\\", "\0", ":"))
    ]
    raise_problems(f"{index}: expected files of the same folder", wrong)
    return shards
