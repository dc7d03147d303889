"""``compress.shrink_checkpoint``: cut the weights in files, a part of a tensor at a time.

The model need not fit into memory: the plan is made of it on the meta device, and some rows of a
tensor are read, cut and written at a time.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint.files import INDEX, RECIPE, WEIGHTS, read_weights, recipe_json
from compress.checkpoint.fitting import names_of, persistent_names
from compress.checkpoint.recipe import (
    Recipe,
    TensorRecord,
    check_provenance,
    raise_problems,
    recipe_text,
)
from compress.checkpoint.saving import versions
from compress.checkpoint.weights import (
    NAMES,
    Layout,
    Place,
    bytes_of,
    map_tensor,
    write_file,
)
from compress.errors import CheckpointError, closest
from compress.masks import Masks
from compress.progress import progress_bar
from compress.speedup import ModelSpeedup
from compress.speedup.encoding import encode_plan
from compress.speedup.plan import Plan, Slice
from compress.speedup.surgery import new_tensor

_PIECE = 32_000_000  # bytes of a tensor that are in memory at a time
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def shrink_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    plan: ModelSpeedup | Plan,
    *,
    masks: Masks | None = None,
    max_shard_size: int | str = "5GB",
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Shrink a checkpoint in files without ever having the model in memory.

    It needs memory for the masks and a part of one tensor; for a whole one where a grouped
    convolution is cut unevenly or constants move. `compress.load` takes the new folder.

    Args:
        source: a safetensors file, or a folder with ``model.safetensors`` or with shards and
            ``model.safetensors.index.json``. The names are those of the ``state_dict``; a tied
            tensor may be there under one of its names, or under all.
        target: a folder that does not exist yet, or is empty. It is there whole or not at all, with
            shards, their index, and ``recipe.json``.
        plan: the speedup of the model that the checkpoint is of, carried out or not; the model may
            have been built under ``torch.device("meta")`` (``to("meta")`` would untie parameters).
            Or its plan, which does not know ties, nor which buffers are in no checkpoint.
        masks: those that a plan was made of; a `ModelSpeedup` knows them. What they mask of a
            parameter that stays becomes 0.
        max_shard_size: of one file, in bytes or as in "5GB". A tensor is never divided.
        provenance: as for `compress.save`.
        progress: False is no progress bar.

    Raises:
        CheckpointError: the checkpoint is not that of the model; the plan moves constants whose
            values the meta device does not tell; the folder is there already or cannot be written.
            Nothing is left behind.
    """
    kept, limit = check_provenance(provenance), _bytes(max_shard_size)
    cut = _cut_of(plan, masks)
    _check_values(cut.plan)
    places, metadata = read_weights(Path(source))
    if "compress" in metadata:
        raise CheckpointError(
            f"{os.fspath(source)}: a small model that compress.save wrote; compress.load it, and "
            "shrink it in memory"
        )
    places = _without_doubles(places, cut.names)
    what = f"{os.fspath(source)} is not of the model that the plan is of"
    raise_problems(what, _problems(places, cut))
    folder = Path(target)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder}: it exists; pass a folder that does not, or is empty")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        _write(temporary, places, cut, limit, kept, progress)
        temporary.replace(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass
class _Cut:
    """What is done to which tensor, by first path.

    ``names``: every name of the model's tensors and its first one, ``needed``: what a checkpoint
    must have; both are empty where only a plan was given.
    """

    plan: Plan
    masks: Mapping[str, Tensor]
    model: str = "model"
    names: dict[str, str] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)

    def path(self, name: str) -> str:
        return self.names.get(name, name)

    @property
    def changed(self) -> set[str]:
        """Paths of tensors that are there before and other ones after."""
        plan = self.plan
        paths = {*plan.slices, *plan.biases, *plan.carries, *plan.scales, *self.masks}
        return paths - set(plan.new_biases)


def _cut_of(plan: ModelSpeedup | Plan, masks: Masks | None) -> _Cut:
    if isinstance(plan, Plan):
        return _Cut(plan, Masks.coerce({} if masks is None else masks).flat())
    if not isinstance(plan, ModelSpeedup):
        raise CheckpointError(
            f"plan: got a {type(plan).__name__}; expected a ModelSpeedup, or its plan with masks="
        )
    if masks is not None:
        raise CheckpointError("masks: the ModelSpeedup knows its own; pass either these or a plan")
    model, new = plan.model, set(plan.plan.new_biases)
    names = {name: path for name, path in names_of(model).items() if path not in new}
    needed = persistent_names(model) - new
    return _Cut(plan.plan, plan.masks_before, type(model).__qualname__, names, needed)


def _check_values(plan: Plan) -> None:
    """A plan that was made on meta can say where constants go, not what they are."""
    moved = [*plan.biases, *plan.carries]
    if plan.on_meta and moved:
        raise CheckpointError(
            f"{moved[0]}: the plan moves constants into it (a removed channel that is not 0), and "
            "on the meta device their values are unknown; mask biases and norms too, as "
            'mode="dependency_aware" does, so that what goes is 0, or make the plan of the model '
            "with its weights"
        )
    numbers = [*plan.biases.values(), *(c.ratios for each in plan.carries.values() for c in each)]
    if not all(np.isfinite(each).all() for each in numbers):
        raise CheckpointError("the plan moves constants that are no finite numbers")


def _without_doubles(places: dict[str, Place], names: Mapping[str, str]) -> dict[str, Place]:
    """One name of each tied tensor; raises CheckpointError where the values of two differ."""
    first: dict[str, str] = {}
    for name, place in places.items():
        other = first.setdefault(names.get(name, name), name)
        if other != name and not _same_values(place, places[other]):
            raise CheckpointError(
                f"{place.file}: {name} and {other} are one tensor in the model, and not the same "
                "numbers here"
            )
    return {name: places[name] for name in first.values()}


