"""Build the user's class without memory for its weights, where that gives the same model.

Parameters go to the meta device as modules register them; buffers and all else are computed as
ever. What must look at the values of a parameter raises on meta, and what was computed from one is
itself on meta: then the model is built again as it is.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.errors import CheckpointError
from compress.graph.walk import leaves_of


def build_light(build: Callable[[], nn.Module]) -> nn.Module | None:
    """The model with its parameters on meta; None where only the real one is the same."""
    derived = _Derived()
    try:
        with _parameters_on_meta(), derived:
            model = build()
    except Exception:  # it needs its values; another error comes again when it is built with them
        return None
    return model if isinstance(model, nn.Module) and _can_be_filled(model, derived) else None


def build_whole(build: Callable[[], nn.Module]) -> nn.Module:
    """The model as the user's function makes it; its own errors are the user's."""
    model = build()
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"the function that builds the model returned a {type(model).__name__}; expected a "
            "torch.nn.Module, as of lambda: resnet18(num_classes=10)"
        )
    return model


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers (by first path) their values, of any type and device.

    The objects stay; only buffers on meta become other ones, in all modules that have them.
    """
    leaves = {path: tensor for path, tensor, _ in leaves_of(model)}
    for path, value in values.items():
        tensor = leaves[path]
        tensor.grad = None
        if not tensor.is_meta:
            tensor.data = value
        elif isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(value, requires_grad=tensor.requires_grad)
            vars(filled).update(vars(tensor))
            torch.utils.swap_tensors(tensor, filled)  # type: ignore[no-untyped-call]
        else:
            for module in model.modules():
                for name, each in module._buffers.items():
                    if each is tensor:
                        module._buffers[name] = value


# -- what makes it light -------------------------------------------------------------------


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        ours = threading.get_ident() == thread and type(parameter) is nn.Parameter
        if ours and parameter.device.type == "cpu":
            light = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            vars(light).update(vars(parameter))
            # The object stays: others may have it, too.
            torch.utils.swap_tensors(parameter, light)  # type: ignore[no-untyped-call]

    handle = register_module_parameter_registration_hook(hook)
    try:
        with warnings.catch_warnings():
            # Pretrained weights that the function loads: they are not needed.
            warnings.filterwarnings("ignore", message=".*meta parameter.*no-op")
            yield
    finally:
        handle.remove()


class _Derived(TorchFunctionMode):
    """Notes tensors that were computed from parameters on meta."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._found += [
            weakref.ref(each)
            for each in tree_leaves(result)
            if isinstance(each, Tensor) and each.is_meta and not isinstance(each, nn.Parameter)
        ]
        return result

    def alive(self) -> list[Tensor]:
        """Those that somebody still has."""
        found = [reference() for reference in self._found]
        return [tensor for tensor in found if tensor is not None]


def _can_be_filled(model: nn.Module, derived: _Derived) -> bool:
    """Whether values can be given to all that is on meta, and nothing was computed from it."""
    light = [(tensor, kind) for _, tensor, kind in leaves_of(model) if tensor.is_meta]
    buffers = {id(tensor) for tensor, kind in light if kind == "buffer"}
    if any(id(tensor) not in buffers for tensor in derived.alive()):
        gc.collect()
        if any(id(tensor) not in buffers for tensor in derived.alive()):
            return False
    return not any(
        weakref.getweakrefs(tensor) or tensor._backward_hooks or _accumulates(tensor)
        for tensor, kind in light
        if kind == "parameter"
    )


def _accumulates(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))
