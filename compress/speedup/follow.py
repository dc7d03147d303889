"""Make the model's own code follow a plan: set the attributes it counts with, or keep the sizes.

A forward that says ``view(b, n, -1, self.head_dim)`` follows when ``head_dim`` is set. Where one
attribute serves several tensors, they must keep equally many; where the size is a literal in the
source, it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from compress.graph.channels import ChannelGraph
from compress.graph.labels import Axis, EqualParts, Labels
from compress.graph.trace import location
from compress.rules.registry import Call, rule_for
from compress.speedup.decide import Decision
from compress.speedup.plan import Attribute
from compress.speedup.replay import Mismatch, expected_shape

PartsOf = Callable[[fx.Node, fx.Node, int], "Labels | None"]

_REASON = "has its size as a number in the code"


class Follower:
    """Answers to the mismatches of one speedup, remembered from try to try."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self._tried: dict[tuple[str, str], tuple[Attribute, fx.Node]] = {}
        self._hopeless: set[fx.Node] = set()
        self._coupled: set[tuple[tuple[str, str], fx.Node, fx.Node]] = set()
        self._guessed: bool | None = None
        # Attributes that the module's code compares with a size that it reads.
        self._compared: set[tuple[str, str]] = set()
        # Attributes that had the value of another, and were not meant; and those that were.
        self._barred: set[tuple[str, str]] = set()
        self._needed: set[tuple[str, str]] = set()

    def guess(self, decision: Decision) -> None:
        """Set at once what calls will want, going by the sizes that they were given.

        A size that the same module has read off a tensor by then follows by itself. All this is
        taken back where a re-run leaves the plan and there is nothing more to set.
        """
        if self._guessed is not None:
            return
        read = _sizes_read(decision)
        order = {node: i for i, node in enumerate(self.graph.trace.nodes)}
        for step in self.graph.steps:
            if step.rule.sized(step.call):
                node = step.call.node
                numbers = _changed_by_number(decision, step.call)
                for tensor, sizes in read.get(step.call.module, ()):
                    if order[tensor] < order[node]:
                        numbers -= sizes.keys()
                wanted = matching_attributes(self.graph, decision, node) if numbers else []
                self._set([a for a in wanted if type(a.old) is not int or a.old in numbers], node)
        self._guessed = bool(self._tried)

    def attributes(self, decision: Decision) -> list[Attribute]:
        """What to set under a decision: what its call still wants, with the value it now wants."""
        wanted = {
            (path, attribute.name, node): attribute
            for path, read in _sizes_read(decision).items()
            for node, sizes in read
            for attribute in self._held(path, sizes)
            if (path, attribute.name) in self._compared
        } | {
            (attribute.module, attribute.name, node): attribute
            for node in {node for _, node in self._tried.values()}
            for attribute in matching_attributes(self.graph, decision, node, parts=True)
        }
        found = [wanted.get((*key, node)) for key, (_, node) in self._tried.items()]
        return [attribute for attribute in found if attribute is not None]

    def pin_unset(self, nodes: list[fx.Node]) -> None:
        """Keep what needs a number that no attribute holds."""
        news = [self.graph.pin(node, None, _REASON) for node in nodes]
        if not any(news):
            self.graph.pin_everything(f"{_REASON}: {location(nodes[0])}")

    def answer(self, decision: Decision, mismatch: Mismatch) -> None:
        """Change what is set, or what may go, so that the next try gets further."""
        node, reason = mismatch.node, f"{_REASON} ({mismatch.got})"
        if mismatch.decided_in is not None and self._set_compared(decision, mismatch.decided_in):
            return
        split = partial(self._split, decision)
        if self._equalise_all(node, split) or self._set_more(decision, mismatch):
            return
        if not mismatch.numbers and self._equalise_all(node, self._given):
            return
        for pin in (_pin_picks, _pin_sizes):
            if pin(decision, node, reason):
                for other in self._same_line(node):
                    pin(decision, other, reason)
                return
        there = f"{_REASON} ({mismatch.got} at {location(node)})"
        if mismatch.numbers and _pin_size_reads(decision, node, there, mismatch.numbers):
            return
        if not _pin_size_reads(decision, node, there):
            self._pin_call(node, reason)

    def _set_compared(self, decision: Decision, module: str) -> bool:
        """Set what a module compares: ``assert c == self.width``, ``if self.width != self.out``."""
        news = False
        for node, sizes in _sizes_read(decision).get(module, ()):
            held = self._held(module, sizes)
            self._compared |= {(module, attribute.name) for attribute in held}
            news |= self._set(held, node)
        return news

    def _held(self, path: str, sizes: Mapping[int, int]) -> list[Attribute]:
        """The attributes of a module that hold some of these sizes, with the new ones."""
        members = vars(self.graph.modules[path]).items()
        held = [(k, v) for k, v in members if k[:1] != "_" and type(v) is int and v in sizes]
        return [Attribute(path, name, value, sizes[value]) for name, value in held]

    def _set_more(self, decision: Decision, mismatch: Mismatch) -> bool:
        """Set other attributes than before, or let what one of them counts keep equally many."""
        node = mismatch.node
        if self._bar_suspect(decision, mismatch):
            return True
        if node in self._hopeless:
            return False
        matching = partial(matching_attributes, self.graph, decision)
        wanted = matching(node)
        set_them = next((s for s in (self._set, self._set_barred) if s(wanted, node)), None)
        if set_them is None:  # the call is in a method of a part of the module, perhaps
            matching = partial(matching, parts=True)
            wanted = matching(node)
            set_them = next((s for s in (self._set, self._set_barred) if s(wanted, node)), None)
        if set_them is None and self._guessed:
            self._guessed = False
            self._tried.clear()
            return True
        if set_them is not None or self._couple(wanted, node):
            for other in self._same_line(node):  # the other blocks will want the same
                (set_them or self._set)(matching(other), other)
            return True
        self._hopeless.add(node)
        self._tried = {key: t for key, t in self._tried.items() if t[1] is not node}
        return False

    def _bar_suspect(self, decision: Decision, mismatch: Mismatch) -> bool:
        """Take back an attribute that was set because it had the value of another one.

        Four heads and a stride of four: where both become two, a size that ought to stay changes.
        """
        wrong = self._may_be_wrong(decision, mismatch)
        for key, (attribute, _) in reversed(self._tried.items()):
            change = (attribute.old, attribute.new)
            if key in self._needed or type(attribute.old) is not int or change not in wrong:
                continue
            of_module = [a for k, (a, _) in self._tried.items() if k[0] == key[0]]
            if sum(a.old == attribute.old for a in of_module) > 1:
                kind = type(self.graph.modules[key[0]])
                barred = {k for k in self._tried if k[1] == key[1] and self._is(k[0], kind)}
                self._barred |= barred - self._needed
                self._tried = {k: t for k, t in self._tried.items() if k not in self._barred}
                return True
        return False

    def _may_be_wrong(self, decision: Decision, mismatch: Mismatch) -> set[tuple[int, int]]:
        """What sizes of a call's output ought to be, and what they have become instead."""
        node = mismatch.node
        expected, got = _flat(expected_shape(decision, node)), _flat(mismatch.shape)
        if mismatch.shape is not None:
            return set(zip(expected, got, strict=True)) if len(expected) == len(got) else set()
        # It was refused: of the sizes that it was given, those that ought to stay are suspect.
        given = rule_for(node.meta["name"]).given_sizes(Call(node))
        stay = {size for axis, size in given.items() if expected[axis] == size}
        return {(a.old, a.new) for a, _ in self._tried.values() if a.old in stay}

    def _is(self, path: str, kind: type[nn.Module]) -> bool:
        return type(self.graph.modules[path]) is kind

    def _pin_call(self, node: fx.Node, reason: str) -> None:
        """The last resorts: keep all that a call works on, or its module, or everything."""
        self._tried.clear()
        if not self.graph.pin(node, None, reason) and not self.graph.pin_module(
            node.meta["module"], reason
        ):
            self.graph.pin_everything(f"{reason}: {location(node)}")

    def _same_line(self, node: fx.Node) -> list[fx.Node]:
        """The other calls of the same function at the same line of the source."""
        return [
            step.call.node
            for step in self.graph.steps
            if step.call.node is not node
            and step.call.name == node.meta["name"]
            and step.call.node.meta["source"] == node.meta["source"]
        ]

    def _set(self, wanted: list[Attribute], node: fx.Node) -> bool:
        """Set attributes that are not set yet, or were set to something else for this call."""
        news = False
        for attribute in wanted:
            key = (attribute.module, attribute.name)
            old = self._tried.get(key)
            if key in self._barred:
                continue
            if old is None or (old[1] is node and old[0] != attribute):
                self._tried[key] = attribute, node
                news = True
        return news

    def _set_barred(self, wanted: list[Attribute], node: fx.Node) -> bool:
        """Set what was taken back: for this call it was meant after all."""
        meant = {(a.module, a.name): (a, node) for a in wanted}
        meant = {key: both for key, both in meant.items() if key in self._barred}
        self._barred -= meant.keys()
        self._needed |= meant.keys()
        self._tried |= meant
        return bool(meant)

    def _couple(self, wanted: list[Attribute], node: fx.Node) -> bool:
        """Where an attribute was set for another call, let both keep equally many."""
        module = node.meta["module"]
        names = {(a.module, a.name) for a in wanted}
        for key, (attribute, other) in list(self._tried.items()):
            if other is node or (key not in names and key[0] != module):
                continue
            if (key, other, node) in self._coupled:
                continue
            self._coupled.add((key, other, node))
            if self._equalise(other, node, attribute.old):
                del self._tried[key]
                return True
        return False

    def _equalise(self, one: fx.Node, other: fx.Node, size: int) -> bool:
        left, right = self._counted_axis(one, size), self._counted_axis(other, size)
        if left is None or right is None:
            fixed = self.graph.space.tie(left, right, other, _REASON)
            assert fixed is None
            return self.graph.renew()
        parts = np.stack([left, right])
        self.graph.space.equal_parts.append(EqualParts(parts, other, counted=True))
        return True

    def _equalise_all(self, node: fx.Node, parts_of: PartsOf) -> bool:
        """For this call and, if that is news, for the same one in the other blocks."""
        news = self._equalise_size_reads(node, parts_of)
        for other in self._same_line(node) if news else ():
            self._equalise_size_reads(other, parts_of)
        return news

    def _equalise_size_reads(self, node: fx.Node, parts_of: PartsOf) -> bool:
        """Where a size that the module read off a tensor is given to this call: equally many.

        ``parts_of(node, read, axis)``: (parts, size), what the call counts as that axis.
        """
        for read, where in self.graph.trace.size_reads:
            if where != node.meta["module"] or read is node or not _one_shape(read):
                continue
            for axis in range(len(read.meta["shape"])):
                key, one = (("", str(axis)), read, node), self.graph.axis(read, axis)
                parts = parts_of(node, read, axis)
                if one is None or parts is None or key in self._coupled:
                    continue
                self._coupled.add(key)
                if (self.graph.root[one] != self.graph.root[parts]).any():
                    parts = np.concatenate([one[None], parts])
                    self.graph.space.equal_parts.append(EqualParts(parts, node, counted=True))
                    return True
        return False

    def _given(self, node: fx.Node, read: fx.Node, axis: int) -> Labels | None:
        """``b, n, c = x.shape`` and later ``y.reshape(b, n, c)``: y's features are x's."""
        size = read.meta["shape"][axis]
        counted = self._counted_axis(node, size)
        return self._pieces(Call(node), size) if counted is None else counted[None]

    def _pieces(self, call: Call, size: int) -> Labels | None:
        """``y.split((c, c, 3), 1)``: the pieces of that size, each with as many features as x."""
        cut = rule_for(call.name).pieces(call)
        labels = None if cut is None else self.graph.axis(call.first, cut[0])
        if cut is None or labels is None:
            return None
        parts = [p for p in np.split(labels, np.cumsum(cut[1])[:-1]) if len(p) == size]
        return np.stack(parts) if parts else None

    def _split(self, decision: Decision, node: fx.Node, read: fx.Node, axis: int) -> Labels | None:
        """``qkv.reshape(b, n, 3, heads, c // heads)``: each third of the features are as x's."""
        call, size = Call(node), read.meta["shape"][axis]
        members = vars(self.graph.modules[call.module]).values()
        for source_axis, sizes in rule_for(call.name).splits(call):
            held = any(type(value) is int and value == sizes[-1] for value in members)
            if held and expected_shape(decision, read)[axis] == size:
                continue  # it is counted by an attribute
            labels = self.graph.axis(call.first, source_axis)
            if labels is not None and size in [prod(sizes[i:]) for i in range(len(sizes) - 1)]:
                return labels.reshape(-1, size)
        return None

    def _counted_axis(self, node: fx.Node, size: int) -> Axis:
        """The axis of a call's output whose size the caller gave as ``size``."""
        for axis, given in rule_for(node.meta["name"]).given_sizes(Call(node)).items():
            if given == size and node.meta["shape"][axis] == size:
                return self.graph.axis(node, axis)
        return None


