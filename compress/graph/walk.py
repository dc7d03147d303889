"""The modules, parameters and buffers of a model, in torch's order.

``named_modules`` hands every module up through a generator for each level above it; a speedup asks
a dozen times, so here it is one loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module, each module once, as ``model.named_modules()`` has them."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        prefix = f"{path}." if path else ""
        children = [
            (prefix + name, child) for name, child in module._modules.items() if child is not None
        ]
        stack.extend(reversed(children))
    return found


def leaves_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Path, tensor and kind of every parameter and buffer, each once (tied ones: first path)."""
    modules = modules_of(model)
    for kind in ("parameter", "buffer"):
        seen: set[int] = set()
        for path, module in modules:
            own = module._parameters if kind == "parameter" else module._buffers
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor, kind


def wrapped_in(model: nn.Module) -> str | None:
    """The attribute that holds the user's model in a wrapper of torch's (DDP, compiled)."""
    if not type(model).__module__.startswith("torch.") or isinstance(model, fx.GraphModule):
        return None
    held = (name for name in ("_orig_mod", "module") if hasattr(model, name))
    return next((name for name in held if isinstance(getattr(model, name), nn.Module)), None)
