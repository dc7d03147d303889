"""Record one run of a model as a ``torch.fx`` graph.

The model runs once under a ``TorchFunctionMode``; every torch function that returns a tensor
becomes a node. There are no leaf modules: parameters and buffers are ``get_attr`` nodes, so a
module, a bare functional call and a tied weight look the same. The run happens on the meta device
where it can (no arithmetic, no memory) and on the real tensors where the model looks at what its
parameters make.
"""

from __future__ import annotations

import operator
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import networkx as nx
import torch
from torch import fx

from compress.graph.jumps import Jump, Jumps, Settled
from compress.graph.values import memory_of
from compress.graph.watch import Watch, shapes_in, tensors_in

_SKIPPED = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent.parent) + os.sep)


def stale_alias(tensor: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Stand for a tensor whose memory was written through another name (always opaque)."""
    raise NotImplementedError("only ever a node of a trace")


def read_value(tensor: torch.Tensor) -> None:
    """Stand for Python code that looked at a tensor's values (always opaque)."""
    raise NotImplementedError("only ever a node of a trace")


@dataclass(frozen=True)
class Trace:
    """One recorded run (or two: in eval mode, and in train mode for modules used only there).

    ``graph`` is the fx graph. A node's ``meta`` holds ``shape`` (a tuple; a tuple of shapes for a
    call that returns several tensors), ``dtype``, ``name`` (the plain function name), and a call's
    ``module`` (the path it ran in), ``source`` (``(file, line)``) and ``training`` (whether it is
    of the run in train mode); a leaf's holds its ``tensor``, an
    input's its ``strides`` (None where it has none).
    ``leaves`` maps parameter and buffer paths to their nodes, where the run used them.
    ``size_reads`` lists the tensors whose sizes Python code looked at, with the module that did.
    ``effects`` are the calls that count though nothing may use their output: they wrote a tensor in
    place, or Python code looked at a value.
    ``training`` is true where the run in train mode was added, ``partial`` where that broke off.
    ``complete`` is false where tensors went through code that the mode cannot see.
    ``jumps`` are the calls, in a run on real tensors, whose results rounding can flip.
    """

    graph: fx.Graph
    nodes: list[fx.Node]
    leaves: dict[str, fx.Node]
    outputs: list[fx.Node]
    effects: list[fx.Node]
    size_reads: list[tuple[fx.Node, str]]
    on_meta: bool
    training: bool
    partial: bool
    complete: bool
    jumps: list[Jump]

    def used(self) -> set[fx.Node]:
        """The nodes that outputs and effects come from; the others are computed for nothing."""
        found = set(self.outputs) | set(self.effects)
        stack = list(found)
        while stack:
            news = [node for node in stack.pop().all_input_nodes if node not in found]
            found.update(news)
            stack += news
        return found

    def networkx(self) -> nx.DiGraph:
        """The same graph as a ``networkx.DiGraph`` from producer to consumer."""
        graph = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node, **{k: node.meta.get(k) for k in ("name", "module", "shape")})
            graph.add_edges_from((source, node) for source in node.all_input_nodes)
        return graph


