"""Run a model, once, so that nothing of it is different after; and record the run.

Mode, random state, what the forward sets on its modules, buffers and inputs: all are put back.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import is_dataclass
from operator import is_not
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from compress.errors import TraceError
from compress.graph.jumps import Jumps
from compress.graph.trace import Made, Recorder, Trace, tensors_in
from compress.graph.walk import leaves_of, modules_of
from compress.modules import standing_in

# What torch keeps of a module: parameters, hooks and the like.
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_REGISTRIES = frozenset(["_parameters", "_buffers", "_modules"])
_PLAIN = (str, int, float, type(None))
_CONTAINERS = (list, dict, set, tuple)

Masked = Callable[[], AbstractContextManager[Any]]


def as_arguments(
    dummy_input: Any, each: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple (or list) of arguments, or a dict of keyword arguments, as a call.

    ``each`` is applied to every tensor: a model may write on its input, and the user's must not
    change.
    """
    dummy_input = tree_map_only(torch.Tensor, each, dummy_input)
    if isinstance(dummy_input, Mapping):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return tuple(dummy_input), {}
    return (dummy_input,), {}


def results(model: nn.Module, output: Any) -> list[torch.Tensor]:
    """The tensors of what a model returned, but for its *state*.

    State is an object (no tensor, no container) that the model returns under the name of an
    argument that takes it back: a cache of keys and values. Nobody but the model reads it, so that
    it may be of the small model's sizes.
    """
    if isinstance(output, Mapping):
        taken = inspect.signature(model.forward).parameters
        output = [value for name, value in output.items() if name not in taken or _is_data(value)]
    return list(tensors_in(output))


def _is_data(value: Any) -> bool:
    """Tensors, containers of them, and plain values: what is read as it is."""
    kinds = (torch.Tensor, Mapping, *_CONTAINERS, *_PLAIN)
    return isinstance(value, kinds) or is_dataclass(value)


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """The model in eval mode; each module gets its own mode back.

    With ``training`` the modules are in train mode, but for batch norms: they would refuse a batch
    of one and update their statistics.
    """
    modes = [(module, module.training) for _, module in modules_of(model)]
    try:
        model.train(training)
        for module, _ in modes:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


