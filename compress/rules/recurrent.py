"""Recurrent networks: LSTM, GRU and plain RNN, whole sequences or single steps.

A hidden unit is one label: its rows in every gate of both weights and biases, its column of the
recurrent weight, its column of the next layer. It goes where nobody outside reads it and no unit
that stays does, or where it is known to be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from compress.graph.labels import Axes, Axis, EqualParts, LabelSpace
from compress.graph.shapes import along, per_position
from compress.rules.attention import zero_positions
from compress.rules.creation import is_zeros
from compress.rules.registry import Call, Read, Rule, Units, each_axis, rule, shape_of

if TYPE_CHECKING:
    from compress.speedup.decide import Decision
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

AxesOf = Callable[[Any], Axes]

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}  # rows: i, f, g, o; r, z, n; h


@dataclass(frozen=True)
class Direction:
    """One layer in one direction: its weights, and the labels of its cells and outputs.

    weight_ih: (gates · cells, in), weight_hh: (gates · cells, out), weight_hr: (out, cells) where
    an LSTM projects its cells; else the cells are the outputs.
    """

    weight_ih: fx.Node
    weight_hh: fx.Node
    bias_ih: fx.Node | None
    bias_hh: fx.Node | None
    weight_hr: fx.Node | None

    @property
    def biases(self) -> list[fx.Node]:
        return [bias for bias in (self.bias_ih, self.bias_hh) if bias is not None]

    @property
    def cells_at(self) -> tuple[fx.Node, int]:
        """The weight, and its axis, that the cells lie along."""
        return (self.weight_hh, 1) if self.weight_hr is None else (self.weight_hr, 1)

    @property
    def outputs_at(self) -> tuple[fx.Node, int]:
        return (self.weight_hh, 1)

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of cells, and that of outputs."""
        (cells, i), (outputs, j) = self.cells_at, self.outputs_at
        return shape_of(cells)[i], shape_of(outputs)[j]


@dataclass(frozen=True)
class Network:
    """One call: its input, its first states (outputs, and an LSTM's cells), layer by layer."""

    kind: str
    x: fx.Node
    states: tuple[fx.Node, ...]
    layers: list[list[Direction]]

    @property
    def gates(self) -> int:
        return _GATES[self.kind]

    @property
    def directions(self) -> list[Direction]:
        return [each for layer in self.layers for each in layer]


@dataclass(frozen=True)
class Zeros:
    """Bool, one per position: which inputs, cells and outputs of a direction are 0 at any time.

    ``state`` holds the outputs that are 0 from the first state on.
    """

    inputs: np.ndarray
    cells: np.ndarray
    outputs: np.ndarray
    state: np.ndarray


