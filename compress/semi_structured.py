"""2:4 weights as torch's semi-structured sparse tensors, which some GPUs multiply with faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from compress.errors import CompressError
from compress.masks import applied_masks, raw_parameter

_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def to_semi_structured(model: nn.Module) -> list[str]:
    """Give the Linear layers of ``model`` whose weights are 2:4 sparse weights, in place.

    A layer is taken when of every 4 neighbouring inputs at most 2 weights of each row are not 0.
    The weights are for inference: they take no gradients. A layer whose size torch's kernels do not
    take stays dense.

    Returns:
        Names of the layers that have sparse weights now.

    Raises:
        CompressError: masks are on the model, no layer is 2:4, or torch has no kernels for where
            the weights are, or for their type; the model is untouched.
    """
    if applied_masks(model):
        raise CompressError(
            "to_semi_structured: masks are on the model; write them into the weights first "
            "(pruner.unwrap_model(), or compress.masks.remove_masks(model))"
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_2_of_4(raw_parameter(module, "weight"))
    }
    if not found:
        raise CompressError(
            f"{type(model).__name__}: no Linear layer has 2:4 weights (of every 4 neighbours in a "
            "row at least 2 zeros); make them so with LevelPruner(model, config_list, "
            "mode='balanced', balance='2:4')"
        )
    for name, module in found.items():
        _check_place(name, module.weight)
    sparse = {name: _sparse(module.weight) for name, module in found.items()}
    converted = {name: weight for name, weight in sparse.items() if weight is not None}
    shared: dict[int, nn.Parameter] = {}
    for name, weight in converted.items():
        given = nn.Parameter(weight, requires_grad=False)
        found[name].weight = shared.setdefault(id(found[name].weight), given)
    return list(converted)


def _is_2_of_4(weight: Tensor | None) -> bool:
    if weight is None or weight.is_meta or weight.shape[1] % 4 or weight.layout != torch.strided:
        return False
    return bool(((weight.detach().reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def _check_place(name: str, weight: Tensor) -> None:
    place = f"{name}: its weight is {weight.dtype} on {weight.device}"
    if weight.device.type != "cuda":
        raise CompressError(
            f"{place}; torch has semi-structured kernels for NVIDIA GPUs only: model.half().cuda()"
        )
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(weight.device)))
        raise CompressError(f"{place}, of compute capability {capability}; the kernels need 8.0")
    if weight.dtype not in _DTYPES:
        raise CompressError(f"{place}; the kernels take {', '.join(map(str, _DTYPES))}")


def _sparse(weight: Tensor) -> Tensor | None:
    """The sparse form; None for a size that the kernels do not take."""
    try:
        sparse: Tensor = to_sparse_semi_structured(weight.detach().contiguous())
    except RuntimeError:
        return None
    return sparse
