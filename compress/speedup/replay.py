"""Run the shrunk model once more on the recorder: does its own code count as the plan expects?

A forward may take sizes from its inputs (they follow), from attributes (they are set) or from
literals in the source (the channels they count must stay). The re-run tells which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from compress.graph.jumps import Settled
from compress.graph.run import run_recorded
from compress.graph.trace import Recorder, raised_by_users_code
from compress.rules.registry import Call, rule_for
from compress.speedup.decide import Decision

Numbers = Mapping[fx.Node, Mapping[float, float]]


@dataclass(frozen=True)
class Mismatch:
    """The first call (the ``index``-th) at which the re-run leaves the plan, and how.

    ``numbers``: the numbers among its arguments that are others now, by what they were. ``shape``:
    that of what it gave; None where it gave nothing. ``decided_in``: the module whose own code,
    before the call, refused a size or went another way.
    """

    node: fx.Node
    index: int
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
        return tuple(s if a is None else int(decision.kept(a).sum()) for a, s in pairs)

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
    """Record the shrunk model and hold it against the plan, call by call.

    ``numbers``: those that the plan changes, by the call that computes with them.
    """
    graph = decision.graph
    exact = decision.knowledge.constants == "exact"
    jumps = Settled(graph.trace.jumps, None if exact else float("inf"))
    on_meta = graph.trace.on_meta
    recorder, error, by_user = Recorder(on_meta, None if on_meta else jumps), "", False
    try:
        run_recorded(model, dummy_input, graph.trace.training, recorder)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        by_user = raised_by_users_code(caught)
    calls, again = _calls(graph.trace.nodes), _calls(recorder.graph.nodes)
    if _cached(calls) != _cached(again):  # a table for other sizes than before is made anew
        calls, again = _computed(calls), _computed(again)
    for index, (before, after) in enumerate(zip(calls, again, strict=False)):
        got = _difference(decision, numbers, before, after)
        if got:
            changed = _changed_numbers(before, after, numbers)
            way = _parting(before, after.meta["module"], after.meta["source"])
            return Mismatch(before, index, got, changed, after.meta["shape"], way)
    if (error and not graph.trace.partial) or len(again) != len(calls):
        index = min(len(again), len(calls) - 1)
        before, module = calls[index], recorder.module_path
        way = module if by_user else _parting(before, module, before.meta["source"])
        return Mismatch(before, index, error or "it takes another path", decided_in=way)
    return None


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
    if rule.sized(call) or rule.makes(call):
        return ""  # its numbers are sizes and groups, which the shapes tell
    if _changed_numbers(before, after, numbers) or len(_numbers(before)) != len(_numbers(after)):
        return f"{before.meta['name']} computes with another number"
    return ""


def _parting(before: fx.Node, module: str, source: tuple[str, int] | None) -> str | None:
    """The module that a call and another one in its place ran in, if they are of other code."""
    if (before.meta["module"], before.meta["source"]) == (module, source):
        return None
    pairs = zip(before.meta["module"].split("."), module.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _changed_numbers(before: fx.Node, after: fx.Node, planned: Numbers) -> dict[float, float]:
    """The numbers of a call that are others now, though the plan does not set them."""
    allowed = planned.get(before, {})
    pairs = zip(_numbers(before), _numbers(after), strict=False)
    return {old: new for old, new in pairs if allowed.get(old, old) != new}


def _numbers(node: fx.Node) -> list[float]:
    return [v for v in tree_leaves((node.args, node.kwargs)) if isinstance(v, (int, float))]
