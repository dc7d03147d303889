"""What running the user's code could leave changed, put back at the end: one context manager each.

Those that a single recorded run needs are in `compress.graph.run`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.graph.run import rng_kept


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
