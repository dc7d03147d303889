"""Dynamic pruning: gates that switch channels off by what each input makes of them.

Nothing is removed: every channel is there for the inputs that need it. Gao et al. 2019, Dynamic
Channel Pruning: Feature Boosting and Suppression, section 3::

    gates = add_gates(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], x)
    loss = criterion(model(batch), target) + 1e-8 * gates.penalty()    # while training

In eval mode without gradients, channels that no input of the batch has on are not computed, and
channels that come in as zeros are not read: the fewer inputs in a batch, the more is skipped. While
training, compiled and exported, all are computed and multiplied by their gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from compress.allocate import keep_count
from compress.config import resolve
from compress.errors import CompressError, ConfigError
from compress.graph.channels import ChannelGraph
from compress.graph.run import as_arguments, evaluating
from compress.masks import raw_parameter


class GatedConv2d(nn.Module):
    """A convolution, its norm, and the gate that says which of its channels an input has.

    The output is π(x)·norm(conv(x)), with π keeping of g(x) = (φ·s(x) + ρ)₊ the ``keep`` highest
    and making 0 of the others; s(x) is the mean of |x| over the places of each input channel:
    section 3 of the paper, where g takes the place of the norm's scale, which stays here.

    Args:
        conv: the user's module.
        norm: the BatchNorm that follows it, if one does.
        keep: how many channels each input has.

    Attributes:
        gate: φ and ρ, ``(in channels) -> (out channels)``; begins with ρ = 1 and small φ.
        skips: whether what is off is left out, where it can be.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, keep: int) -> None:
        super().__init__()
        self.conv, self.norm, self.keep, self.skips = conv, norm, keep, True
        weight = conv.weight
        self.gate = nn.Linear(
            conv.in_channels, conv.out_channels, device=weight.device, dtype=weight.dtype
        )
        nn.init.normal_(self.gate.weight, std=0.1 * (2 / conv.in_channels) ** 0.5)
        nn.init.ones_(self.gate.bias)
        self._saliency: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in, h, w)`` -> ``(n, out, h', w')``."""
        strength = x.abs().mean((2, 3))
        saliency = F.relu(self.gate(strength))
        self._saliency = saliency if self.training else None
        values, indices = saliency.topk(self.keep, dim=1)
        scale = torch.zeros_like(saliency).scatter(1, indices, values)
        if self._may_skip():
            return self._skipping(x, scale, strength)
        return self._normed(self.conv(x)) * scale[:, :, None, None]

    def _may_skip(self) -> bool:
        one_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        plain = self.conv.groups == 1 and not self.training and not torch.is_grad_enabled()
        return self.skips and plain and not one_graph

    def _skipping(self, x: Tensor, scale: Tensor, strength: Tensor) -> Tensor:
        """The same, of the channels that some input has on, by those that are not all 0."""
        on, read = scale.any(0).nonzero().flatten(), strength.any(0).nonzero().flatten()
        weight, bias = self.conv.weight[on], self.conv.bias
        if len(read) < x.shape[1]:
            x, weight = x[:, read], weight[:, read]
        bias = None if bias is None else bias[on]
        found = self._normed(self.conv._conv_forward(x, weight, bias), on)
        found = found * scale[:, on, None, None]
        result = found.new_zeros(found.shape[0], scale.shape[1], *found.shape[2:])
        return result.index_copy_(1, on, found)

    def _normed(self, y: Tensor, on: Tensor | None = None) -> Tensor:
        norm = self.norm
        if norm is None or on is None or norm.running_mean is None or norm.running_var is None:
            return y if norm is None else norm(y)
        mean, variance = norm.running_mean[on], norm.running_var[on]
        weight, bias = (None if each is None else each[on] for each in (norm.weight, norm.bias))
        return F.batch_norm(y, mean, variance, weight, bias, eps=norm.eps)

    def __getstate__(self) -> dict[str, Any]:
        # The saliency belongs to an autograd graph, which cannot be copied.
        return {**self.__dict__, "_saliency": None}


@dataclass(frozen=True)
class GateCost:
    """Mult-adds of convolutions and linear layers, for one input on average.

    Attributes:
        dense: with every channel computed, as while training or exported.
        batched: what is computed when the inputs run as one batch.
        single: what is computed when each runs by itself.
    """

    dense: float
    batched: float
    single: float


@dataclass(frozen=True)
class Gates:
    """The gates of a model.

    Attributes:
        model: the user's.
        paths: of the modules that are `GatedConv2d` now; each with that of its norm, or None.
    """

    model: nn.Module
    paths: Mapping[str, str | None]

    def modules(self) -> Iterator[GatedConv2d]:
        for path in self.paths:
            module = self.model.get_submodule(path)
            assert isinstance(module, GatedConv2d), f"{path} was gated"
            yield module

    def penalty(self) -> Tensor:
        """Σ over the gates of the mean over inputs of ‖g(x)‖₁, of the last forward in train mode.

        Raises:
            CompressError: there was none.
        """
        found = [gate._saliency for gate in self.modules()]
        if any(each is None for each in found):
            raise CompressError("penalty: no saliencies; run the model in train mode first")
        return torch.stack([each.sum(1).mean() for each in found if each is not None]).sum()

    def cost(self, inputs: Tensor) -> GateCost:
        """What is computed for some inputs ``(n, ...)``: counted by torch as it runs.

        torch counts what its kernels are given, so that what is not skipped counts in full. The
        model is as before.
        """
        count = len(inputs)
        with evaluating(self.model), torch.no_grad():
            with self._without_skipping():
                dense = _mult_adds(self.model, inputs)
            single = sum(_mult_adds(self.model, inputs[i : i + 1]) for i in range(count))
            return GateCost(dense / count, _mult_adds(self.model, inputs) / count, single / count)

    def remove(self) -> nn.Module:
        """Put the user's modules back where they were; returns the model, without gates."""
        for (path, norm), gated in zip(self.paths.items(), list(self.modules()), strict=True):
            _put(self.model, path, gated.conv)
            if norm is not None:
                assert gated.norm is not None, "it was taken with its path"
                _put(self.model, norm, gated.norm)
        return self.model

    @contextmanager
    def _without_skipping(self) -> Iterator[None]:
        before = [(gate, gate.skips) for gate in self.modules()]
        for gate, _ in before:
            gate.skips = False
        try:
            yield
        finally:
            for gate, skips in before:
                gate.skips = skips


