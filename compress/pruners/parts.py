"""What of a module is a layer to a pruner: one weight, or rows of several that make the same units.

Most modules are one layer, with the units of their ``weight``. A recurrent module has hidden units
in each of its layers and directions, and a unit has rows in every gate of two weights. A head of
``nn.MultiheadAttention`` has rows in its queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.masks import raw_parameter

RECURRENT: tuple[type[nn.Module], ...] = (
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
)
# Modules of several weights.
COMPOUND = (*RECURRENT, nn.MultiheadAttention)


@dataclass(frozen=True)
class Part:
    """A layer of a module.

    Attributes:
        weights: the parameters that are scored and masked; their first names the layer.
        units: how many rows of units there are; None: as the only weight has them, its filters or
            its entries.
        biases: parameters that are masked along with the rows.
        copies: of each of these parameters, how often all units come one behind the other: the
            gates of an LSTM. A unit is an equal share of the rows of each copy.
    """

    weights: tuple[str, ...] = ("weight",)
    units: int | None = None
    biases: tuple[str, ...] = ()
    copies: Mapping[str, int] = field(default_factory=dict)

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """``(units, entries)``: each unit's rows of tensors of the shapes of ``weights``.

        The only tensor as it is, where the weight has its own units.
        """
        if self.units is None:
            (tensor,) = tensors
            return tensor
        rows = [
            tensor.reshape(self.copies[name], self.units, -1).transpose(0, 1).flatten(1)
            for name, tensor in zip(self.weights, tensors, strict=True)
        ]
        return torch.cat(rows, 1)

    def masks(self, module: nn.Module, keep: Tensor) -> dict[str, Tensor]:
        """The masks of the part's parameters where the units ``keep``, bool ``(units,)``, stay."""
        return {name: self._mask(module, name, keep) for name in (*self.weights, *self.biases)}

    def _mask(self, module: nn.Module, name: str, keep: Tensor) -> Tensor:
        parameter = raw_parameter(module, name)
        assert parameter is not None, f"{name} was checked by resolve"
        shape = [1] * parameter.dim()
        axis = -1 if name in self.biases else 0
        size = parameter.shape[axis] // (len(keep) * self.copies[name])
        shape[axis] = -1
        rows = keep.repeat_interleave(size).repeat(self.copies[name])
        return rows.view(shape).expand(parameter.shape).clone()


ITS_WEIGHT = Part()  # what most modules are


def weight_parts(module: nn.Module) -> tuple[Part, ...]:
    """Every weight as a layer of its own, of which single entries are masked."""
    if not isinstance(module, COMPOUND):
        return (ITS_WEIGHT,)
    names = (name for part in row_parts(module) for name in part.weights)
    projections = (n for n in _parameters(module) if n.startswith("weight_hr"))
    return tuple(Part((name,)) for name in (*names, *projections))


def row_parts(module: nn.Module) -> tuple[Part, ...]:
    """The layers whose whole units are masked: filters, hidden units, heads."""
    if isinstance(module, nn.MultiheadAttention):
        return (_heads(module),)
    if isinstance(module, nn.RNNBase):
        sides = ("", "_reverse") if module.bidirectional else ("",)
        ends = [f"_l{layer}{side}" for layer in range(module.num_layers) for side in sides]
        return tuple(_hidden_units(module, end) for end in ends)
    if isinstance(module, nn.RNNCellBase):
        return (_hidden_units(module, ""),)
    return (ITS_WEIGHT,)


def part_of(parts: Sequence[Part], layer: str) -> Part:
    """The part of a module that is the layer of this name."""
    if len(parts) == 1:
        return parts[0]
    return next(part for part in parts if part.weights[0] == layer.rpartition(".")[2])


def _hidden_units(module: nn.RNNBase | nn.RNNCellBase, end: str) -> Part:
    """One layer in one direction; where an LSTM projects them, its cells."""
    weights = f"weight_ih{end}", f"weight_hh{end}"
    biases = (f"bias_ih{end}", f"bias_hh{end}") if module.bias else ()
    first = raw_parameter(module, weights[0])
    gates = 1 if first is None else first.shape[0] // module.hidden_size
    return Part(weights, module.hidden_size, biases, dict.fromkeys((*weights, *biases), gates))


def _heads(module: nn.MultiheadAttention) -> Part:
    packed = module.in_proj_weight is not None
    weights = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    biases = [name for name in ("in_proj_bias", "bias_k", "bias_v") if name in _parameters(module)]
    copies = dict.fromkeys((*weights, *biases), 1) | {"in_proj_weight": 3, "in_proj_bias": 3}
    return Part(weights, module.num_heads, tuple(biases), copies)


def _parameters(module: nn.Module) -> Iterator[str]:
    """Names of the parameters, under masks or not, in torch's order."""
    names = getattr(module, "_flat_weights_names", _OF_ATTENTION)
    return (name for name in names if raw_parameter(module, name) is not None)


_OF_ATTENTION = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v")