def _sizes_read(decision: Decision) -> dict[str, list[tuple[fx.Node, dict[int, int]]]]:
    """By module: the tensors that its forward reads sizes off, with what the plan changes (to)."""
    found: dict[str, list[tuple[fx.Node, dict[int, int]]]] = {}
    for node, module in decision.graph.trace.size_reads:
        before, after = _flat(node.meta["shape"]), _flat(expected_shape(decision, node))
        sizes = {old: new for old, new in zip(before, after, strict=True) if old != new}
        if sizes:
            found.setdefault(module, []).append((node, sizes))
    return found


def _changed_by_number(decision: Decision, call: Call) -> set[int]:
    """The sizes that a call was given by number, and that the plan changes."""
    rule, shape = rule_for(call.name), call.shape
    expected = expected_shape(decision, call.node)
    if expected == shape:
        return set()
    given = rule.given_sizes(call)
    found = {size for axis, size in given.items() if size not in (-1, expected[axis])}
    parts, after = rule.part_sizes(call, shape), rule.part_sizes(call, expected)
    return found | {old for old, new in zip(parts, after, strict=False) if old != new}


def matching_attributes(
    graph: ChannelGraph, decision: Decision, node: fx.Node, parts: bool = False
) -> list[Attribute]:
    """Attributes that hold a size (or sizes) which the plan changes.

    Those of the module a call ran in; if there is none, or with ``parts``, of the parts that it is
    made of (a model may ask ``self.block.hidden_size``).
    """
    changed: dict[int, int] = {}
    for each in (node, *node.all_input_nodes):
        sizes = zip(_flat(each.meta["shape"]), _flat(expected_shape(decision, each)), strict=True)
        changed |= {old: new for old, new in sizes if old != new}
    path = node.meta["module"]
    module = graph.modules[path]
    found = _attributes(module, path, changed, decision, node)
    for child in module.children() if parts or not found else ():
        if not type(child).__module__.startswith("torch."):  # theirs are set with their parameters
            # Under the path that it has in the plan, if others have it, too.
            found += _attributes(child, graph.module_paths[child], changed, decision, node)
    return found