def _same_values(one: Place, other: Place) -> bool:
    return str(one) == str(other) and bytes_of(map_tensor(one)) == bytes_of(map_tensor(other))


def _problems(places: Mapping[str, Place], cut: _Cut) -> list[str]:
    """Where the checkpoint is not what the plan was made of."""
    stored = {cut.path(name): name for name in places}
    wanted = cut.needed or cut.changed
    hint = "" if cut.names else " (the ModelSpeedup knows more of it than its plan: pass that)"
    problems = [
        f"{path}: the checkpoint lacks it{closest(path, stored)}{hint}"
        for path in sorted(wanted)
        if path not in stored
    ]
    if cut.names:
        unknown = (name for name in places if name not in cut.names)
        problems += [f"{n}: the model has no such tensor{closest(n, cut.names)}" for n in unknown]
    before = {path: tuple(mask.shape) for path, mask in cut.masks.items()} | cut.plan.shapes
    for path, shape in before.items():
        if path in stored and places[stored[path]].shape != shape:
            got = places[stored[path]].shape
            problems.append(f"{path}: it is of shape {got}, and the plan is of one of {shape}")
    return problems


# -- writing -------------------------------------------------------------------------------


def _write(
    folder: Path,
    places: Mapping[str, Place],
    cut: _Cut,
    limit: int,
    provenance: dict[str, Any],
    progress: bool,
) -> None:
    layouts = _layouts(places, cut)
    shards = _divided(layouts, limit)
    files = _file_names(len(shards))
    records: dict[str, TensorRecord] = {}

    with progress_bar("shrinking", len(layouts), progress) as advance:

        def done(name: str, sha256: str) -> None:
            layout = layouts[name]
            dtype, shape = NAMES[layout.dtype], list(layout.shape)
            records[name] = TensorRecord(dtype=dtype, shape=shape, sha256=sha256)
            advance()

        for file, names in zip(files, shards, strict=True):
            part = {name: layouts[name] for name in names}
            small = partial(_small, places=places, cut=cut)
            write_file(folder / file, part, {"format": "pt"}, small, done)
    recipe = Recipe(
        model=cut.model,
        plans=[encode_plan(cut.plan)],
        tensors=records,
        masks={},
        tied=_ties(layouts, cut) if cut.names else None,
        versions=versions(),
        provenance=provenance,
    )
    if len(shards) > 1:
        _write_index(folder, layouts, dict(zip(files, shards, strict=True)))
    (folder / RECIPE).write_text(recipe_json(recipe_text(recipe)), encoding="utf-8")


def _write_index(
    folder: Path, layouts: Mapping[str, Layout], shards: Mapping[str, list[str]]
) -> None:
    index = {
        "metadata": {"total_size": sum(each.size for each in layouts.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _layouts(places: Mapping[str, Place], cut: _Cut) -> dict[str, Layout]:
    """The tensors of the small model, in the order in which the old ones lie in their files."""
    layouts: dict[str, Layout] = {}
    for name in sorted(places, key=lambda name: (places[name].file, places[name].begin)):
        place, part = places[name], cut.plan.slices.get(cut.path(name))
        shape = place.shape if part is None else part.shape(place.shape)
        layouts[name] = Layout(place.dtype, shape)
    stored = {cut.path(name): name for name in places}
    for path, weight in cut.plan.new_biases.items():
        part, size = cut.plan.slices.get(path), (len(cut.plan.biases[path]),)
        shape = size if part is None else part.shape(size)
        layouts[path] = Layout(places[stored[weight]].dtype, shape)
    return layouts


def _small(name: str, places: Mapping[str, Place], cut: _Cut) -> Iterator[Tensor]:
    """One tensor of the small model, in parts; what is not kept of its rows is not read."""
    path, plan = cut.path(name), cut.plan
    if name not in places:  # a bias that is new
        stored = {cut.path(each): each for each in places}
        shift, part = torch.from_numpy(plan.biases[path]), plan.slices.get(path)
        value = shift if part is None else part(shift)
        yield value.to(places[stored[plan.new_biases[path]]].dtype)
        return
    place = places[name]
    part = plan.slices.get(path, Slice((None,) * len(place.shape)))
    if place.size <= _PIECE or part.gather is not None or path in {**plan.carries, **plan.biases}:
        yield new_tensor(path, map_tensor(place), plan, cut.masks)
        return
    rows = np.arange(place.shape[0]) if part.keep[0] is None else part.keep[0]
    for some in np.array_split(rows, -(-place.size // _PIECE)):
        piece = replace(plan, slices={path: Slice((some, *part.keep[1:]))})
        yield new_tensor(path, map_tensor(place), piece, cut.masks)  # mapped anew: pages are freed


def _ties(layouts: Mapping[str, Layout], cut: _Cut) -> dict[str, str]:
    """The other names of the tensors that are written, with those that they are written under."""
    written = {cut.path(name): name for name in layouts}
    return {
        name: written[path]
        for name, path in cut.names.items()
        if path in written and name not in layouts
    }


def _divided(layouts: Mapping[str, Layout], limit: int) -> list[list[str]]:
    """The names in each file, in order; a file has at least one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, layout in layouts.items():
        if shards[-1] and size + layout.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += layout.size
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _bytes(size: Any) -> int:
    """A number of bytes, as "5GB" or 5_000_000_000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip().upper())
    unit = "" if found is None or found[2] in (None, "B") else found[2]
    value = 0 if found is None or isinstance(size, bool) else int(float(found[1]) * _UNITS[unit])
    if value < 1:
        raise CheckpointError(f'max_shard_size: got {size!r}; expected bytes, or such as "5GB"')
    return value