@contextmanager
def state_kept(model: nn.Module, values: bool) -> Iterator[None]:
    """What a run sets on the modules (caches, counters) is undone.

    With ``values`` also what it writes into buffers, and into tensors that are no buffers, such as
    the running sums of a metric.
    """
    layouts: dict[tuple[str, ...], tuple[str, ...]] = {}  # modules of one class share their names
    saved: list[tuple[nn.Module, tuple[str, ...], tuple[Any, ...]]] = []
    contents: list[tuple[Any, Any]] = []
    for _, module in modules_of(model):
        names = tuple(vars(module))
        saved.append((module, layouts.setdefault(names, names), tuple(vars(module).values())))
        contents += _contents(module)
    plain = [v for _, _, attributes in saved for v in attributes if isinstance(v, torch.Tensor)]
    tensors = [(t, t.detach().clone()) for t in (*model.buffers(), *plain)] if values else []
    try:
        yield
    finally:
        for module, names, attributes in saved:
            now = vars(module)
            if tuple(now) != names or any(map(is_not, now.values(), attributes)):
                now.clear()
                now.update(zip(names, attributes, strict=True))
        for container, content in contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _contents(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The containers that a forward may fill, each with a copy."""
    for name, value in vars(module).items():
        if name in _REGISTRIES:
            yield value, copy(value)
        elif isinstance(value, _CONTAINERS) and name not in _MODULE_INTERNALS:
            for container in _containers_in(value):
                yield container, copy(container)


def _containers_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """A list, dict or set, and those in it: what a forward may fill (empty ones, too)."""
    if not isinstance(value, _CONTAINERS) or depth > 8:
        return
    if not isinstance(value, tuple):
        yield value
    for member in value.values() if isinstance(value, dict) else value:
        yield from _containers_in(member, depth + 1)


@contextmanager
def rng_kept() -> Iterator[None]:
    """Torch's random state, on every device in use, is the same after as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def eager() -> AbstractContextManager[Any]:
    """Compiled parts run as they are written: function modes cannot see into compiled code."""
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def collector_paused() -> Iterator[None]:
    """No full garbage collections over all of torch while thousands of objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _module_paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep ``recorder.module_path`` at the path of the module that is running."""
    paths = {id(module): path for path, module in modules_of(model)}
    stack: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(recorder.module_path)
        recorder.module_path = paths.get(id(module), recorder.module_path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.module_path = stack.pop()

    registry = nn.modules.module
    handles = [
        registry.register_module_forward_pre_hook(enter),
        registry.register_module_forward_hook(leave),
    ]
    try:
        with warnings.catch_warnings():
            # A compiled part says that hooks fire once more for its wrapper: the stack copes.
            warnings.filterwarnings("ignore", message=".*when there are global hooks")
            yield
    finally:
        for handle in handles:
            handle.remove()


def run_recorded(model: nn.Module, dummy_input: Any, training: bool, recorder: Recorder) -> None:
    """Run the model once (and again in train mode) into ``recorder``; its errors pass through."""
    stand_ins, on_meta = {}, recorder.on_meta

    def with_values(tensor: torch.Tensor) -> torch.Tensor:
        found = _to_meta(tensor)
        recorder.values.give(found, tensor)
        return found

    for path, tensor, kind in leaves_of(model):
        stand_ins[path] = tensor
        if on_meta:
            numbers = kind == "buffer" and not tensor.dtype.is_floating_point  # positions, say
            stand_ins[path] = with_values(tensor) if numbers else _to_meta(tensor)
        recorder.announce(path, stand_ins[path], tensor, kind)
    for path, tensor in _plain_tensors(model):
        recorder.announce(path, tensor, tensor, "constant")
    args, kwargs = as_arguments(dummy_input, with_values if on_meta else torch.clone)
    for index, tensor in enumerate(tensors_in((args, kwargs))):
        recorder.placeholder(index, tensor)
    kept = state_kept(model, values=not on_meta)
    paths = _module_paths(model, recorder)
    with torch.no_grad(), rng_kept(), kept, standing_in(model), eager(), paths:
        for mode in (False, True) if training else (False,):
            recorder.training = mode
            with evaluating(model, mode):
                with recorder:
                    if on_meta:
                        output = functional_call(model, stand_ins, args, kwargs)
                    else:
                        output = model(*args, **kwargs)
                recorder.finish(results(model, output))


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    stand_in = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
    return stand_in


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold as ordinary attributes: constants of the forward."""
    for path, module in modules_of(model):
        for name, value in vars(module).items():
            if name not in _MODULE_INTERNALS and not isinstance(value, _PLAIN):
                for tensor in tensors_in(value, depth=7):
                    yield f"{path}.{name}" if path else name, tensor


def record(model: nn.Module, dummy_input: Any, masked: Masked = nullcontext) -> Trace:
    """Run the model once in eval mode and return what it did.

    Modules that eval mode does not reach (auxiliary heads) are recorded in a second run in train
    mode. Mode, random state and parameters are as before. A model that looks at its data runs
    within ``masked()``, where the parameters have the values that count. Errors: ``TraceError``
    where the model does not run on ``dummy_input``; the model's own error is its cause.
    """
    trace = _record(model, dummy_input, masked, None)
    if trace.complete:
        return trace
    # A tensor came from nowhere: out of a cache of earlier runs, or out of code that we cannot see?
    try:
        with Made() as made:
            return _record(model, dummy_input, masked, made.memory)
    except TraceError:  # some code does not run under such a mode: all stays
        return trace


def _record(model: nn.Module, dummy_input: Any, masked: Masked, made: set[int] | None) -> Trace:
    """The same, with the memory of what runs compute (filled meanwhile) where that is kept."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model is a {type(model).__name__}: scripted code runs outside Python and cannot be "
            "recorded; pass the model before torch.jit.script, and script the small one"
        )
    recorder = Recorder(on_meta=True, made=made)
    try:
        run_recorded(model, dummy_input, False, recorder)
    except Exception as error:  # it looks at its data, or keeps tensors of its own: run for real
        if any(tensor.is_meta for _, tensor, _ in leaves_of(model)):
            raise TraceError(
                f"{type(model).__name__} has parameters without values (meta device) and does not "
                f"run so: {type(error).__name__}: {error}. Does it look at its data? Load it to a "
                "device first."
            ) from error
        with masked():
            recorder = Recorder(on_meta=False, jumps=Jumps(), made=made)
            try:
                run_recorded(model, dummy_input, False, recorder)
            except Exception as caught:
                raise does_not_run(model, dummy_input, caught) from caught
            return _whole_trace(model, dummy_input, recorder)
    return _whole_trace(model, dummy_input, recorder)


def _whole_trace(model: nn.Module, dummy_input: Any, recorder: Recorder) -> Trace:
    """The trace of a run, with a run in train mode added if that reaches more of the model."""
    training = not all(
        path in recorder.leaves for path, _, kind in leaves_of(model) if kind == "parameter"
    )
    if training:
        both = Recorder(recorder.on_meta, None if recorder.on_meta else Jumps(), recorder.made)
        try:
            run_recorded(model, dummy_input, True, both)
        except Exception:  # a head that is too deep for this input, say: what it got so far stays
            both.finish_early()
        training = len(both.leaves) > len(recorder.leaves)
        recorder = both if training else recorder
    return Trace(
        graph=recorder.graph,
        nodes=list(recorder.graph.nodes),
        leaves=recorder.leaves,
        outputs=recorder.outputs,
        effects=recorder.effects,
        size_reads=recorder.size_reads,
        on_meta=recorder.on_meta,
        training=training,
        partial=recorder.partial,
        complete=recorder.complete,
        jumps=recorder.jumps.calls if isinstance(recorder.jumps, Jumps) else [],
    )


def does_not_run(model: nn.Module, dummy_input: Any, error: Exception) -> TraceError:
    """The error to raise where the model fails on the user's dummy input."""
    shapes = [tuple(t.shape) for t in tensors_in(dummy_input)]
    return TraceError(
        f"{type(model).__name__} does not run on dummy_input (tensors of shape {shapes}): "
        f"{type(error).__name__}: {error}. Pass what model(*args) takes: a tensor, a tuple of "
        "arguments or a dict of keyword arguments, on the model's device."
    )
