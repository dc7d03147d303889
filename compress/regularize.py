"""Penalties for a training loop of your own that make weights small before they are pruned.

Either add the penalty to the loss, or its gradients after the backward pass (with a gradient
scaler: after ``unscale_``); both give the same step::

    regularizer = GroupLasso(model, 1e-4, dummy_input=x)
    for batch, target in data:
        loss = criterion(model(batch), target) + regularizer()
        loss.backward()                    # or without it in the loss: regularizer.add_gradients()
        optimizer.step()

Shared parameters count once. Masked entries are 0 here as in the forward. Everything runs where the
parameters are, in float32 at least.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError, ConfigError
from compress.graph.channels import ChannelGraph
from compress.graph.explain import parameter_axes
from compress.masks import Masks, masked_parameter, parameter_slots, raw_parameter, suspend_masks
from compress.pruners.structure import join_grids


class Regularizer(ABC):
    """A penalty on the parameters of a model: ``regularizer()``, or `add_gradients`."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
        _check_number("scale", scale)
        self.model = model
        self.scale = scale

    @abstractmethod
    def __call__(self) -> Tensor:
        """The penalty of the present parameters: a number to add to the loss.

        Raises:
            CompressError: the parameters are no longer those that it was made for.
        """

    def add_gradients(self) -> None:
        """Add the penalty's gradients to the ``grad`` of the parameters.

        Where the penalty has a kink (at 0), 0 is taken.

        Raises:
            CompressError: as for the penalty; no gradient has changed.
        """
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad():
            penalty = self()
        if not penalty.requires_grad:
            return
        for parameter, grad in zip(
            wanted, torch.autograd.grad(penalty, wanted, allow_unused=True), strict=True
        ):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


class L1(Regularizer):
    """``scale`` · Σ|w| over all weights with two axes or more; `LevelPruner` finds what fell."""

    def __call__(self) -> Tensor:
        weights = [w for _, w in _values(self.model) if w.dim() > 1]
        return self.scale * _total([w.abs().sum() for w in weights])


