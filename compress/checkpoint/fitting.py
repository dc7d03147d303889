"""Carry out a recipe on a model that the user has built, after checking that it fits.

A file may say anything. Only these things are done: tensors are cut, modules that have none get a
bias, modules of torch's become the stand-ins of `compress.modules`, and numbers that modules hold
take other values; each only where the model has what the recipe says that it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.checkpoint.recipe import Recipe, raise_problems
from compress.checkpoint.weights import DTYPES
from compress.errors import closest
from compress.graph.walk import leaves_of, modules_of
from compress.modules import REPLACEMENTS
from compress.speedup.plan import Attribute, Plan, Replacement, Slice
from compress.speedup.sizes import sizes_after
from compress.speedup.surgery import apply_plan


def carry_out(model: nn.Module, recipe: Recipe, where: str) -> Callable[[], None]:
    """Shrink a model as the recipe says; returns what undoes it.

    Raises:
        CheckpointError: the recipe is that of another model; says what differs, and the model is as
            it was.
    """
    built = type(model).__name__
    what = f"{where} does not fit the {built} that was built (it is of a {recipe.model})"
    done: list[Callable[[], None]] = []

    def undo() -> None:
        for each in reversed(done):
            each()

    try:
        for plan in recipe.decoded_plans():
            raise_problems(what, list(_plan_problems(model, plan)))
            raise_problems(what, list(_number_problems(model, plan)))
            done.append(apply_plan(model, plan, {}))
        raise_problems(what, list(_tensor_problems(model, recipe)))
    except BaseException:
        undo()
        raise
    return undo


def names_of(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, and the first one of the same tensor."""
    first = {id(tensor): path for path, tensor, _ in leaves_of(model)}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first[id(tensor)] for name, tensor in named}


def persistent_names(model: nn.Module) -> set[str]:
    """The parameters and buffers that belong to the ``state_dict``, by first path."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in modules_of(model)
        for name in module._non_persistent_buffers_set
    }
    return {path for path, _, _ in leaves_of(model)} - passing


# -- does a plan fit -----------------------------------------------------------------------


def _plan_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    tensors = {path: tensor for path, tensor, _ in leaves_of(model)}
    modules = dict(modules_of(model))
    for path, weight in plan.new_biases.items():
        yield from _bias_problems(path, weight, len(plan.biases[path]), tensors, modules)
    for path, shape in plan.shapes.items():
        if path in tensors and tuple(tensors[path].shape) != shape:
            yield f"{path}: it is of shape {tuple(tensors[path].shape)}, expected {shape}"
    for path, cut in plan.slices.items():
        if path in plan.new_biases:
            yield from _slice_problems(path, (len(plan.biases[path]),), cut)
        elif path in tensors:
            yield from _slice_problems(path, tuple(tensors[path].shape), cut)
        else:
            yield f"{path}: there is no such parameter or buffer{closest(path, tensors)}"
    for replacement in plan.replacements:
        yield from _replacement_problems(replacement, modules)
    for attribute in plan.attributes:
        yield from _attribute_problems(attribute, modules)


def _number_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Sizes that are none, or not those of the tensors: some of torch's kernels would crash."""
    modules = dict(modules_of(model))
    groups = {each.module: each.new for each in plan.attributes if each.name == "groups"}
    for each in plan.attributes:
        name, module = f"{each.module}.{each.name}".lstrip("."), modules[each.module]
        old, new = tree_leaves(each.old), tree_leaves(each.new)
        if any(type(size) is int and size > 0 for size in old) and not _are_sizes(new):
            yield f"{name}: {each.new!r} are no sizes, as {each.old!r} are"
            continue
        after = dict(sizes_after(each.module, module, plan.slices, groups.get(each.module)))
        if after.get(each.name, each.new) != each.new:
            yield f"{name}: {each.new!r} is not {after[each.name]}, which the tensors make"


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is not int or value > 0 for value in values)