class Recurrent(Rule):
    """What sequences and single steps share; a subclass reads the network off the call."""

    def network(self, call: Call) -> Network:
        raise NotImplementedError

    def sized(self, call: Call) -> bool:
        return True

    def makes(self, call: Call) -> list[Units]:
        net = self.network(call)
        return [Units(each.weight_ih, 0, None, net.x) for each in net.directions]

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        net = self.network(call)
        steps = each_axis(net.x)[:-1]
        weights = [w for d in net.directions for w in (d.weight_ih, d.weight_hh, d.weight_hr)]
        return [[*steps, *each_axis(weight)] for weight in weights if weight is not None]

    # -- labels ----------------------------------------------------------------------------

    def units(self, net: Network, axes: AxesOf, call: Call, space: LabelSpace) -> Axis:
        """Tie all weights of the network; returns the labels of its outputs."""
        axis = axes(net.x)[-1]
        for layer in net.layers:
            for each in layer:
                self._tie_direction(each, axis, net.gates, axes, call, space)
            axis = _joined([axes(d.outputs_at[0])[d.outputs_at[1]] for d in layer], layer)
        return axis

    def _tie_direction(
        self, each: Direction, inputs: Axis, gates: int, axes: AxesOf, call: Call, space: LabelSpace
    ) -> None:
        cells, outputs = (axes(node)[axis] for node, axis in (each.cells_at, each.outputs_at))
        rows = None if cells is None else np.tile(cells, gates)
        reason = f"is a size of {call.name} that is fixed"
        space.tie(inputs, axes(each.weight_ih)[1], call.node, reason)
        for node in (each.weight_ih, each.weight_hh, *each.biases):
            space.tie(rows, axes(node)[0], call.node, reason)
        if each.weight_hr is not None:
            space.tie(outputs, axes(each.weight_hr)[0], call.node, reason)

    # -- values ----------------------------------------------------------------------------

    def zeros(self, net: Network, known: Knowledge) -> list[Zeros]:
        """What is 0 of each direction, in the order of ``net.directions``."""
        inputs = zero_positions(known, net.x, -1)
        found: list[Zeros] = []
        for layer in net.layers:
            here: list[Zeros] = []
            for each in layer:
                index = len(found) + len(here)
                first = [_zeros_of_state(known, node, index) for node in net.states]
                here.append(_zeros_of_direction(net.kind, each, inputs, first, known))
            inputs = np.concatenate([zeros.outputs for zeros in here])
            found += here
        return found

    # -- reading ---------------------------------------------------------------------------

    def live(self, call: Call, decision: Decision) -> np.ndarray:
        """Bool: the cells, then the outputs, of each direction that stay."""
        parts = []
        for each in self.network(call).directions:
            for node, axis in (each.cells_at, each.outputs_at):
                labels = decision.knowledge.axis(node, axis)
                size = shape_of(node)[axis]
                parts.append(np.ones(size, bool) if labels is None else decision.kept(labels))
        return np.concatenate(parts)

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        assert live is not None
        net = self.network(call)
        zeros = iter(self.zeros(net, known))
        sizes = [size for each in net.directions for size in each.sizes]
        parts = iter(np.split(live, np.cumsum(sizes)[:-1]))
        inputs, constants = known.axis(net.x, -1), self.constants(net, known)
        for layer in net.layers:
            for each in layer:
                zero, cells, outputs = next(zeros), next(parts), next(parts)
                rows = np.tile(cells & ~zero.cells, net.gates)
                needed = known.pattern(each.weight_ih)[rows].any(0) & ~zero.inputs
                if layer is net.layers[0]:
                    needed &= np.isnan(constants) | (not self.folds(net, known))
                if inputs is not None:
                    yield Read(inputs, needed)
                yield from self._read_states(each, zero, rows, outputs, known)
            inputs = _joined([known.axis(*d.outputs_at) for d in layer], layer)

    def _read_states(
        self, each: Direction, zero: Zeros, rows: np.ndarray, outputs: np.ndarray, known: Knowledge
    ) -> Iterator[Read]:
        labels = known.axis(*each.outputs_at)
        if labels is not None:
            yield Read(labels, known.pattern(each.weight_hh)[rows].any(0) & ~zero.state)
        cells = known.axis(*each.cells_at)
        if each.weight_hr is not None and cells is not None:
            live = outputs & ~zero.outputs
            yield Read(cells, known.pattern(each.weight_hr)[live].any(0) & ~zero.cells)

    # -- constants -------------------------------------------------------------------------

    def constants(self, net: Network, known: Knowledge) -> np.ndarray:
        """Float64 (in,): the constant that each input is; NaN where it is none."""
        size, value = shape_of(net.x)[-1], known.value(net.x)
        if value is None or not value.is_floating_point():
            return np.full(size, np.nan)
        return np.asarray(per_position(value, -1, size).numpy())

    def folds(self, net: Network, known: Knowledge) -> bool:
        """Whether every direction of the first layer has a bias that can take a constant."""
        return all(
            each.bias_ih is not None and known.takes_bias(each.weight_ih, each.bias_ih, "")
            for each in net.layers[0]
        )

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        net, known = self.network(call), plan.knowledge
        labels, constants = known.axis(net.x, -1), self.constants(net, known)
        if labels is None or not self.folds(net, known) or known.constants == "drop":
            return
        gone = ~plan.kept(labels) & ~np.isnan(constants) & (constants != 0)
        for each in net.layers[0] if gone.any() else ():
            weight = known.leaf(each.weight_ih, 1, np.flatnonzero(gone)).double().cpu().numpy()
            shift = weight @ constants[gone]
            plan.add_to_bias(call, each.weight_ih, each.bias_ih, 0, shift)