class BatchNormL1(Regularizer):
    """``scale`` · Σ|γ| over the weights of batch norms.

    Network Slimming (Liu et al. 2017), eq. 1, with ``scale`` 1e-4 there. Errors: ``ConfigError``
    where the model has no batch norm with a weight.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__(model, scale)
        if not self._weights():
            raise ConfigError(
                f"BatchNormL1: {type(model).__name__} has no batch norm with a weight (affine); "
                "use GroupLasso, which needs none"
            )

    def __call__(self) -> Tensor:
        return self.scale * _total([weight.abs().sum() for weight in self._weights()])

    def _weights(self) -> list[Tensor]:
        norms = nn.modules.batchnorm._BatchNorm
        return [w for module, w in _values(self.model, "weight") if isinstance(module, norms)]


@dataclass
class _Place:
    """A parameter of the groups: (positions,) or (positions, n) of ``units`` along an axis."""

    path: str
    shape: tuple[int, ...]
    axis: int
    units: Tensor


class GroupLasso(Regularizer):
    """``scale`` · Σ √|g| · ‖θ_g‖₂ over the groups g of the channel graph, |g| entries each.

    A group is all that goes with one unit (a channel, a hidden unit, a dim of all heads): the
    weights and biases that make it in all coupled layers, the norms that follow. So coupled layers
    fall together, and `L2FilterPruner` with ``mode="dependency_aware"`` finds what fell. What the
    structure holds (the model's outputs) has no penalty. Yuan & Lin 2006, Model selection and
    estimation in regression with grouped variables, eq. 2.2; over coupled groups, DepGraph (Fang
    et al. 2023), eq. 4.

    Args:
        source: the model, or its `ChannelGraph`.
        scale: of the penalty.
        dummy_input: an input of the model, where ``source`` is the model.
        consumers: whether the weights that read a unit are of its group, too. Groups overlap then.

    Raises:
        ConfigError: no dummy_input, or no unit of the model can go.
    """

    def __init__(
        self,
        source: nn.Module | ChannelGraph,
        scale: float,
        *,
        dummy_input: Any = None,
        consumers: bool = False,
    ) -> None:
        if isinstance(source, nn.Module):
            if dummy_input is None:
                raise ConfigError(
                    "GroupLasso: got a model without dummy_input; it runs the model once to see "
                    "what goes together: pass an input of it, or a ChannelGraph"
                )
            with suspend_masks(source):
                source = ChannelGraph(source, dummy_input)
        elif not isinstance(source, ChannelGraph):
            raise ConfigError(
                f"source: got {type(source).__name__}; expected a torch.nn.Module or a ChannelGraph"
            )
        super().__init__(source.model, scale)
        self._places, self._sizes = _groups(source, consumers)
        if not self._places:
            raise ConfigError(
                f"GroupLasso: no unit of this {type(source.model).__name__} can go; "
                "ChannelGraph(model, dummy_input).groups() says why"
            )

    def __call__(self) -> Tensor:
        squares = self._squares()
        some = squares > 0
        norms = torch.where(some, squares, 1).sqrt() * some  # the gradient at 0 is 0, and not NaN
        return self.scale * (norms * self._sizes.to(norms).sqrt()).sum()

    def norms(self) -> Tensor:
        """``(groups,)``, the ‖θ_g‖₂ of now: which groups have fallen.

        Raises:
            CompressError: the model has been sped up since.
        """
        with torch.no_grad():
            return self._squares().sqrt()

    def _squares(self) -> Tensor:
        """``(groups,)``, Σθ² of each."""
        values = _checked(self.model, {one.path: one.shape for one in self._places}, "GroupLasso")
        total: Tensor | None = None
        for one in self._places:
            value = values[one.path]
            total = value.new_zeros(len(self._sizes) + 1) if total is None else total
            one.units = one.units.to(value.device)
            squares = _along(value.square(), one)
            sums = torch.zeros(len(self._sizes) + 1, dtype=squares.dtype, device=squares.device)
            total = total + sums.index_add(0, one.units.flatten(), squares).to(total)
        assert total is not None, "a GroupLasso has places"
        return total[:-1]  # the last is of what is in no group


class GrowingRegularization(Regularizer):
    """½ λ Σw² over what will be pruned, with λ growing while training goes on.

    Neural Pruning via Growing Regularization (Wang et al. 2021), GReg-1: the units of lowest
    importance are chosen first, by any pruner, and then pushed to 0 so gently that the rest takes
    over their work. Call `step` once for each step of the optimizer; when ``finished``, apply the
    masks and shrink::

        masks = L1FilterPruner(model, config_list).calc_masks()
        regularizer = GrowingRegularization(model, masks)

    Args:
        model: the model to train; the masks are not applied to it.
        masks: what is to be pruned, as a pruner's ``calc_masks`` says.
        growth: added to λ at a time: the paper's δλ.
        every: steps between two growths: the paper's Kᵤ.
        ceiling: of λ: the paper's τ.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | Mapping[str, Mapping[str, Tensor]],
        *,
        growth: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ) -> None:
        super().__init__(model, 0.0)
        _check_number("growth", growth)
        _check_number("ceiling", ceiling)
        if type(every) is not int or every < 1:
            raise ConfigError(f"every: got {every!r}; expected a whole number ≥ 1")
        self.growth, self.every, self.ceiling = growth, every, ceiling
        self.masks = Masks.coerce(masks)
        self.masks.validate(model)
        self._steps = 0

    @property
    def finished(self) -> bool:
        """Whether λ, which is ``scale``, has reached the ceiling."""
        return self.scale >= self.ceiling

    def step(self) -> None:
        """Count one step of the optimizer; λ grows after every ``every`` of them."""
        self._steps += 1
        self.scale = min(self.ceiling, self.growth * (self._steps // self.every))

    def __call__(self) -> Tensor:
        masks = self.masks.flat()
        shapes = {path: tuple(mask.shape) for path, mask in masks.items()}
        values = _checked(self.model, shapes, "GrowingRegularization")
        gone: dict[int, Tensor] = {}  # a shared parameter may have several masks: their union goes
        for path, value in values.items():
            mask = ~masks[path].to(value.device)
            gone[id(value)] = gone[id(value)] | mask if id(value) in gone else mask
        once = {id(value): value for value in values.values()}
        sums = [torch.where(gone[key], value, 0).square().sum() for key, value in once.items()]
        return self.scale / 2 * _total(sums)


# -- what they share -----------------------------------------------------------------------


def _values(model: nn.Module, name: str | None = None) -> Iterator[tuple[nn.Module, Tensor]]:
    """Module and masked value of every parameter, once each, in float32 at least."""
    for slot in parameter_slots(model):
        if name in (None, slot.name):
            value = masked_parameter(slot.module, slot.name)
            assert value is not None, f"{slot.path}.{slot.name} is a parameter"
            if value.is_floating_point():
                yield slot.module, _wide(value)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _checked(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], who: str
) -> dict[str, Tensor]:
    """The masked values of parameters by path, each object once, if they are as they were."""
    found: dict[str, Tensor] = {}
    by_parameter: dict[int, Tensor] = {}
    for path, shape in shapes.items():
        value = _value_at(model, path)
        if value is None or tuple(value.shape) != shape:
            now = "gone" if value is None else f"of shape {tuple(value.shape)}"
            raise CompressError(
                f"{who}: {path} was of shape {shape} and is {now}: the model has changed since "
                f"(a speedup?); make a new {who} for it"
            )
        key = id(_raw_at(model, path))
        found[path] = by_parameter.setdefault(key, _wide(value))
    return found


def _value_at(model: nn.Module, path: str) -> Tensor | None:
    module, name = _owner(model, path)
    return None if module is None else masked_parameter(module, name)


def _raw_at(model: nn.Module, path: str) -> Tensor | None:
    module, name = _owner(model, path)
    return None if module is None else raw_parameter(module, name)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module | None, str]:
    owner, _, name = path.rpartition(".")
    try:
        return model.get_submodule(owner), name
    except AttributeError:
        return None, name