def _bias_problems(
    path: str, weight: str, size: int, tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> Iterator[str]:
    owner, _, name = path.rpartition(".")
    members = modules[owner]._parameters if owner in modules else {}
    if name != "bias" or "bias" not in members or members["bias"] is not None:
        yield f"{path}: expected a module there that can have a bias and has none"
    elif weight not in tensors:
        yield f"{weight}: there is no such parameter{closest(weight, tensors)}"
    elif size > tensors[weight].numel():
        yield f"{path}: {size} numbers are too many for {weight}"


def _slice_problems(path: str, shape: tuple[int, ...], cut: Slice) -> Iterator[str]:
    if len(cut.keep) != len(shape):
        yield f"{path}: it has {len(shape)} axes, the recipe cuts {len(cut.keep)}"
        return
    for axis, (keep, size) in enumerate(zip(cut.keep, shape, strict=True)):
        if keep is not None and not _are_positions(keep, size):
            yield f"{path}: what is kept of axis {axis} are no positions of {size}, in order"
            return
    if cut.gather is None:
        return
    axis, positions = cut.gather
    left = Slice(cut.keep).shape(shape)
    fits = axis < 2 <= len(shape) and positions.ndim == 2
    if not fits or positions.shape[1 - axis] != left[1 - axis]:
        yield f"{path}: positions of shape {positions.shape} do not fit {left} at axis {axis}"
    elif not all(_are_positions(row, left[axis]) for row in np.moveaxis(positions, axis, -1)):
        yield f"{path}: what is kept of axis {axis} are no positions of {left[axis]}, in order"


def _are_positions(keep: np.ndarray, size: int) -> bool:
    inside = len(keep) == 0 or bool(keep[0] >= 0 and keep[-1] < size)
    return inside and bool((np.diff(keep) > 0).all())


def _replacement_problems(each: Replacement, modules: dict[str, nn.Module]) -> Iterator[str]:
    module, kind = modules.get(each.module), REPLACEMENTS.get(each.kind)
    if kind is None:
        yield f"{each.module}: {each.kind!r} is none of {', '.join(REPLACEMENTS)}"
    elif module is None:
        yield f"{each.module}: there is no such module{closest(each.module, modules)}"
    elif not isinstance(module, kind.replaces) or isinstance(module, kind.becomes):
        expected = kind.replaces.__name__
        yield f"{each.module}: it is a {type(module).__name__}, expected a {expected}"
    elif {name: type(value) for name, value in each.state.items()} != kind.state:
        yield f"{each.module}: {each.state} is not what makes a {each.kind}"


def _attribute_problems(each: Attribute, modules: dict[str, nn.Module]) -> Iterator[str]:
    name = f"{each.module}.{each.name}".lstrip(".")
    if each.module not in modules:
        yield f"{name}: there is no such module{closest(each.module, modules)}"
        return
    now = inspect.getattr_static(modules[each.module], each.name, _Nothing)
    if each.name.startswith("_") or not _is_plain(now):
        yield f"{name}: expected an attribute that holds a number"
    elif now != each.old or _type(now) is not _type(each.old):
        yield f"{name}: it is {now!r}, expected {each.old!r}"
    elif each.old is not None and not _is_alike(each.new, each.old):
        yield f"{name}: {each.new!r} is of another type than {each.old!r}"


class _Nothing:
    """No attribute."""


def _is_alike(new: Any, old: Any) -> bool:
    """Whether two values are of one type, and what is in them, too."""
    inside = {type(each) for each in tree_leaves(new)} <= {type(each) for each in tree_leaves(old)}
    return inside and _type(new) is _type(old)


def _type(value: Any) -> type:
    """torch.Size is a tuple, too."""
    return tuple if isinstance(value, tuple) else type(value)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, None, or a sequence of these: what a plan sets."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float))


# -- do the weights fit --------------------------------------------------------------------


def _tensor_problems(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    """What the small model has and what the weights are, name by name."""
    names, needed = names_of(model), persistent_names(model)
    leaves = {path: tensor for path, tensor, _ in leaves_of(model)}
    given: dict[str, str] = {}
    for name, record in recipe.tensors.items():
        if name in recipe.masks:
            yield from _mask_problems(name, recipe, names)
        elif name in names:
            path = names[name]
            if path in given:
                yield f"{given[path]} and {name}: one tensor in the model, two in the weights"
            given[path] = name
            if record.persistent or path in needed:
                yield from _record_problems(name, leaves[path], recipe)
        elif record.persistent:
            yield f"{name}: the model has no such parameter or buffer{closest(name, names)}"
    yield from (f"{path}: the weights lack it" for path in names if path in needed - given.keys())
    if recipe.tied is not None:
        yield from _tie_problems(names, recipe.tied)


def _mask_problems(name: str, recipe: Recipe, names: Mapping[str, str]) -> Iterator[str]:
    if recipe.masks[name] not in names or recipe.tensors[name].dtype != "BOOL":
        yield f"{name}: it is no mask of bools of a parameter that the model has"


def _tie_problems(names: Mapping[str, str], tied: Mapping[str, str]) -> Iterator[str]:
    """Names of one tensor here that were of two, or the other way round."""
    for name, path in tied.items():
        if names.get(name, name) != names.get(path, path):
            yield f"{name}: it was tied to {path}; tie the two where the model is built"
    for name, path in names.items():
        if tied.get(name, name) != tied.get(path, path):
            yield f"{name}: it is tied to {path}, and was not when the model was saved"


def _record_problems(name: str, tensor: Tensor, recipe: Recipe) -> Iterator[str]:
    record = recipe.tensors[name]
    dtype = DTYPES[record.dtype]
    if tuple(tensor.shape) != tuple(record.shape):
        yield f"{name}: of shape {tuple(tensor.shape)}, and {tuple(record.shape)} in the weights"
    elif _kind(dtype) != _kind(tensor.dtype):
        yield f"{name}: of {tensor.dtype}, and {dtype} in the weights"


def _kind(dtype: Any) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype.is_signed
