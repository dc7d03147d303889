"""How large a model is: parameters, multiply-adds, FLOPs, megabytes.

Parameters, mult-adds and megabytes are the numbers that ``torchinfo`` prints (MB = 10**6 bytes).
A mult-add is one multiplication with its addition; torchinfo counts them for modules that hold
parameters (so BatchNorm counts, a bare ``F.conv2d`` or ``matmul`` does not). FLOPs are the numbers
of ``torch.utils.flop_counter``: convolutions, matrix products and attention wherever they are
called, 1 multiply-add = 2 FLOPs, and nothing else.

A model that trains under masks has the same counts as the dense model: masks remove no parameter
and save no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchinfo
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchinfo.torchinfo import clear_cached_forward_pass

from compress.graph.run import as_arguments, evaluating, rng_kept
from compress.masks import suspend_masks


@dataclass(frozen=True)
class ModelSummary:
    """The counts of one model for one input; ``mult_adds`` and ``flops`` are for the whole batch.

    ``forward_backward_mb`` is torchinfo's estimate: two times the outputs of all layers that hold
    parameters. ``parameters_mb`` leaves out buffers; see `model_size_mb` for what a file weighs.
    """

    parameters_total: int
    parameters_trainable: int
    mult_adds: int
    flops: int
    input_mb: float
    forward_backward_mb: float
    parameters_mb: float

    @property
    def total_mb(self) -> float:
        """torchinfo's "Estimated Total Size", of input, forward/backward pass and parameters."""
        return self.input_mb + self.forward_backward_mb + self.parameters_mb


def summarize(model: nn.Module, dummy_input: Any) -> ModelSummary:
    """Count a model by running it once in eval mode on ``dummy_input``.

    ``dummy_input`` is a tensor, a tuple of positional or a dict of keyword arguments, on the
    model's device. Module modes, the RNG, hooks and gradients are left as they were.
    Raises RuntimeError, from the model's own exception, when the model cannot run on this input.
    """
    runner = _Runner(model, dummy_input)
    counter = FlopCounter()
    try:
        # torchinfo reads names and classes: it would take a parametrised weight for an RNN's.
        with suspend_masks(model), evaluating(model), rng_kept(), torch.no_grad(), counter:
            counted = torchinfo.summary(runner, input_data=runner.tensors, verbose=0)
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in runner.tensors]
        reason = error.__cause__ or error
        raise RuntimeError(
            f"summarize: {type(model).__name__} does not run on a dummy_input of shapes {shapes}: "
            f"{type(reason).__name__}: {reason}"
        ) from reason
    finally:
        clear_cached_forward_pass()  # torchinfo would keep the model alive for the whole process
    return ModelSummary(
        parameters_total=counted.total_params,
        parameters_trainable=counted.trainable_params,
        mult_adds=counted.total_mult_adds,
        flops=counter.flops,
        input_mb=counted.total_input / 1e6,
        forward_backward_mb=counted.total_output_bytes / 1e6,
        parameters_mb=counted.total_param_bytes / 1e6,
    )


def model_size_mb(model: nn.Module) -> float:
    """Megabytes (10**6 bytes) of the parameters and buffers, each shared tensor counted once."""
    with suspend_masks(model):
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's FLOP formulas, without the module tracker of ``FlopCounterMode``.

    The tracker fails on weight norms without gradients (torch 2.4), and only the sum is wanted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class _Runner(nn.Module):
    """Gives torchinfo, which wants a list of tensors, a model that takes any arguments.

    A container adds no count of its own.
    """

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self._structure = pytree.tree_flatten(dummy_input)
        self._leaves = leaves
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [leaves[i] for i in self._positions]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = as_arguments(pytree.tree_unflatten(leaves, self._structure))
        return self.model(*args, **kwargs)