def _joined(axes: Sequence[Axis], layer: Sequence[Direction]) -> Axis:
    """The outputs of the directions of a layer, one after another."""
    if all(axis is None for axis in axes):
        return None
    parts = zip(axes, layer, strict=True)
    return np.concatenate([np.zeros(d.sizes[1], np.int64) if a is None else a for a, d in parts])


def _zeros_of_state(known: Knowledge, node: fx.Node, index: int) -> np.ndarray:
    """Bool (units,): where the first state of a direction, (directions, batch, units), is 0."""
    value, size = known.value(node), shape_of(node)[-1]
    if value is not None and value.dim() == 3 and value.shape[0] > 1:
        value = value[index]
    if value is None or not value.is_floating_point():
        return np.zeros(size, bool)
    return np.asarray((per_position(value, -1, size) == 0).numpy())


def _zeros_of_direction(
    kind: str, each: Direction, inputs: np.ndarray, first: list[np.ndarray], known: Knowledge
) -> Zeros:
    """Begin with all that may be 0, and give up what something not 0 flows into.

    What is left is 0 at every step if it was 0 at the step before. An LSTM's cell (a GRU's unit)
    starts from the state and takes in what its gate g (n) lets through: rows of the third gate.
    """
    (cells, outputs), start = each.sizes, first[-1]
    gate = slice(2 * cells, 3 * cells) if kind in ("lstm", "gru") else slice(0, cells)
    candidates = _rows_without(known.pattern(each.weight_ih)[gate], ~inputs)
    for bias in each.biases:
        value = known.value(bias)
        candidates &= False if value is None else (value == 0).numpy()[gate]
    if kind != "rnn":
        candidates &= start
    recurrent = known.pattern(each.weight_hh)[gate]
    projection = None if each.weight_hr is None else known.pattern(each.weight_hr)
    while True:
        out = candidates if projection is None else _rows_without(projection, ~candidates)
        left = candidates & _rows_without(recurrent, ~(out & first[0]))
        if np.array_equal(left, candidates):
            assert len(out) == outputs
            return Zeros(inputs, candidates, out, out & first[0])
        candidates = left


