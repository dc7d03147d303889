"""Watch one run of a model: every torch function that it calls, and what becomes of each call.

A model is recorded (`compress.graph.trace`) and, once it has been cut, held against its plan
(`compress.speedup.replay`): both watch a run in the same way, on the meta device where it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from compress.graph.meta import quick_result
from compress.graph.values import InputValues, version_of

if TYPE_CHECKING:
    from compress.graph.jumps import Jumps, Settled

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


class Watch(TorchFunctionMode):
    """See every call of a run that makes tensors, writes one, or looks at one.

    Subclasses say what to do with it. With ``on_meta`` new tensors are made on the meta device, and
    ``values`` are those that the inputs decide. ``jumps`` is what keeps the jumps of a run on real
    tensors, or settles them. ``module_path`` is that of the module which is running, and
    ``training`` whether the run is the one in train mode.
    """

    def __init__(self, on_meta: bool, jumps: Jumps | Settled | None = None) -> None:
        super().__init__()
        self.on_meta = on_meta
        self.jumps = jumps
        self.values = InputValues()
        self.module_path = ""
        self.training = False

    # -- what a subclass may want to know ----------------------------------------------------

    def announce(self, path: str, stand_in: torch.Tensor, tensor: torch.Tensor, kind: str) -> None:
        """A parameter, buffer or constant that the run may use, as ``stand_in``."""

    def placeholder(self, index: int, stand_in: torch.Tensor) -> None:
        """A tensor of the input."""

    def size_read(self, tensor: torch.Tensor) -> None:
        """Python code looked at a size of a tensor."""

    def arguments(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a subclass wants of the arguments; asked before the call, which may write them."""
        return args, kwargs

    def made(self, name: str, func: Any, given: Any, result: torch.Tensor) -> None:
        """A call returned a tensor; ``given`` are its `arguments`."""

    def made_several(self, name: str, func: Any, given: Any, result: Any) -> None:
        """A call returned several tensors in a container."""

    def wrote(self, name: str, func: Any, given: Any, target: torch.Tensor) -> None:
        """A call wrote a tensor in place."""

    def looked(self, given: Any) -> None:
        """Python code looked at the values of a tensor."""

    def finish(self, output: Any) -> None:
        """The run is done, and returned this."""

    def wants_training(self) -> bool:
        """Whether a run in train mode is to follow."""
        return False

    def broke_off(self, error: Exception) -> None:
        """The run in train mode failed."""

    # -- watching ----------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        first = args[0] if args else None
        if name in SIZES:
            if isinstance(first, torch.Tensor):
                self.size_read(first)
            return func(*args, **kwargs)
        given = self.arguments(args, kwargs)
        target = kwargs.get("out", first)
        target = target if isinstance(target, torch.Tensor) else None
        version = None if target is None else version_of(target)
        result = self._run(name, func, types, args, kwargs)
        if target is not None and _is_written(target, version, name, func, kwargs):
            if self.values.decides(func, args, kwargs) is None:
                self.values.forget(target)
            self.wrote(name, func, given, target)
        elif isinstance(result, torch.Tensor):
            if result is not target:  # contiguous(), dropout in eval: the same tensor
                self.made(name, func, given, result)
        elif any(True for _ in tensors_in(result)):
            self.made_several(name, func, given, result)
        elif result is not None and any(isinstance(a, torch.Tensor) for a in args):
            self.looked(given)
        return result

    def _run(self, name: str, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call itself. Other modes would see every look at a tensor that we take, too."""
        if not self.on_meta:
            if self.jumps is None:
                return func(*args, **kwargs)
            return self.jumps.__torch_function__(func, types, args, kwargs)
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        given = self.values.decides(func, args, kwargs)
        if given is not None:
            return self.values.run(func, args, kwargs, given)
        result = quick_result(name, func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


def _is_written(
    tensor: torch.Tensor, version: int | None, name: str, func: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether a call wrote a tensor; those of inference mode do not count, but names tell."""
    if version_of(tensor) != version or name == "set_data":
        return True
    if not tensor.is_inference():
        return False
    own = getattr(func, "__name__", "")
    in_place = own == "__setitem__" or (own.endswith("_") and not own.endswith("__"))
    return in_place or "out" in kwargs or bool(kwargs.get("inplace"))


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


def shapes_in(result: Any) -> tuple[tuple[int, ...] | None, ...]:
    """The shapes of what a call returned in a container; None for what is no tensor."""
    items = result.values() if isinstance(result, Mapping) else result
    return tuple(tuple(t.shape) if isinstance(t, torch.Tensor) else None for t in items)
