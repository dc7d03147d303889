"""Apply a plan to a model in one step, and undo it.

The user's Parameter objects stay (tied ones stay tied, an optimizer keeps its references); they get
new data. Undoing gives the old data back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from compress.graph.walk import leaves_of, modules_of
from compress.masks import Masks
from compress.modules import REPLACEMENTS, replace_class
from compress.speedup.knowledge import all_by_row
from compress.speedup.plan import Attribute, Carry, Plan, Replacement, Slice


def new_tensor(
    path: str, tensor: torch.Tensor, plan: Plan, masks: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What becomes of one parameter or buffer: masked, its constants moved, sliced."""
    cut = plan.slices.get(path) or Slice((None,) * tensor.dim())
    if tensor.is_meta:  # a plan that is only looked at
        return cut(tensor)
    mask = masks.get(path)
    result = cut(tensor)
    if mask is not None:
        result = _masked(result, mask.to(tensor.device), cut)
    for carry in plan.carries.get(path, ()):
        result = _carried(result, tensor, mask, cut, carry)
    if path in plan.scales:
        scale = plan.scales[path]
        wide = (result.double() + scale.shift) * scale.factor - scale.shift
        result = wide.to(tensor.dtype)
    if path in plan.biases:
        shift = torch.from_numpy(plan.biases[path]).to(tensor.device)
        result = (result.double() + cut(shift)).to(tensor.dtype)
    if _is_channels_last(tensor):
        result = result.contiguous(memory_format=torch.channels_last)
    return result


def _masked(result: torch.Tensor, mask: torch.Tensor, cut: Slice) -> torch.Tensor:
    """Zero what is masked of a parameter that has been cut; most kept rows have no masked entry."""
    if mask.dim() < 2 or cut.gather is not None:
        return torch.where(cut(mask), result, 0)
    masked = ~all_by_row(mask).cpu().numpy()
    kept = np.arange(len(masked)) if cut.keep[0] is None else cut.keep[0]
    rows = np.flatnonzero(masked[kept])
    if len(rows) == 0:
        return result
    part = Slice((kept[rows], *cut.keep[1:]))(mask)
    left = ~all_by_row(part)  # in most rows all that is masked has gone
    if not bool(left.any()):
        return result
    rows, part = rows[left.cpu().numpy()], part[left]
    index = torch.from_numpy(rows).to(result.device)
    return result.index_copy(0, index, torch.where(part, result.index_select(0, index), 0))


def _carried(
    result: torch.Tensor, tensor: torch.Tensor, mask: torch.Tensor | None, cut: Slice, carry: Carry
) -> torch.Tensor:
    keep = list(cut.keep)
    kept_here = keep[carry.axis]
    target = carry.target if kept_here is None else int(kept_here.searchsorted(carry.target))
    keep[carry.axis] = carry.sources
    gone = Slice(tuple(keep))
    part = gone(tensor)
    if mask is not None:
        part = torch.where(gone(mask.to(tensor.device)), part, 0)
    ratios = torch.from_numpy(carry.ratios).to(tensor.device)
    total = torch.tensordot(part.double(), ratios, dims=([carry.axis], [0]))
    result = result.clone()
    place = result.select(carry.axis, target)
    place.copy_((place.double() + total).to(result.dtype))
    return result


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def apply_plan(
    model: nn.Module, plan: Plan, masks: Mapping[str, torch.Tensor]
) -> Callable[[], None]:
    """Shrink the model in place; returns the function that undoes it."""
    modules = modules_of(model)
    tensors, owners = {p: tensor for p, tensor, _ in leaves_of(model, modules)}, dict(modules)
    replaced: list[_Before] = []
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()
        for tensor, data, grad in replaced:
            _put(tensor, data, grad)

    try:
        with torch.no_grad():
            # What fails half-way has been noted up to there: += takes them one by one.
            undo += (
                _add_bias(owners, path, tensors[weight], plan)
                for path, weight in plan.new_biases.items()
            )
            touched = {
                **plan.slices, **plan.carries, **plan.scales, **plan.biases, **masks,
            }.keys()  # fmt: skip
            replaced += (
                _replace(tensors[path], path, plan, masks) for path in touched if path in tensors
            )
            undo += (_replace_class(owners, each) for each in plan.replacements)
            undo += (_set_attribute(owners, each) for each in plan.attributes)
            _flatten_recurrent(owners, plan)
    except BaseException:
        undo_all()
        raise
    return undo_all


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model's parameters are multiplied by their masks (by path) within this context."""
    undo = apply_plan(model, Plan(), masks)
    try:
        yield
    finally:
        undo()


