"""Run a model, once, so that nothing of it is different after; and record the run.

Mode, random state, what the forward sets on its modules, buffers and inputs: all are put back.
"""

from __future__ import annotations

import gc
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import is_dataclass
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from compress.errors import TraceError
from compress.graph.jumps import Jumps
from compress.graph.trace import Recorder, Trace
from compress.graph.unseen import Made
from compress.graph.walk import Modules, leaves_of, modules_of
from compress.graph.watch import Watch, tensors_in
from compress.modules import standing_in

# What torch keeps of a module: parameters, hooks and the like.
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_REGISTRIES = ("_parameters", "_buffers", "_modules")
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
def evaluating(
    model: nn.Module, training: bool = False, modules: Modules | None = None
) -> Iterator[None]:
    """The model in eval mode; each module gets its own mode back.

    With ``training`` the modules are in train mode, but for batch norms: they would refuse a batch
    of one and update their statistics. ``modules``: those of the model, where they are at hand.
    """
    modules = modules_of(model) if modules is None else modules
    modes = [(module, module.training) for _, module in modules]
    try:
        if training or any(mode for _, mode in modes):
            model.train(training)
        for module, _ in modes if training else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


@contextmanager
def state_kept(model: nn.Module, values: bool, modules: Modules | None = None) -> Iterator[None]:
    """What a run sets on the modules (caches, counters) is undone.

    With ``values`` also what it writes into buffers, and into tensors that are no buffers, such as
    the running sums of a metric. ``modules``: those of the model, where they are at hand.
    """
    layouts: dict[tuple[str, ...], tuple[str, ...]] = {}  # modules of one class share their names
    saved: list[tuple[nn.Module, tuple[str, ...], tuple[Any, ...]]] = []
    contents: list[tuple[Any, Any]] = []
    for _, module in modules_of(model) if modules is None else modules:
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
    members = vars(module)  # a scripted module has none of the registries
    for registry in (members[name] for name in _REGISTRIES if name in members):
        yield registry, copy(registry)
    for _, value in _attributes(module):
        if isinstance(value, _CONTAINERS):
            for container in _containers_in(value):
                yield container, copy(container)


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What the user's code has set on a module, but for numbers and strings."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _MODULE_INTERNALS and not isinstance(value, _PLAIN)
    ]


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
    """Random states are the same after as before: torch's on every device, Python's and numpy's."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
def _module_paths(modules: Modules, watch: Watch) -> Iterator[None]:
    """Keep ``watch.module_path`` at the path of the module that is running."""
    paths = {id(module): path for path, module in modules}
    stack: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(watch.module_path)
        watch.module_path = paths.get(id(module), watch.module_path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.module_path = stack.pop()

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


def run_watched(model: nn.Module, dummy_input: Any, watch: Watch) -> None:
    """Run the model once under ``watch``, and again in train mode if it wants that.

    Errors of the model pass through, but for those in train mode, which ``watch`` is told.
    """
    stand_ins, on_meta, modules = {}, watch.on_meta, modules_of(model)

    def with_values(tensor: torch.Tensor) -> torch.Tensor:
        found = _to_meta(tensor)
        watch.values.give(found, tensor)
        return found

    for path, tensor, kind in leaves_of(model, modules):
        stand_ins[path] = tensor
        if on_meta:
            numbers = kind == "buffer" and not tensor.dtype.is_floating_point  # positions, say
            stand_ins[path] = with_values(tensor) if numbers else _to_meta(tensor)
        watch.announce(path, stand_ins[path], tensor, kind)
    for path, tensor in _plain_tensors(modules):
        watch.announce(path, tensor, tensor, "constant")
    args, kwargs = as_arguments(dummy_input, with_values if on_meta else torch.clone)
    for index, tensor in enumerate(tensors_in((args, kwargs))):
        watch.placeholder(index, tensor)

    def run(training: bool) -> None:
        watch.training = training
        with evaluating(model, training, modules):
            with watch:
                if on_meta:
                    output = functional_call(model, stand_ins, args, kwargs)
                else:
                    output = model(*args, **kwargs)
            watch.finish(results(model, output))

    kept = state_kept(model, not on_meta, modules)
    paths, ours = _module_paths(modules, watch), standing_in(module for _, module in modules)
    with torch.no_grad(), rng_kept(), kept, ours, eager(), paths:
        run(training=False)
        if watch.wants_training():
            try:
                run(training=True)
            except Exception as error:  # a head that is too deep for this input, say
                watch.broke_off(error)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    stand_in = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
    return stand_in


def _plain_tensors(modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold as ordinary attributes: constants of the forward."""
    seen: set[int] = set()  # a configuration that every module holds, say
    for path, module in modules:
        for name, value in _attributes(module):
            if id(value) not in seen:
                seen.add(id(value))
                for tensor in tensors_in(value, depth=7):
                    yield f"{path}.{name}" if path else name, tensor


def record(model: nn.Module, dummy_input: Any, masked: Masked = nullcontext) -> Trace:
    """Run the model once in eval mode and return what it did.

    Modules that eval mode does not reach (auxiliary heads) are recorded in a second run in train
    mode. Mode, random state and parameters are as before. A model that looks at its data runs
    within ``masked()``, where the parameters have the values that count. Errors: ``TraceError``
    where the model does not run on ``dummy_input``; the model's own error is its cause.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model is a {type(model).__name__}: scripted code runs outside Python and cannot be "
            "recorded; pass the model before torch.jit.script, and script the small one"
        )
    trace = _record(model, dummy_input, masked, None)
    if trace.complete:
        return trace
    # A tensor came from nowhere: out of a cache of earlier runs, or out of code that we cannot see?
    try:
        with Made() as made:
            return _record(model, dummy_input, masked, made.memory)
    except TraceError:  # some code does not run under such a mode: all stays
        return trace


def _record(model: nn.Module, dummy_input: Any, masked: Masked, computed: set[int] | None) -> Trace:
    """The same, with the memory of what runs compute (filled meanwhile) where that is kept."""
    recorder = Recorder(on_meta=True, computed=computed)
    try:
        run_watched(model, dummy_input, recorder)
    except Exception as error:  # it looks at its data, or keeps tensors of its own: run for real
        if any(tensor.is_meta for _, tensor, _ in leaves_of(model)):
            raise TraceError(
                f"{type(model).__name__} has parameters without values (meta device) and does not "
                f"run so: {type(error).__name__}: {error}. Does it look at its data? Load it to a "
                "device first."
            ) from error
        recorder = Recorder(on_meta=False, jumps=Jumps(), computed=computed)
        with masked():
            try:
                run_watched(model, dummy_input, recorder)
            except Exception as caught:
                raise does_not_run(model, dummy_input, caught) from caught
    return recorder.trace()


def does_not_run(model: nn.Module, dummy_input: Any, error: Exception) -> TraceError:
    """The error to raise where the model fails on the user's dummy input."""
    shapes = [tuple(t.shape) for t in tensors_in(dummy_input)]
    return TraceError(
        f"{type(model).__name__} does not run on dummy_input (tensors of shape {shapes}): "
        f"{type(error).__name__}: {error}. Pass what model(*args) takes: a tensor, a tuple of "
        "arguments or a dict of keyword arguments, on the model's device."
    )
