"""What running the user's code could leave changed, put back at the end: one context manager each.

Those that a single recorded run needs are in `compress.graph.run`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.graph.run import rng_kept
from compress.masks import MaskParametrization, parameter_slots, raw_parameter


@contextmanager
def differentiable_in_eval(model: nn.Module) -> Iterator[None]:
    """Recurrent layers without cuDNN, whose kernels for them have no backward in eval mode."""
    before = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms take the statistics of the batch, and their modules' modes are as before after.

    Their running statistics are for the caller to restore.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(norm, norm.training) for norm in norms]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, mode in modes:
            norm.training = mode


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Parameters have no gradients inside, and their own ones again after."""
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in saved:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in saved:
            parameter.grad = gradient


@contextmanager
def random_kept(loader: Any) -> Iterator[None]:
    """Random numbers of torch, numpy, Python and of a loader's own generators go on as before."""
    owners = (loader, getattr(loader, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    python, array = random.getstate(), np.random.get_state()
    try:
        with rng_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def values_kept(model: nn.Module, on_error_only: bool = False) -> Iterator[None]:
    """Parameters (and with ``on_error_only`` buffers) have their values of before again."""
    tensors: list[Tensor] = [*model.parameters(), *(model.buffers() if on_error_only else ())]
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not on_error_only:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by plain path; what is under masks, too."""
    return {path: tensor.detach().clone() for path, tensor in _plain_tensors(model).items()}


def put_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the values of `values_of`, in place; masks stay as they are.

    Raises:
        CompressError: the model has no such parameters any more; it is as it was.
    """
    found = _plain_tensors(model)
    wrong = [p for p, v in values.items() if p not in found or found[p].shape != v.shape]
    if wrong:
        raise CompressError(
            f"{wrong[0]!r} was of shape {tuple(values[wrong[0]].shape)} and is so no more: the "
            "model has changed since (a speedup?)"
        )
    with torch.no_grad():
        for path, value in values.items():
            found[path].copy_(value)


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, by the path that they have without masks of ours."""
    found: dict[str, Tensor] = {}
    for slot in parameter_slots(model):
        raw = raw_parameter(slot.module, slot.name)
        if raw is not None:
            found[f"{slot.path}.{slot.name}" if slot.path else slot.name] = raw
    masks = {id(m.mask) for m in model.modules() if isinstance(m, MaskParametrization)}
    found |= {path: b for path, b in model.named_buffers() if id(b) not in masks}
    return found


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in train mode; modes and gradients are restored, after an error the values too."""
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(values_kept(model, on_error_only=True))
        stack.enter_context(gradients_kept(model))
        stack.enter_context(torch.enable_grad())
        try:
            model.train()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters get gradients inside."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