def by_leaf(model: nn.Module, masks: Masks) -> dict[str, torch.Tensor]:
    """Masks by the first path of their parameter (a tied one has several), on its device."""
    leaves = {path: tensor for path, tensor, _ in leaves_of(model)}
    first = {id(tensor): path for path, tensor in leaves.items()}
    result: dict[str, torch.Tensor] = {}
    for name, mask in masks.flat().items():
        parameter = leaves[name] if name in leaves else model.get_parameter(name)
        path = first[id(parameter)]
        if not parameter.is_meta:  # on meta the mask would lose its values
            mask = mask.to(parameter.device)
        result[path] = mask & result[path] if path in result else mask
    return result


def remaining_masks(masks: Masks, plan: Plan, model: nn.Module) -> Masks:
    """The masks of the parameters that are left; what is no longer masked anywhere is left out."""
    paths = {id(tensor): path for path, tensor, _ in leaves_of(model)}
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for module, parameters in masks.items():
        owner = model.get_submodule(module)
        for name, mask in parameters.items():
            parameter = getattr(owner, name)
            cut = plan.slices.get(paths[id(parameter)])
            left = _without_moved(mask, plan, paths[id(parameter)])
            left = left if cut is None else cut(left)
            if not bool(left.all()):
                entries.setdefault(module, {})[name] = left
    return Masks(entries)


def _without_moved(mask: torch.Tensor, plan: Plan, path: str) -> torch.Tensor:
    """A mask without the places that a constant was moved to: they belong to the function now."""
    mask = mask.clone()
    if path in plan.biases:
        mask |= torch.from_numpy(plan.biases[path] != 0).to(mask.device)
    if path in plan.scales and plan.scales[path].shift:
        mask.fill_(True)
    for carry in plan.carries.get(path, ()):
        mask.select(carry.axis, carry.target).fill_(True)
    return mask


Owners = Mapping[str, nn.Module]  # the modules by path
_Before = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # a tensor, its data, its gradient


def _replace(
    tensor: torch.Tensor, path: str, plan: Plan, masks: Mapping[str, torch.Tensor]
) -> _Before:
    data, grad = tensor.data, tensor.grad
    new = new_tensor(path, data, plan, masks)
    cut = plan.slices.get(path)
    _put(tensor, new, grad if grad is None or cut is None else cut(grad))
    return tensor, data, grad


def _put(tensor: torch.Tensor, data: torch.Tensor, grad: torch.Tensor | None) -> None:
    tensor.grad = None
    if tensor.requires_grad and data.shape != tensor.shape:
        # An autograd graph that is still alive (the last loss, say) holds on to the node that sums
        # up the old gradient, and torch would go on using it: only another type makes it let go.
        other = torch.float16 if data.dtype == torch.float32 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


def _add_bias(owners: Owners, path: str, weight: torch.Tensor, plan: Plan) -> Callable[[], None]:
    module = owners[path.rpartition(".")[0]]
    shift = torch.from_numpy(plan.biases[path])
    cut = plan.slices.get(path)
    value = (shift if cut is None else cut(shift)).to(weight.device, weight.dtype)
    module._parameters["bias"] = nn.Parameter(value, requires_grad=weight.requires_grad)

    def undo() -> None:
        module._parameters["bias"] = None

    return undo


def _replace_class(owners: Owners, each: Replacement) -> Callable[[], None]:
    return replace_class(owners[each.module], REPLACEMENTS[each.kind].becomes, each.state)


def _set_attribute(owners: Owners, attribute: Attribute) -> Callable[[], None]:
    module = owners[attribute.module]
    setattr(module, attribute.name, attribute.new)
    return lambda: setattr(module, attribute.name, attribute.old)


def _flatten_recurrent(owners: Owners, plan: Plan) -> None:
    """cuDNN wants the weights of a recurrent module in one piece of memory, as they were."""
    for path in {path.rpartition(".")[0] for path in plan.slices}:
        module = owners[path]
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
