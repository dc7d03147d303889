"""``compress.save``: a small model as one safetensors file that says how it was made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from compress.checkpoint.files import WEIGHTS, recipe_metadata
from compress.checkpoint.fitting import names_of, persistent_names
from compress.checkpoint.recipe import Recipe, check_provenance, raise_problems, recipe_text
from compress.checkpoint.weights import DTYPES, NAMES, layout_of, record_of, write_file
from compress.errors import CheckpointError
from compress.files import write_atomically
from compress.graph.walk import leaves_of, wrapped_in
from compress.masks import suspend_masks
from compress.speedup import ModelSpeedup
from compress.speedup.encoding import PlanData, decode_plan, encode_plan
from compress.speedup.history import plans_of
from compress.speedup.plan import Plan

MASK = "compress.mask."  # before the name of the parameter that a tensor masks
PlanSource = Plan | ModelSpeedup


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: PlanSource | Sequence[PlanSource] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a small model to one safetensors file, whole or not at all.

    The header has the recipe: what each speedup cut and set, and the SHA-256 of every tensor.
    `compress.load` makes the model of it again, from the user's class.

    Args:
        model: a model that `ModelSpeedup` has shrunk, once or several times, fine-tuned or not; in
            a copy of it this is known, too. Masks that are on it are saved beside the weights.
        path: the file; in an existing folder it is ``model.safetensors``.
        plan: the speedup (or its plan), or those of several speedups in order, where the model does
            not know: it was pickled, or parts of it were replaced. ``[]`` for one that is whole.
        provenance: what to keep beside: config_list, pruner, metrics; anything that is JSON.

    Raises:
        CheckpointError: nothing is known of how the model was shrunk; the plans are not its own; a
            parameter is of a kind that files cannot hold; the provenance is not JSON; the file
            cannot be written. An older file is as it was.
    """
    target = file_of(path)
    _check_model(model)
    kept = check_provenance(provenance)
    with suspend_masks(model) as suspended:
        masks = {f"{MASK}{name}": mask for name, mask in suspended.masks.flat().items()}
        plans = _plans(model, plan, masked=bool(masks))
        leaves = {name: tensor for name, tensor, _ in leaves_of(model)}
        raise_problems("save: these cannot be in a file", _kind_problems(leaves))
        tensors = {name: tensor.detach() for name, tensor in leaves.items()}
        names = names_of(model)
        what = "save: the plan is not that of this model (of all speedups, in order?)"
        raise_problems(what, _plan_problems(plans, names, tensors))
        persistent = persistent_names(model)
        recipe = Recipe(
            model=type(model).__qualname__,
            plans=plans,
            tensors={
                name: record_of(tensor, name in persistent or name in masks)
                for name, tensor in {**tensors, **masks}.items()
            },
            masks={name: name.removeprefix(MASK) for name in masks},
            tied={name: first for name, first in names.items() if name != first},
            versions=versions(),
            provenance=kept,
        )
        _write(target, recipe, {**tensors, **masks})


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file that `save` writes: ``path``, or one of a fixed name in an existing folder."""
    return Path(path) / WEIGHTS if os.path.isdir(path) else Path(path)


def versions() -> dict[str, str]:
    from compress import __version__  # which imports this

    return {"compress": __version__, "torch": torch.__version__}


def _write(target: Path, recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
    metadata = recipe_metadata(recipe_text(recipe))
    try:
        write_atomically(
            target, lambda file: write_file(file, layouts, metadata, lambda name: [tensors[name]])
        )
    except OSError as error:
        raise CheckpointError(f"{target}: the model cannot be saved: {error}") from error


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"save: got a {type(model).__name__}; expected a torch.nn.Module")
    wrapper = wrapped_in(model)
    if wrapper is not None:
        raise CheckpointError(
            f"save: got a {type(model).__name__} around your model; pass model.{wrapper}"
        )


def _plans(
    model: nn.Module, given: PlanSource | Sequence[PlanSource] | None, masked: bool
) -> list[PlanData]:
    if given is not None:
        several = [given] if isinstance(given, (Plan, ModelSpeedup)) else given
        wrong = [each for each in several if not isinstance(each, (Plan, ModelSpeedup))]
        if wrong:
            raise CheckpointError(
                f"plan: got a {type(wrong[0]).__name__}; expected a ModelSpeedup, its plan, or a "
                "list of these"
            )
        return [encode_plan(p.plan if isinstance(p, ModelSpeedup) else p) for p in several]
    known = plans_of(model)
    if known is None and not masked:
        raise CheckpointError(
            f"save: nothing is known of how this {type(model).__name__} was shrunk; pass "
            "plan=speedup.plan (a list, where there were several speedups), or plan=[] if it has "
            "the sizes that its class gives it"
        )
    return known or []


def _kind_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name}: {why}" for name, tensor in tensors.items() if (why := _problem(tensor))]


def _problem(tensor: Tensor) -> str:
    """Why a tensor has no numbers that a file could hold; empty where it has."""
    if isinstance(tensor, UninitializedParameter):
        return "it has no shape yet; run the model once"
    if tensor.is_meta:
        return "it has no values (meta device); load them first"
    if tensor.is_quantized or tensor.layout != torch.strided or _is_wrapped(tensor):
        return f"it is a {type(tensor).__name__} of {tensor.layout}; expected a plain tensor"
    if tensor.dtype not in NAMES:
        return f"it is of {tensor.dtype}; expected one of {', '.join(DTYPES)}"
    return ""


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether its numbers are elsewhere: sparse for some kernel, or on several machines."""
    return type(tensor.detach()) is not Tensor


def _plan_problems(
    plans: list[PlanData], names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Where the plans, one after the other, do not end with the shapes that the model has."""
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for plan in map(decode_plan, plans):
        before = plan.shapes | {path: (len(plan.biases[path]),) for path in plan.new_biases}
        for path, shape in before.items():
            if shapes.get(path, shape) != shape:
                problems.append(f"{path}: {shapes[path]} after one plan, {shape} before the next")
            cut = plan.slices.get(path)
            fits = cut is None or len(cut.keep) == len(shape)
            shapes[path] = shape if cut is None or not fits else cut.shape(shape)
    for path, shape in shapes.items():
        if path not in names:
            problems.append(f"{path}: the model has no such parameter or buffer any more")
        elif tuple(tensors[names[path]].shape) != shape:
            got = tuple(tensors[names[path]].shape)
            problems.append(f"{path}: it is of shape {got}, the plan makes {shape}")
    return problems
