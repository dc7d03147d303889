"""The modules, parameters and buffers of a model, in torch's order.

``named_modules`` hands every module up through a generator for each level above it; a speedup asks
a dozen times, so here it is one loop.
"""

from __future__ import annotations

import torch
from torch import fx, nn

Modules = list[tuple[str, nn.Module]]


def modules_of(model: nn.Module) -> Modules:
    """Path and module, each module once, as ``model.named_modules()`` has them."""
    found: Modules = []
    seen: set[int] = set()
    stack: Modules = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        children = module._modules
        if children:  # most have none
            prefix = f"{path}." if path else ""
            for name in reversed(children):
                child = children[name]
                if child is not None:
                    stack.append((prefix + name, child))
    return found


def leaves_of(
    model: nn.Module, modules: Modules | None = None
) -> list[tuple[str, torch.Tensor, str]]:
    """Path, tensor and kind of every parameter and buffer, each once (tied ones: first path).

    ``modules``: those of the model, where they are at hand.
    """
    parameters: dict[int, tuple[str, torch.Tensor, str]] = {}
    buffers: dict[int, tuple[str, torch.Tensor, str]] = {}
    for path, module in modules_of(model) if modules is None else modules:
        if not module._parameters and not module._buffers:
            continue
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters.setdefault(id(parameter), (prefix + name, parameter, "parameter"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.setdefault(id(buffer), (prefix + name, buffer, "buffer"))
    return [*parameters.values(), *buffers.values()]


def wrapped_in(model: nn.Module) -> str | None:
    """The attribute that holds the user's model in a wrapper of torch's (DDP, compiled)."""
    if not type(model).__module__.startswith("torch.") or isinstance(model, fx.GraphModule):
        return None
    held = (name for name in ("_orig_mod", "module") if hasattr(model, name))
    return next((name for name in held if isinstance(getattr(model, name), nn.Module)), None)
