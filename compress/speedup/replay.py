"""Run the shrunk model once more: does its own code count as the plan expects?

A forward may take sizes from its inputs (they follow), from attributes (they are set) or from
literals in the source (the channels they count must stay). The re-run tells which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from compress.graph.jumps import Settled
from compress.graph.run import run_watched
from compress.graph.trace import Recorder, raised_by_users_code
from compress.graph.watch import Watch, shapes_in
from compress.rules.registry import Call, rule_for
from compress.speedup.decide import Decision

# Nodes of a trace that are no calls of the user's code.
_PARTS = frozenset(["getitem_output", "stale_alias"])

Numbers = Mapping[fx.Node, Mapping[float, float]]


@dataclass(frozen=True)
class Mismatch:
    """The first call at which the re-run leaves the plan, and how.

    ``numbers``: the numbers among its arguments that are others now, by what they were. ``shape``:
    that of what it gave; None where it gave nothing. ``decided_in``: the module whose own code,
    before the call, refused a size or went another way.
    """

    node: fx.Node
    got: str
    numbers: dict[float, float] = field(default_factory=dict)
    shape: Any = None
    decided_in: str | None = None


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
    graph, held = decision.graph, _Held(decision, numbers)
    with suppress(Exception):
        run_watched(model, dummy_input, held)
        if held.all_follow():
            return None  # nearly always: else a second graph tells what is wrong
    recorder = Recorder(graph.trace.on_meta, _settled(decision), graph.trace.training)
    caught: Exception | None = None
    try:
        run_watched(model, dummy_input, recorder)
        caught = recorder.broken
    except Exception as broken:
        caught = broken
    error = "" if caught is None else f"{type(caught).__name__}: {caught}".splitlines()[0]
    calls, again = _calls(graph.trace.nodes), _calls(recorder.graph.nodes)
    if _cached(calls) != _cached(again):  # a table for other sizes than before is made anew
        calls, again = _computed(calls), _computed(again)
    for before, after in zip(calls, again, strict=False):
        got = _difference(decision, numbers, before, after)
        if got:
            changed = _changed_numbers(before, after, numbers)
            way = _parting(before, after.meta["module"], after.meta["source"])
            return Mismatch(before, got, changed, after.meta["shape"], way)
    if (error and not graph.trace.partial) or len(again) != len(calls):
        before, module = calls[min(len(again), len(calls) - 1)], recorder.module_path
        by_user = caught is not None and raised_by_users_code(caught)
        way = module if by_user else _parting(before, module, before.meta["source"])
        return Mismatch(before, error or "it takes another path", decided_in=way)
    return None


def _settled(decision: Decision) -> Settled | None:
    """The jumps of the masked model, for a run on real tensors."""
    trace = decision.graph.trace
    if trace.on_meta:
        return None
    exact = decision.knowledge.constants == "exact"
    return Settled(trace.jumps, None if exact else float("inf"))


class _Left(Exception):
    """The run has left the plan."""


class _Held(Watch):
    """Hold each call of a run against the one that was recorded before the cut, with no graph."""

    def __init__(self, decision: Decision, numbers: Numbers) -> None:
        self._trace = decision.graph.trace
        super().__init__(self._trace.on_meta, _settled(decision))
        self._decision = decision
        self._numbers = numbers
        self._ahead = iter([n for n in _calls(self._trace.nodes) if n.meta["name"] not in _PARTS])
        self._left = False

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
        self._left |= not self._trace.partial

    def _hold(self, name: str, given: Any, shape: Any) -> None:
        if rule_for(name).vanishes:
            return
        before = next(self._ahead, None)
        if before is None or self._differs(before, name, given, shape):
            self._left = True  # the user's code may catch the error
            raise _Left

    def _differs(self, before: fx.Node, name: str, given: Any, shape: Any) -> bool:
        """Whether a call is another one, or one that takes a closer look."""
        if before.meta["name"] != name or expected_shape(self._decision, before) != shape:
            return True
        call, rule = Call(before), rule_for(name)
        picked = [self._decision.graph.axis(call.first, axis) for axis in rule.picks(call)]
        if any(a is not None and self._decision.size(a) < len(a) for a in picked):
            return True
        if picked and _numbers((before.args, before.kwargs), True) != _numbers(given, True):
            return True
        if rule.sized(call) or rule.makes(call):
            return False
        same = _numbers((before.args, before.kwargs)) == _numbers(given)
        return not same or before in self._numbers

    def all_follow(self) -> bool:
        return not self._left and next(self._ahead, None) is None


def _calls(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    calls = (node for node in nodes if node.op == "call_function")
    return [node for node in calls if not rule_for(node.meta["name"]).vanishes]


def _cached(calls: list[fx.Node]) -> int:
    """How many tensors come out of a cache."""
    return sum(node.meta["name"] == "unseen" for node in calls)


def _computed(calls: list[fx.Node]) -> list[fx.Node]:
    """The calls that inputs or parameters have a part in."""
    constant: set[fx.Node] = set()
    for node in calls:
        if constant.issuperset(node.all_input_nodes):
            constant.add(node)
    return [node for node in calls if node not in constant]


def _difference(decision: Decision, numbers: Numbers, before: fx.Node, after: fx.Node) -> str:
    if before.meta["name"] != after.meta["name"]:
        return f"it calls {after.meta['name']} instead of {before.meta['name']}"
    expected, got = expected_shape(decision, before), after.meta["shape"]
    if expected != got:
        return f"{before.meta['name']} gives {got} instead of {expected}"
    call, rule = Call(before), rule_for(before.meta["name"])
    if not same_picks(decision, before, after):
        return f"{before.meta['name']} takes other positions"
    if rule.sized(call) or rule.makes(call):
        return ""  # its numbers are sizes and groups, which the shapes tell
    same_count = len(_numbers_of(before)) == len(_numbers_of(after))
    if _changed_numbers(before, after, numbers) or not same_count:
        return f"{before.meta['name']} computes with another number"
    return ""


def same_picks(decision: Decision, before: fx.Node, after: fx.Node) -> bool:
    """Whether the positions that a call takes by number are what is left of those of before."""
    rule, call = rule_for(before.meta["name"]), Call(before)
    picked = rule.picks(call)
    again = rule.picks(Call(after)) if picked else {}
    for axis, positions in picked.items():
        labels = decision.graph.axis(call.first, axis)
        stays = np.ones(call.first.meta["shape"][axis], bool)
        stays = stays if labels is None else decision.kept(labels)
        expected = (np.cumsum(stays) - 1)[positions][stays[positions]]
        if axis not in again or not np.array_equal(expected, again[axis]):
            return False
    return True


def _parting(before: fx.Node, module: str, source: tuple[str, int] | None) -> str | None:
    """The module that a call and another one in its place ran in, if they are of other code."""
    if (before.meta["module"], before.meta["source"]) == (module, source):
        return None
    pairs = zip(before.meta["module"].split("."), module.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _changed_numbers(before: fx.Node, after: fx.Node, planned: Numbers) -> dict[float, float]:
    """The numbers of a call that are others now, though the plan does not set them."""
    allowed = planned.get(before, {})
    pairs = zip(_numbers_of(before), _numbers_of(after), strict=False)
    return {old: new for old, new in pairs if allowed.get(old, old) != new}


def _numbers(arguments: Any, bounds: bool = False) -> list[float]:
    """The numbers among the arguments of a call, in order; with ``bounds`` those of slices, too."""
    if isinstance(arguments, (int, float)):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = arguments.values()
    elif bounds and isinstance(arguments, slice):
        given = (arguments.start, arguments.stop, arguments.step)
        arguments = [inf if bound is None else bound for bound in given]
    elif not isinstance(arguments, (tuple, list)):
        return []
    return [number for each in arguments for number in _numbers(each, bounds)]


def _numbers_of(node: fx.Node) -> list[float]:
    return _numbers((node.args, node.kwargs))