def add_gates(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Any
) -> Gates:
    """Put a gate on convolutions, in place; it is trained with the model.

    A convolution whose output goes to one BatchNorm alone becomes a `GatedConv2d` of both, and the
    norm's place an identity; the modules and parameters are the user's own. An optimizer has to be
    made after it, or be given the gates' parameters.

    Args:
        config_list: see `compress.config`; ``sparsity`` is the fraction of a layer's channels that
            each input has off, and there is no ``total_sparsity``.
        dummy_input: an input of the model, which is run once to see which norm follows.

    Raises:
        ConfigError: lists what is wrong with the config_list; the model is as it was.
        TraceError: the model does not run on ``dummy_input``.
    """
    kinds = (nn.Conv2d,)
    targets = resolve(model, config_list, kinds, pruner="add_gates", granularity="channels")
    modules = dict(model.named_modules())
    problems = [
        f"config_list[{group.entry}]: total_sparsity is one ranking over layers, and each gate has "
        "its own; give sparsity"
        for group in targets.groups
    ]
    for target in targets:
        if target.tied:
            problems.append(
                f"{target.name!r} has the same weight as {target.tied[0]!r}; exclude both"
            )
        if raw_parameter(modules[target.name], "weight") is None or target.name == "":
            problems.append(f"{target.name!r} cannot be replaced; exclude it")
        if isinstance(modules.get(target.name.rpartition(".")[0]), GatedConv2d):
            problems.append(
                f"{target.name!r} has a gate already; exclude it, or call remove() of its Gates"
            )
    if problems:
        raise ConfigError("these gates cannot be added:", problems)
    norms = _norms_after(model, dummy_input)
    found: dict[str, str | None] = {}
    for target in targets:
        conv, norm = modules[target.name], norms.get(target.name)
        assert isinstance(conv, nn.Conv2d), "resolve selects no other"
        keep = keep_count(conv.out_channels, target.sparsity or 0.0)
        of_norm = None if norm is None else modules[norm]
        assert of_norm is None or isinstance(of_norm, nn.BatchNorm2d)
        gated = GatedConv2d(conv, of_norm, keep)
        gated.train(conv.training)
        _put(model, target.name, gated)
        if norm is not None:
            _put(model, norm, nn.Identity())
        found[target.name] = norm
    return Gates(model, found)


# -- what they use -------------------------------------------------------------------------


def _norms_after(model: nn.Module, dummy_input: Any) -> dict[str, str]:
    """The BatchNorm2d that alone takes a convolution's output, by path, where both run once."""
    modules = dict(model.named_modules())
    nodes: dict[str, list[Any]] = {}
    for step in ChannelGraph(model, dummy_input).steps:
        nodes.setdefault(step.call.module, []).append(step.call.node)
    found = {}
    for path, calls in nodes.items():
        users = list(calls[0].users)
        if len(calls) != 1 or len(users) != 1 or not isinstance(modules.get(path), nn.Conv2d):
            continue
        norm = users[0].meta.get("module", "")
        if len(nodes.get(norm, ())) == 1 and isinstance(modules.get(norm), nn.BatchNorm2d):
            found[path] = norm
    return found


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """``module`` at ``path``, and wherever else the one that is there is registered."""
    before = model.get_submodule(path)
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if child is before and not isinstance(owner, GatedConv2d):
                owner._modules[name] = module


def _mult_adds(model: nn.Module, inputs: Tensor) -> float:
    args, kwargs = as_arguments(inputs)
    with FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return float(counter.get_total_flops()) / 2