def _rows_without(pattern: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bool (rows,): the rows that are 0 in all of some columns."""
    return np.asarray(~pattern[:, columns].any(1))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
class Sequences(Recurrent):
    """(input, states, parameters, has_biases, layers, dropout, train, bidirectional, batch_first).

    Packed: (input, batch_sizes, states, parameters, …, bidirectional). The parameters are those of
    layer 0 forward, layer 0 backward, layer 1 forward, …. Gives the outputs, (…, directions · out),
    and the last states, (layers · directions, batch, out).
    """

    def network(self, call: Call) -> Network:
        args: Any = call.node.args
        packed = isinstance(args[3], (list, tuple))
        given, parameters, biases, depth, _, _, both = args[1 + packed : 8 + packed]
        each = len(parameters) // (depth * (1 + both))
        flat = [parameters[i : i + each] for i in range(0, len(parameters), each)]
        found = [_direction(weights, biases) for weights in flat]
        layers = [found[i : i + 1 + both] for i in range(0, len(found), 1 + both)]
        return Network(call.name.partition("_")[0], call.first, _states(given), layers)

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        net = self.network(call)
        for node in (net.x, *net.states):
            for axis in axes(node)[:-1]:
                space.pin(axis, call.node, f"is a step, or a place in the batch, of {call.name}")
        outputs = self.units(net, axes, call, space)
        result: list[Axes] = [(*[None] * (len(call.shape[0]) - 1), outputs)]  # type: ignore[arg-type]
        for index, first in enumerate(net.states):
            # They share one number in the code: hidden_size, or proj_size.
            ends = [d.cells_at if index else d.outputs_at for d in net.directions]
            each = [axes(node)[axis] for node, axis in ends]
            read = any(
                user.args[1] == index + 1 and user.users
                for user in call.node.users
                if user.meta["name"] == "getitem_output"
            )
            self._couple(each, axes(first)[-1], read, is_zeros(first), call, space)
            result.append((None, None, each[0]))
        return tuple(result)

    def _couple(
        self, each: list[Axis], first: Axis, read: bool, plain: bool, call: Call, space: LabelSpace
    ) -> None:
        """All layers and directions keep equally many; the same, where one tensor holds them all.

        A first state of zeros (``plain``) does not care which.
        """
        reason = f"belongs to a state of {call.name} of fixed size"
        several = [axis for axis in (*each, first) if axis is not None]
        if len(several) <= len(each) or len(each) == 1:
            for axis in (*each[1:], first):
                space.tie(each[0], axis, call.node, reason)
            return
        space.equal_parts.append(EqualParts(np.stack(several), call.node))
        for axis in (*(each[1:] if read or not plain else ()), *(() if plain else (first,))):
            space.tie(each[0], axis, call.node, reason)

    def value(self, call: Call, known: Knowledge) -> Any:
        net = self.network(call)
        zeros = self.zeros(net, known)
        last = np.concatenate([z.outputs for z in zeros[-len(net.layers[-1]) :]])
        result = [along(_nan_but(last), -1, len(call.shape[0]))]  # type: ignore[arg-type]
        for index in range(len(net.states)):
            each = [z.cells if index else z.outputs for z in zeros]
            result.append(_nan_but(np.stack(each))[:, None])
        return tuple(result)


def _states(given: Any) -> tuple[fx.Node, ...]:
    """One first state, or an LSTM's two."""
    return (given,) if isinstance(given, fx.Node) else tuple(given)


def _direction(flat: Sequence[Any], biases: bool) -> Direction:
    bias_ih, bias_hh = flat[2:4] if biases else (None, None)
    rest = flat[4 if biases else 2 :]
    return Direction(flat[0], flat[1], bias_ih, bias_hh, rest[0] if rest else None)


def _nan_but(zero: np.ndarray) -> torch.Tensor:
    """Float64: 0 where ``zero``, NaN elsewhere."""
    return torch.from_numpy(np.where(zero, 0.0, np.nan))


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
class Steps(Recurrent):
    """(input, states, weight_ih, weight_hh, bias_ih, bias_hh): one step; gives the next states."""

    def network(self, call: Call) -> Network:
        weights = [call.arg(2 + i, n) for i, n in enumerate(("w_ih", "w_hh", "b_ih", "b_hh"))]
        states, kind = _states(call.arg(1, "hx")), call.name.partition("_")[0]
        return Network(kind, call.first, states, [[_direction(weights, True)]])

    def labels(self, call: Call, axes: AxesOf, space: LabelSpace) -> Any:
        net = self.network(call)
        for node in (net.x, *net.states):
            for axis in axes(node)[:-1]:
                space.pin(axis, call.node, f"is a place in the batch of {call.name}")
        units = self.units(net, axes, call, space)
        reason = f"is a state of {call.name} of fixed size"
        for state in net.states:
            space.tie(units, axes(state)[-1], call.node, reason)
        lead = [None] * (len(shape_of(net.x)) - 1)
        return ((*lead, units), (*lead, units)) if len(net.states) == 2 else (*lead, units)

    def value(self, call: Call, known: Knowledge) -> Any:
        net = self.network(call)
        (zero,) = self.zeros(net, known)
        result = along(_nan_but(zero.outputs), -1, len(shape_of(net.x)))
        return (result, result) if len(net.states) == 2 else result