class Recorder(Watch):
    """Turn the torch functions of a run into the nodes of an fx graph.

    ``training``: whether a run in train mode is to follow; None: if eval mode does not reach all
    parameters. ``broken`` is the error that ended that run. ``computed`` is the memory of all that
    runs have computed so far, where that is kept (`Made`).
    """

    def __init__(
        self,
        on_meta: bool,
        jumps: Jumps | Settled | None = None,
        training: bool | None = None,
        computed: set[int] | None = None,
    ) -> None:
        super().__init__(on_meta, jumps)
        self.computed = computed
        self.broken: Exception | None = None
        self._training = training
        self.graph = fx.Graph()
        self.leaves: dict[str, fx.Node] = {}
        self.outputs: list[fx.Node] = []
        self.effects: list[fx.Node] = []
        self.size_reads: list[tuple[fx.Node, str]] = []
        self.complete = True
        self.partial = False
        self._nodes: dict[int, fx.Node] = {}
        # Every tensor by its memory (views, detached ones); ids are unique while tensors live.
        self._sharing: dict[int, list[torch.Tensor]] = {}
        self._written: dict[int, fx.Node] = {}
        self._parts: dict[int, tuple[torch.Tensor, Any]] = {}  # x[index] that are views, by id
        self._announced: dict[int, tuple[str, torch.Tensor, str]] = {}
        self._parameters: set[str] = set()
        self._evaluated: _Length | None = None

    # -- leaves ----------------------------------------------------------------------------

    def announce(self, path: str, stand_in: torch.Tensor, tensor: torch.Tensor, kind: str) -> None:
        """Name a parameter or buffer; its node is made when it is first used.

        The first name counts: a module may hold its parameters in a plain list as well.
        """
        self._announced.setdefault(id(stand_in), (path, tensor, kind))
        if kind == "parameter":
            self._parameters.add(path)
        self._sharing.setdefault(memory_of(stand_in), []).append(stand_in)

    def placeholder(self, index: int, stand_in: torch.Tensor) -> None:
        node = self.graph.placeholder(f"input_{index}")
        node.meta = {"name": "input", "module": "", "source": None}
        node.meta["strides"] = stand_in.stride() if stand_in.layout == torch.strided else None
        self._register(node, stand_in)

    # -- recording -------------------------------------------------------------------------

    def size_read(self, tensor: torch.Tensor) -> None:
        self.size_reads.append((self.node(tensor), self.module_path))

    def arguments(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._as_nodes(args), self._as_nodes(kwargs) if kwargs else {}

    def made(self, name: str, func: Any, given: Any, result: torch.Tensor) -> None:
        self._register(self._call(name, func, *given), result)
        if name == "getitem":
            source, index = given[0]
            sharing = self._sharing[memory_of(result)]
            whole = (t for t in sharing if self._nodes.get(id(t)) is source)
            self._parts |= {id(result): (tensor, index) for tensor in whole}

    def made_several(self, name: str, func: Any, given: Any, result: Any) -> None:
        node = self._call(name, func, *given)
        node.meta["shape"] = shapes_in(result)
        for key, item in enumerate(result.values() if isinstance(result, Mapping) else result):
            if isinstance(item, torch.Tensor):
                part = self._call("getitem_output", operator.getitem, (node, key), {})
                self._register(part, item)
            elif next(tensors_in(item), None) is not None:
                self.complete = False

    def wrote(self, name: str, func: Any, given: Any, target: torch.Tensor) -> None:
        self._write(self._call(name, func, *given), target)

    def looked(self, given: Any) -> None:
        self.effects.append(self._call("read_value", read_value, *given))

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", func, name=name)
        node.args = args  # create_node() would search it for symbols, which takes as long again
        if kwargs:
            node.kwargs = kwargs
        node.meta.update(  # until an output is registered
            name=name, module=self.module_path, source=_source(), shape=(), dtype=None,
            training=self.training,
        )  # fmt: skip
        return node

    def _register(self, node: fx.Node, tensor: torch.Tensor) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["dtype"] = tensor.dtype
        self._nodes[id(tensor)] = node
        self._written.pop(id(tensor), None)
        self._sharing.setdefault(memory_of(tensor), []).append(tensor)

    def _write(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """``tensor`` was written in place: now it is ``node``; what shares its memory is stale.

        But if it is ``x[index]`` of a tensor x that is not stale, x was written at that index.
        """
        whole, index = self._parts.get(id(tensor), (None, None))
        whole = None if node.meta["name"] == "set_data" else whole
        if whole is not None and id(whole) not in self._written and id(whole) in self._nodes:
            written = (self._nodes[id(whole)], index, node)
            self._write(self._call("setitem", torch.Tensor.__setitem__, written, {}), whole)
        else:
            for other in self._sharing.get(memory_of(tensor), ()):
                if other is not tensor:
                    self._written[id(other)] = node
        self.effects.append(node)
        self._register(node, tensor)

    # -- looking up ------------------------------------------------------------------------

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """The node that the tensor stands for now."""
        node = self._nodes.get(id(tensor))
        if node is None:
            node = self._outside(tensor)
        written = self._written.pop(id(tensor), None)
        if written is not None:
            node = self._call("stale_alias", stale_alias, (node, written), {})
            self._register(node, tensor)
        return node

    def _outside(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor that no recorded function made: a leaf, or the work of code we cannot see."""
        path, value, kind = self._announced.get(id(tensor), ("", tensor, "unseen"))
        if kind == "unseen":
            # A scripted function, say: anything may have flowed into it, if it is of this run.
            self.complete &= self.computed is not None and memory_of(tensor) not in self.computed
            node = self._call("unseen", read_value, (), {})
        else:
            node = self.graph.create_node("get_attr", path, name=path.replace(".", "_"))
            node.meta = {"name": kind, "module": path.rpartition(".")[0], "source": None}
            node.meta["tensor"] = value
            self.leaves[path] = node
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["dtype"] = tensor.dtype
        self._nodes[id(tensor)] = node
        if kind == "unseen":
            self._sharing.setdefault(memory_of(tensor), []).append(tensor)
        return node

    def _as_nodes(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node(value)
        if isinstance(value, tuple):
            return tuple([self._as_nodes(v) for v in value])
        if isinstance(value, list):
            return [self._as_nodes(v) for v in value]
        if isinstance(value, dict):
            return {k: self._as_nodes(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._as_nodes(v) for v in (value.start, value.stop, value.step)))
        return value

    def finish(self, output: Any) -> None:
        for node in (self.node(tensor) for tensor in tensors_in(output)):
            node.meta["output"] = True
            self.outputs.append(node)

    # -- the run in train mode ---------------------------------------------------------------

    def wants_training(self) -> bool:
        """Whether parameters were not reached in eval mode: those of auxiliary heads, say."""
        if self._training is None:
            self._training = bool(self._parameters - self.leaves.keys())
        self._evaluated = self._length() if self._training else None
        return self._training

    def broke_off(self, error: Exception) -> None:
        """A head is too deep for this input, say: what nothing has used yet is an output."""
        self.partial, self.broken = True, error
        used = set(self.outputs)
        for node in self.graph.nodes:
            if node.op == "call_function" and not node.users and node not in used:
                node.meta["output"] = True
                self.outputs.append(node)

    def _trained(self) -> bool:
        """Whether there was a run in train mode that reached more; else nothing of it is kept."""
        before = self._evaluated
        if before is None or len(self.leaves) > before.leaves:
            return before is not None
        for node in set(self.outputs[before.outputs :]) - set(self.outputs[: before.outputs]):
            del node.meta["output"]  # its input, say
        del self.outputs[before.outputs :], self.effects[before.effects :]
        del self.size_reads[before.size_reads :]
        for node in reversed(list(self.graph.nodes)[before.nodes :]):
            self.graph.erase_node(node)
        if isinstance(self.jumps, Jumps):
            del self.jumps.calls[before.jumps :]
        self.complete, self.partial = before.complete, False
        return False

    def trace(self) -> Trace:
        """The record of the run (or of both), once it is done."""
        training = self._trained()
        return Trace(
            graph=self.graph,
            nodes=list(self.graph.nodes),
            leaves=self.leaves,
            outputs=self.outputs,
            effects=self.effects,
            size_reads=self.size_reads,
            on_meta=self.on_meta,
            training=training,
            partial=self.partial,
            complete=self.complete,
            jumps=self.jumps.calls if isinstance(self.jumps, Jumps) else [],
        )

    def _length(self) -> _Length:
        return _Length(
            len(self.graph.nodes), len(self.leaves), len(self.outputs), len(self.effects),
            len(self.size_reads), len(self.jumps.calls) if isinstance(self.jumps, Jumps) else 0,
            self.complete,
        )  # fmt: skip


@dataclass(frozen=True)
class _Length:
    """How much there is of a record."""

    nodes: int
    leaves: int
    outputs: int
    effects: int
    size_reads: int
    jumps: int
    complete: bool


def is_output(node: fx.Node) -> bool:
    """Whether the model returns what a node stands for."""
    return bool(node.meta.get("output", False))


def location(node: fx.Node) -> str:
    """``layer1.0 (resnet.py:92)``: where in the user's model a node comes from."""
    source = node.meta["source"]
    where = f"{source[0].rpartition('/')[2]}:{source[1]}" if source else ""
    module = node.meta["module"] or "the model's forward"
    return f"{module} ({where})" if where else module


def raised_by_users_code(error: BaseException) -> bool:
    """Whether an error comes from code that is neither torch's nor ours: an assertion, say."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return not frame.f_code.co_filename.startswith(_SKIPPED)


def _source() -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_SKIPPED):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None
