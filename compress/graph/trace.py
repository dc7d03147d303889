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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from compress.graph.meta import quick_result
from compress.graph.values import InputValues

if TYPE_CHECKING:
    from compress.graph.jumps import Jump, Jumps, Settled

# Reads of a tensor that never see its values: no data flows through them.
METADATA = frozenset(
    "dim ndim dtype device layout requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_nested "
    "is_quantized is_sparse is_complex is_floating_point is_contiguous is_leaf is_inference "
    "is_signed is_pinned is_conj is_neg stride storage_offset element_size itemsize data_ptr type "
    "get_device names grad grad_fn _version _base _backward_hooks output_nr __hash__ __repr__ "
    "untyped_storage storage is_same_size retains_grad is_shared is_mkldnn is_vulkan __format__ "
    "is_tensor _is_view is_storage result_type can_cast _has_compatible_shallow_copy_type "
    "is_mtia is_maia is_ipu is_xla is_sparse_csr _assert get_default_dtype".split()
)
# Reads of a size: what the forward does next may depend on them.
SIZES = frozenset("shape size numel nelement __len__ nbytes".split())

_SKIPPED = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent.parent) + os.sep)


def stale_alias(tensor: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Stand for a tensor whose memory was written through another name (always opaque)."""
    raise NotImplementedError("only ever a node of a trace")


def read_value(tensor: torch.Tensor) -> None:
    """Stand for Python code that looked at a tensor's values (always opaque)."""
    raise NotImplementedError("only ever a node of a trace")


_NAMES: dict[Any, str] = {}


def function_name(func: Any) -> str:
    """The plain name of a torch function: ``add_`` and ``Tensor.add`` are both ``add``."""
    name = getattr(func, "__name__", None) or str(func)
    if name in ("__get__", "__set__"):
        # Before Python 3.13 a property written in Python has no name, but its function does.
        attribute: str = getattr(func.__self__, "__name__", None) or func.__self__.fget.__name__
        return attribute if name == "__get__" else f"set_{attribute}"
    known = _NAMES.get(func)
    if known is None:
        known = _NAMES[func] = _plain_name(func, name)
    return known


def _plain_name(func: Callable[..., Any], name: str) -> str:
    if name == "fn":  # torch's boolean_dispatch: max_pool2d, with indices or without
        inner = [c.cell_contents for c in func.__closure__ or () if callable(c.cell_contents)]
        name = min((f.__name__.lstrip("_") for f in inner), key=len, default=name)
    if name in METADATA or name in SIZES:
        return name
    return name.strip("_")


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


class Recorder(TorchFunctionMode):
    """Turn the torch functions of a run into the nodes of an fx graph.

    With ``on_meta`` new tensors are made on the meta device, and ``values`` are those that the
    inputs decide. ``jumps`` is what keeps the jumps of a run on real tensors, or settles them.
    ``made`` is the memory of all that the run has computed so far, where that is kept (`Made`).
    """

    def __init__(
        self,
        on_meta: bool,
        jumps: Jumps | Settled | None = None,
        made: set[int] | None = None,
    ) -> None:
        super().__init__()
        self.on_meta = on_meta
        self.jumps = jumps
        self.made = made
        self.values = InputValues()
        self.graph = fx.Graph()
        self.leaves: dict[str, fx.Node] = {}
        self.outputs: list[fx.Node] = []
        self.effects: list[fx.Node] = []
        self.size_reads: list[tuple[fx.Node, str]] = []
        self.complete = True
        self.partial = False
        self.module_path = ""
        self.training = False
        self._nodes: dict[int, fx.Node] = {}
        # Every tensor by its memory (views, detached ones); ids are unique while tensors live.
        self._sharing: dict[int, list[torch.Tensor]] = {}
        self._written: dict[int, fx.Node] = {}
        self._announced: dict[int, tuple[str, torch.Tensor, str]] = {}

    # -- leaves ----------------------------------------------------------------------------

    def announce(self, path: str, stand_in: torch.Tensor, tensor: torch.Tensor, kind: str) -> None:
        """Name a parameter or buffer; its node is made when it is first used.

        The first name counts: a module may hold its parameters in a plain list as well.
        """
        self._announced.setdefault(id(stand_in), (path, tensor, kind))
        self._sharing.setdefault(_memory(stand_in), []).append(stand_in)

    def placeholder(self, index: int, stand_in: torch.Tensor) -> None:
        node = self.graph.placeholder(f"input_{index}")
        node.meta = {"name": "input", "module": "", "source": None}
        node.meta["strides"] = stand_in.stride() if stand_in.layout == torch.strided else None
        self._register(node, stand_in)

    # -- recording -------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        if name in SIZES:
            if args and isinstance(args[0], torch.Tensor):
                self.size_reads.append((self.node(args[0]), self.module_path))
            return func(*args, **kwargs)
        target = kwargs["out"] if "out" in kwargs else args[0] if args else None
        target = target if isinstance(target, torch.Tensor) else None
        version = None if target is None else _version(target)
        # The arguments become nodes before the call: in place, it changes what they stand for.
        node_args = (self._as_nodes(args), self._as_nodes(kwargs))
        decided = self.on_meta and self.values.decide(func, args, kwargs)
        quick = self.on_meta and not decided
        result = quick_result(name, func, args, kwargs) if quick else None
        if result is None:
            result = self._run(func, types, args, kwargs, decided)
        elif result is target:
            version = -1  # written
        if name == "set_data" or (target is not None and _writes_uncounted(func, target, kwargs)):
            version = -1
        if target is not None and not decided and _version(target) != version:
            for each in self._sharing.get(_memory(target), ()):
                self.values.forget(each)
        self._note(name, func, node_args, target, version, result)
        return result

    def _run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any], decided: bool) -> Any:
        """The call itself. Other modes would see every look at a tensor that we take, too."""
        if self.on_meta and func in _device_constructors() and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if decided:
            return self.values.run(func, args, kwargs)
        if self.jumps is not None:
            return self.jumps.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)

    def _note(
        self, name: str, func: Any, node_args: Any, target: Any, version: int | None, result: Any
    ) -> None:
        """Make the node of a call that wrote ``target``, or returned ``result``, or both."""
        if target is not None and _version(target) != version:
            self._write(self._call(name, func, *node_args), target)
        elif isinstance(result, torch.Tensor):
            if result is not target:  # contiguous(), dropout in eval: the same tensor
                self._register(self._call(name, func, *node_args), result)
        elif any(True for _ in tensors_in(result)):
            self._register_many(self._call(name, func, *node_args), result)
        elif result is not None and any(isinstance(a, fx.Node) for a in node_args[0]):
            self.effects.append(self._call("read_value", read_value, *node_args))

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", func, name=name)
        node.args = args  # create_node() would search it for symbols, which takes as long again
        if kwargs:
            node.kwargs = kwargs
        node.meta = {"name": name, "module": self.module_path, "source": _source()}
        node.meta |= {"shape": (), "dtype": None}  # until an output is registered
        node.meta["training"] = self.training
        return node

    def _register(self, node: fx.Node, tensor: torch.Tensor) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["dtype"] = tensor.dtype
        self._nodes[id(tensor)] = node
        self._written.pop(id(tensor), None)
        self._sharing.setdefault(_memory(tensor), []).append(tensor)

    def _register_many(self, node: fx.Node, result: Any) -> None:
        items = list(result.values() if isinstance(result, Mapping) else result)
        node.meta["shape"] = tuple(
            tuple(t.shape) if isinstance(t, torch.Tensor) else None for t in items
        )
        for key, item in enumerate(items):
            if isinstance(item, torch.Tensor):
                part = self._call("getitem_output", operator.getitem, (node, key), {})
                self._register(part, item)
            elif next(tensors_in(item), None) is not None:
                self.complete = False

    def _write(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """``tensor`` was written in place: now it is ``node``; what shares its memory is stale.

        Where it was ``x[index]``, x is now what ``x[index] = node`` makes of it.
        """
        before = self._nodes.get(id(tensor))
        part = before is not None and _is_part(before) and node.meta["name"] != "set_data"
        source, index = before.args if part and before is not None else (None, None)
        sharing = [t for t in self._sharing.get(_memory(tensor), ()) if t is not tensor]
        whole = [t for t in sharing if self._nodes.get(id(t)) is source is not None]
        whole = [t for t in whole if id(t) not in self._written]
        for other in sharing:
            self._written[id(other)] = node
        self.effects.append(node)
        self._register(node, tensor)
        for other in whole[:1]:
            written = self._call("setitem", torch.Tensor.__setitem__, (source, index, node), {})
            self.effects.append(written)
            self._register(written, other)

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
            self.complete &= self.made is not None and _memory(tensor) not in self.made
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
            self._sharing.setdefault(_memory(tensor), []).append(tensor)
        return node

    def _as_nodes(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node(value)
        if isinstance(value, list):
            return [self._as_nodes(v) for v in value]
        if isinstance(value, tuple):
            return tuple(self._as_nodes(v) for v in value)
        if isinstance(value, dict):
            return {k: self._as_nodes(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._as_nodes(v) for v in (value.start, value.stop, value.step)))
        return value

    def finish(self, output: Any) -> None:
        for node in (self.node(tensor) for tensor in tensors_in(output)):
            node.meta["output"] = True
            self.outputs.append(node)

    def finish_early(self) -> None:
        """The run broke off: what nothing has used yet counts as an output."""
        self.partial = True
        used = set(self.outputs)
        for node in self.graph.nodes:
            if node.op == "call_function" and not node.users and node not in used:
                node.meta["output"] = True
                self.outputs.append(node)


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keep the memory of all tensors that are computed under this mode, in ``memory``.

    It sees what scripted code does, too. Numbers that become a tensor are not computed from any.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()
        self._alive: list[Any] = []  # addresses are unique while their tensors live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # that would be recorded
            result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in tensors_in(result):
                self.memory.add(_memory(tensor))
                self._alive.append(tensor)
        return result


def _is_part(node: fx.Node) -> bool:
    """Whether a node is ``x[index]`` by numbers and slices: a view."""
    if node.op != "call_function" or node.meta["name"] != "getitem" or node.kwargs:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)


def is_output(node: fx.Node) -> bool:
    """Whether the model returns what a node stands for."""
    return bool(node.meta.get("output", False))


def location(node: fx.Node) -> str:
    """``layer1.0 (resnet.py:92)``: where in the user's model a node comes from."""
    source = node.meta["source"]
    where = f"{source[0].rpartition('/')[2]}:{source[1]}" if source else ""
    module = node.meta["module"] or "the model's forward"
    return f"{module} ({where})" if where else module


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _writes_uncounted(func: Any, tensor: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes an inference tensor, by its name: ``add_``, ``__setitem__``."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return tensor.is_inference() and (in_place or "out" in kwargs or bool(kwargs.get("inplace")))


def _memory(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; on meta as well."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other exotic layouts
        return id(tensor)


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, dataclasses and plain objects, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, int, float, torch.Size, nn.Module)) or depth > 8:
        return
    if isinstance(value, Mapping):
        members = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        members = list(value)
    elif is_dataclass(value):
        members = [getattr(value, f.name) for f in fields(value)]
    else:
        members = list(getattr(value, "__dict__", {}).values())
    for member in members:
        yield from tensors_in(member, depth + 1)


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