def _total(terms: list[Tensor]) -> Tensor:
    """The sum, on the device of the first."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _check_number(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)) or float(value) < 0:  # type: ignore[arg-type]
        raise ConfigError(f"{name}: got {value!r}; expected a finite number ≥ 0")


def _groups(graph: ChannelGraph, consumers: bool) -> tuple[list[_Place], Tensor]:
    """Where the groups lie in the parameters, and ``(groups,)``, how many entries each has."""
    root = join_grids(graph)
    chosen = [
        each
        for each in parameter_axes(graph)
        if graph.trace.leaves[each.parameter].meta["name"] == "parameter"
        and (consumers or not each.reads)
    ]
    made = [np.unique(root[each.labels]) for each in chosen if not each.reads]
    roots = np.setdiff1d(np.concatenate(made) if made else np.zeros(1, int), root[:1])
    number = np.full(len(root), len(roots))  # what is in no group has a place of its own
    number[roots] = np.arange(len(roots))
    places, sizes = [], torch.zeros(len(roots) + 1)
    for each in chosen:
        shape = tuple(graph.trace.leaves[each.parameter].meta["shape"])
        units = torch.from_numpy(number[root[each.labels]])
        if bool((units < len(roots)).any()):
            places.append(_Place(each.parameter, shape, each.axis, units))
            share = math.prod(shape) / units.numel()
            sizes.index_add_(0, units.flatten(), torch.full((units.numel(),), share))
    return places, sizes[:-1]


def _along(squares: Tensor, place: _Place) -> Tensor:
    """Flat sums of squares, one for each of the place's units."""
    if place.units.dim() == 1:
        return squares.movedim(place.axis, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
    sums = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
    return (sums.T if place.axis == 1 else sums).flatten()
