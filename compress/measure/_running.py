"""How the measurements run a model, and how they leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def call(model: nn.Module, dummy_input: Any) -> Any:
    """Run the model: a dict is keyword arguments, a tuple or list positional ones."""
    if isinstance(dummy_input, Mapping):
        return model(**dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return model(*dummy_input)
    return model(dummy_input)


def tensors_in(dummy_input: Any) -> list[torch.Tensor]:
    """The tensors of a dummy input, however nested, in order."""
    return [leaf for leaf in pytree.tree_leaves(dummy_input) if isinstance(leaf, torch.Tensor)]


def device_of(model: nn.Module, dummy_input: Any) -> torch.device:
    """Where a model runs: its first parameter's or buffer's device, else the input's, else CPU."""
    for tensor in (*model.parameters(), *model.buffers(), *tensors_in(dummy_input)):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module, dummy_input: Any) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode and the RNG state are put back.

    ``no_grad`` and not ``inference_mode``: a tensor that a module caches during the run must stay
    usable when the model trains again.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model, dummy_input)
    # The CPU generator is always forked; fork_rng needs the others named.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
