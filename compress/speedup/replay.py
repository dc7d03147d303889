"""Run the shrunk model and hold each call against the plan: does its own code count as expected?

A forward may take sizes from its inputs (they follow), from attributes (they are set) or from
literals in the source (the channels they count must stay). The re-run tells which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from compress.graph.jumps import Settled
from compress.graph.run import run_watched
from compress.graph.watch import Watch, shapes_in
from compress.rules.registry import Call, rule_for
from compress.speedup.decide import Decision

Numbers = Mapping[fx.Node, Mapping[float, float]]


@dataclass(frozen=True)
class Mismatch:
    """The first call at which the re-run leaves the plan, and how.

    ``numbers``: the numbers among its arguments that are others now, by what they were. ``shape``:
    that of what it gave; None where it gave nothing.
    """

    node: fx.Node
    got: str
    numbers: dict[float, float] = field(default_factory=dict)
    shape: Any = None


def expected_shape(decision: Decision, node: fx.Node) -> Any:
    """The shape of a node's output (or of each of several) once the plan is carried out."""

    def one(axes: Any, shape: Any) -> Any:
        if shape is None:
            return None
        pairs = zip(axes, shape, strict=True)
        return tuple(s if a is None else decision.size(a) for a, s in pairs)

    axes, shape = decision.graph.axes[node], node.meta["shape"]
    if shape and not isinstance(shape[0], int):
        return tuple(one(a, s) for a, s in zip(axes, shape, strict=True))
    return one(axes, shape)


def needs_replay(decision: Decision) -> bool:
    """Whether any size that the plan changes was counted, or given, by the model's own code."""
    graph = decision.graph

    def changes(node: fx.Node) -> bool:
        return bool(expected_shape(decision, node) != node.meta["shape"])

    if any(changes(node) for node, _ in graph.trace.size_reads):
        return True
    sized = (s.call.node for s in graph.steps if s.rule.sized(s.call))
    return any(changes(node) or any(map(changes, node.all_input_nodes)) for node in sized)


def replay(
    model: nn.Module, dummy_input: Any, decision: Decision, numbers: Numbers
) -> Mismatch | None:
    """Run the shrunk model and hold it against the plan, call by call.

    ``numbers``: those that the plan changes, by the call that computes with them.
    """
    held = _Held(decision, numbers)
    error = ""
    try:
        run_watched(model, dummy_input, held)
    except Exception as caught:
        error = _in_a_line(caught)
    return held.mismatch or held.at_the_end(error)


class _Left(Exception):
    """The run has left the plan: what comes after does not count."""


class _Held(Watch):
    """Hold each call of a run against the one that was recorded before the cut."""

    def __init__(self, decision: Decision, numbers: Numbers) -> None:
        trace = decision.graph.trace
        jumps = None
        if not trace.on_meta:
            exact = decision.knowledge.constants == "exact"
            jumps = Settled(trace.jumps, None if exact else float("inf"))
        super().__init__(trace.on_meta, jumps)
        self.mismatch: Mismatch | None = None
        self._trace = trace
        self._decision = decision
        self._numbers = numbers
        self._calls = [node for node in trace.nodes if _is_call(node)]
        self._done = 0
        self._error = ""

    def made(self, name: str, func: Any, given: Any, result: Tensor) -> None:
        self._hold(name, given, tuple(result.shape))

    def wrote(self, name: str, func: Any, given: Any, target: Tensor) -> None:
        self._hold(name, given, tuple(target.shape))

    def made_several(self, name: str, func: Any, given: Any, result: Any) -> None:
        self._hold(name, given, shapes_in(result))

    def looked(self, given: Any) -> None:
        self._hold("read_value", given, ())

    def wants_training(self) -> bool:
        return self._trace.training

    def broke_off(self, error: Exception) -> None:
        self._error = _in_a_line(error)

    def _hold(self, name: str, given: Any, shape: Any) -> None:
        if self.mismatch is not None or rule_for(name).vanishes:
            return
        if self._done == len(self._calls):
            raise self._left(self._calls[-1], "it takes another path")
        before = self._calls[self._done]
        got = self._difference(before, name, given, shape)
        if got:
            changed = _changed_numbers(before, given, self._numbers)
            raise self._left(before, got, changed, shape)
        self._done += 1

    def _left(self, *found: Any) -> _Left:
        self.mismatch = Mismatch(*found)
        return _Left(self.mismatch.got)

    def at_the_end(self, error: str) -> Mismatch | None:
        """What is wrong with a run in which no call was; ``error`` is what ended it."""
        error = error or self._error
        if (error and not self._trace.partial) or self._done < len(self._calls):
            node = self._calls[min(self._done, len(self._calls) - 1)]
            return Mismatch(node, error or "it takes another path")
        return None

    def _difference(self, before: fx.Node, name: str, given: Any, shape: Any) -> str:
        if before.meta["name"] != name:
            return f"it calls {name} instead of {before.meta['name']}"
        expected = expected_shape(self._decision, before)
        if expected != shape:
            return f"{name} gives {shape} instead of {expected}"
        call, rule = Call(before), rule_for(name)
        if rule.sized(call) or rule.makes(call):
            return ""  # its numbers are sizes and groups, which the shapes tell
        old, new = _numbers((before.args, before.kwargs)), _numbers(given)
        if old == new and before not in self._numbers:
            return ""
        if _changed_numbers(before, given, self._numbers) or len(old) != len(new):
            return f"{name} computes with another number"
        return ""


def _is_call(node: fx.Node) -> bool:
    """Whether a node is a call of the user's code, and one that a run on its plan repeats."""
    if node.op != "call_function" or node.meta["name"] in ("getitem_output", "stale_alias"):
        return False
    return not rule_for(node.meta["name"]).vanishes


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _changed_numbers(before: fx.Node, given: Any, planned: Numbers) -> dict[float, float]:
    """The numbers of a call that are others now, though the plan does not set them."""
    allowed = planned.get(before, {})
    pairs = zip(_numbers((before.args, before.kwargs)), _numbers(given), strict=False)
    return {old: new for old, new in pairs if allowed.get(old, old) != new}


def _numbers(value: Any) -> list[float]:
    """The numbers among the arguments of a call, in order; slices are sizes."""
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [number for each in value for number in _numbers(each)]
