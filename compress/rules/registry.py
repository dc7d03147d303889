"""What a rule is, and the table from the name of a torch function to its rule.

A rule says what one family of torch functions does to labels and to known values, and which
positions of its inputs it reads. It never walks a graph: it sees one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from compress.graph.labels import Axes, Labels, LabelSpace, each_output

if TYPE_CHECKING:
    from compress.speedup.decide import Decision
    from compress.speedup.knowledge import Knowledge
    from compress.speedup.plan import PlanBuilder

Value = torch.Tensor | None  # compact, NaN where unknown; None: nothing is known


# torch also takes numpy's names for some arguments.
_NUMPY_NAMES = {"dim": "axis", "keepdim": "keepdims", "input": "x", "other": "x2"}


class Call:
    """One recorded call, with its arguments found by position or by name."""

    __slots__ = ("modules", "name", "node")

    def __init__(self, node: fx.Node, modules: Mapping[str, nn.Module] | None = None) -> None:
        self.node = node
        self.modules = modules
        self.name: str = node.meta["name"]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        args, kwargs = self.node.args, self.node.kwargs
        if index < len(args):
            return args[index]
        return kwargs.get(name, kwargs.get(_NUMPY_NAMES.get(name, name), default))

    @property
    def first(self) -> fx.Node:
        """The tensor that the call is about, the first argument, whatever its name."""
        found = self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()))
        assert isinstance(found, fx.Node)
        return found

    def rest(self, index: int, name: str) -> tuple[Any, ...]:
        """``view(2, 3)`` and ``view((2, 3))`` alike: the integers from position ``index`` on."""
        given = self.node.args[index:] or (self.node.kwargs.get(name, ()),)
        if len(given) == 1 and isinstance(given[0], (tuple, list)):
            return tuple(given[0])
        return tuple(given)

    @property
    def inputs(self) -> list[fx.Node]:
        return self.node.all_input_nodes

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each output, for calls with several."""
        shapes: tuple[tuple[int, ...], ...] = self.node.meta["shape"]
        return shapes

    @property
    def module(self) -> str:
        path: str = self.node.meta["module"]
        return path

    @property
    def owner(self) -> nn.Module:
        """The module that the call ran in."""
        assert self.modules is not None, "only the calls of a channel graph know their model"
        return self.modules[self.module]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def each_axis(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """All axes of what a node stands for."""
    return [(node, axis) for axis in range(len(shape_of(node)))]


@dataclass(frozen=True, slots=True)
class Read:
    """What a call reads of one axis of one input.

    ``needed`` (positions,) is true where the position must stay on account of this call. Where a
    position may go although it holds a constant c, not 0, ``carried`` is true: some other position
    whose constant is known must stay to carry it (see ``Contraction``). ``constants`` (positions,)
    are the known constants, NaN where unknown.
    """

    labels: Labels
    needed: np.ndarray
    constants: np.ndarray | None = None
    carried: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Units:
    """New units: along ``axis`` of the call's output, and along ``weight_axis`` of its weight.

    ``axis`` is None where no single axis of the output holds them (the gates of an LSTM).
    """

    weight: fx.Node
    weight_axis: int
    axis: int | None
    source: fx.Node


class Rule:
    """The default is the safest thing: nothing known, everything read.

    ``positional``: an output position depends on the inputs at that position alone, so that where
    the output is known or not read, the inputs are not read either.

    ``slides``: what follows the first two axes of a tensor are places, or the extent of a kernel,
    which cannot shrink.

    ``any_size``: the call runs whatever the sizes of its inputs, so that what it pins counts only
    where its output is used.

    ``moves``: the call reads nothing itself, it hands positions on.

    ``vanishes``: the call may give its very input back, so that a run does not record it.
    """

    positional = False
    slides = False
    any_size = False
    moves = False
    vanishes = False

    def sized(self, call: Call) -> bool:
        """Whether sizes are among the call's arguments, so that the code must count them anew."""
        return False

    def given_sizes(self, call: Call) -> dict[int, int]:
        """Output axes whose sizes the caller gives by number, with these numbers."""
        return {}

    def part_sizes(self, call: Call, shapes: Any) -> list[int]:
        """For calls that take a list of sizes: that list, for outputs of these shapes."""
        return []

    def pieces(self, call: Call) -> tuple[int, list[int]] | None:
        """For calls that cut an axis of the first tensor into pieces: the axis, their sizes."""
        return None

    def splits(self, call: Call) -> list[tuple[int, tuple[int, ...]]]:
        """Axes of the first tensor that the caller's numbers take apart, with the sizes of each."""
        return []

    def picks(self, call: Call) -> dict[int, np.ndarray]:
        """The axes of the first tensor of which the caller's numbers take some positions: these."""
        return {}

    def makes(self, call: Call) -> list[Units]:
        """For calls that make new units (channels, features) with weights: where they lie."""
        return []

    def summed(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        """For products of activations: each axis that is summed over, as it lies in each input."""
        return []

    def products(self, call: Call) -> list[list[tuple[fx.Node, int]]]:
        """The axes whose sizes multiply to its FLOPs, up to a factor; a list for each product.

        By default those of the output, and what `summed` says.
        """
        if call.shape and not isinstance(call.shape[0], int):
            return []
        return [[*each_axis(call.node), *(sides[0] for sides in self.summed(call))]]

    def labels(self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace) -> Any:
        """Axes of the output (a tuple of them for several outputs)."""
        raise NotImplementedError

    def value(self, call: Call, known: Knowledge) -> Any:
        """Value of the output (a tuple of them for several outputs)."""
        return None

    def live(self, call: Call, decision: Decision) -> np.ndarray | None:
        """The part of the decision that ``reads`` depends on: which output positions matter."""
        return None

    def reads(self, call: Call, known: Knowledge, live: np.ndarray | None) -> Iterator[Read]:
        """What the call consumes: axes of its inputs that its output does not carry on."""
        return iter(())

    def rewrite(self, call: Call, plan: PlanBuilder) -> None:
        """Add to the plan what the call needs beyond slicing: constants to move, sizes to set."""


class Opaque(Rule):
    """A function without a rule: whatever touches it stays, and the report says so."""

    def labels(
        self, call: Call, axes: Callable[[Any], Axes], space: LabelSpace, reason: str = ""
    ) -> Any:
        reason = reason or f"goes through {call.name}, which has no rule"
        for node in call.inputs:
            for each in each_output(axes(node)):
                space.pin_all(each, call.node, reason)
        return no_axes(call.shape)


def no_axes(shape: Any) -> Any:
    """Axes without labels for an output shape, or for each of several."""
    if shape and not isinstance(shape[0], int):
        return tuple(None if s is None else no_axes(s) for s in shape)
    return (None,) * len(shape)


OPAQUE = Opaque()
RULES: dict[str, Rule] = {}
R = TypeVar("R", bound=type[Rule])


def rule(*names: str) -> Callable[[R], R]:
    """Register a rule class for the plain names of torch functions; a name has one rule."""

    def register(cls: R) -> R:
        instance = cls()
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name!r}: {type(RULES[name]).__name__}, {cls}")
            RULES[name] = instance
        return cls

    return register


def rule_for(name: str) -> Rule:
    """The rule of a function, by its plain name; without one, that of a call that is opaque."""
    return RULES.get(name, OPAQUE)