def _attributes(
    module: nn.Module, path: str, changed: dict[int, int], decision: Decision, node: fx.Node
) -> list[Attribute]:
    """Attributes of one module that hold sizes of a call."""
    call, rule = Call(node), rule_for(node.meta["name"])
    members = {k: v for k, v in vars(module).items() if k[:1] != "_"}
    parts = rule.part_sizes(call, node.meta["shape"])
    if parts:
        after = rule.part_sizes(call, expected_shape(decision, node))
        lists = {k: type(v) for k, v in members.items() if type(v) in (list, tuple)}
        several = [
            Attribute(path, name, members[name], kind(after))
            for name, kind in lists.items()
            if members[name] == kind(parts)
        ]
        if several:
            return several
    found = [
        Attribute(path, name, value, changed[value])
        for name, value in members.items()
        if type(value) is int and value in changed
    ]
    given = rule.given_sizes(call).values()
    return [attribute for attribute in found if attribute.old in given] or found


def _flat(shape: Any) -> list[int]:
    return [s for s in tree_leaves(shape) if s is not None]


def _one_shape(node: fx.Node) -> bool:
    """Whether a node stands for one tensor, not for several."""
    shape = node.meta["shape"]
    return not shape or isinstance(shape[0], int)


def _pin_size_reads(
    decision: Decision, at: fx.Node, reason: str, numbers: Mapping[float, float] | None = None
) -> bool:
    """Keep the sizes that a module's forward has read by a call; returns whether that was news.

    ``b, n, c = x.shape`` and later ``y.reshape(b, n, c)``: the size of x is counted as one of y.
    With ``numbers``, only those sizes that change as one of these does: ``x / c**0.5`` has another
    number, but ``x / torch.tensor(c).sqrt()`` tells which it is.
    """
    news, nodes = False, decision.graph.trace.nodes
    made = set(nodes[: nodes.index(at)])
    for node, where in decision.graph.trace.size_reads:
        if where != at.meta["module"] or node not in made:
            continue
        shape, expected = node.meta["shape"], expected_shape(decision, node)
        if shape != expected and _one_shape(node):
            axes = [i for i, size in enumerate(shape) if size != expected[i]]
            if numbers is not None:
                axes = [i for i in axes if numbers.get(shape[i]) == expected[i]]
            news |= bool(axes) and decision.graph.pin(node, axes, reason)
    return news


def _pin_picks(decision: Decision, node: fx.Node, reason: str) -> bool:
    """Keep the axes of which the code takes positions by number; returns whether that was news."""
    call = Call(node)
    for axis in rule_for(call.name).picks(call):
        labels = decision.graph.axis(call.first, axis)
        decision.graph.space.pin(labels, node, "is sliced at a fixed position")
    return decision.graph.renew()


def _pin_sizes(decision: Decision, node: fx.Node, reason: str) -> bool:
    """Keep the axes whose sizes the code gives by number; returns whether that was news."""
    given = rule_for(node.meta["name"]).given_sizes(Call(node))
    expected = expected_shape(decision, node)
    axes = [i for i, size in given.items() if size != expected[i]]
    return bool(axes) and decision.graph.pin(node, axes, reason)
