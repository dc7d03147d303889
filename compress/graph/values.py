"""Values in a run on meta: what the inputs alone decide is computed beside it, for real.

Models look at their masks (``if padding_mask.all()``), at lengths and at numbers that they make
themselves. None of that depends on parameters, and all of it is small: so such a model needs no run
on its real parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

LARGEST = 2**18  # entries of a tensor: those of an image, and all are kept for as long as the run
_NOTHING = object()


class InputValues:
    """The real tensor behind each stand-in on meta that no parameter has a part in."""

    def __init__(self) -> None:
        self._real: dict[int, tuple[Tensor, Tensor]] = {}  # held, so that the ids stay theirs
        self._sharing: dict[int, list[int]] = {}  # the ids by memory
        self._device = torch.device("cpu")

    def give(self, stand_in: Tensor, tensor: Tensor) -> None:
        """Say what an input is; a copy of it, as a model may write on its inputs."""
        if tensor.numel() <= LARGEST and not tensor.is_meta:
            self._put(stand_in, tensor.detach().clone())

    def _put(self, stand_in: Tensor, real: Tensor) -> None:
        self._real[id(stand_in)] = stand_in, real
        self._sharing.setdefault(memory_of(stand_in), []).append(id(stand_in))
        self._device = real.device

    def forget(self, stand_in: Tensor) -> None:
        """It was written with something that is not known, and what shares its memory."""
        if self._real:
            for key in (id(stand_in), *self._sharing.pop(memory_of(stand_in), ())):
                self._real.pop(key, None)

    def decides(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors that a call works on if all are known; else None."""
        if args and isinstance(args[0], Tensor) and id(args[0]) not in self._real:
            return None  # nearly all calls
        tensors = _found((args, kwargs), Tensor)
        if tensors:
            return tensors if all(id(tensor) in self._real for tensor in tensors) else None
        return tensors if func in _device_constructors() else None

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """What a call that is decided returns: tensors as stand-ins, anything else as it is.

        ``given``: its tensors, from `decides`.
        Raises:
            Exception: of the call on meta, where it fails for real as well.
        """
        real: Any = _NOTHING
        if _surely_small(args, kwargs, given):
            real, apart = self._for_real(func, args, kwargs, given)
            if apart:
                return tree_map_only(Tensor, self._stand_in, real)
        try:
            result = func(*args, **kwargs)
        except Exception:  # it needs values: bool(mask), nonzero(); or it fails for real, too
            real = self._really(func, args, kwargs) if real is _NOTHING else real
            return tree_map_only(Tensor, self._stand_in, real)
        found, wanted = _found(result, Tensor), _NOTHING
        if all(tensor.numel() <= LARGEST for tensor in found):
            with suppress(Exception):  # only meta can do it
                wanted = self._really(func, args, kwargs) if real is _NOTHING else real
        if wanted is _NOTHING:
            for tensor in given:  # it may have been written
                self.forget(tensor)
            return result
        tensors = _found(wanted, Tensor)
        if [t.shape for t in tensors] != [t.shape for t in found]:
            return tree_map_only(Tensor, self._stand_in, wanted)
        for stand_in, tensor in zip(found, tensors, strict=True):
            self._put(stand_in, tensor)
        return result if found else wanted

    def _for_real(
        self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]
    ) -> tuple[Any, bool]:
        """What a call gives, and whether that is apart from its arguments: no view, none written.

        Then its stand-ins share no memory, and it need not run on meta, where it may take twenty
        times as long.
        """
        known = [self._real[id(tensor)][1] for tensor in given]
        versions = list(map(version_of, known))
        try:
            real = self._really(func, args, kwargs)
        except Exception:  # only meta can do it, perhaps
            return _NOTHING, False
        memory = set(map(memory_of, known))
        views = any(memory_of(tensor) in memory for tensor in _found(real, Tensor))
        return real, not views and list(map(version_of, known)) == versions

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._real[id(value)][1]
            if isinstance(value, tuple):
                return tuple(map(real, value))
            if isinstance(value, list):
                return list(map(real, value))
            if isinstance(value, dict):
                return {key: real(each) for key, each in value.items()}
            if isinstance(value, slice):
                return slice(real(value.start), real(value.stop), real(value.step))
            if isinstance(value, torch.device) and value.type == "meta":
                return self._device
            return self._device if isinstance(value, str) and value == "meta" else value

        return func(*real(args), **real(kwargs))

    def _stand_in(self, real: Tensor) -> Tensor:
        stand_in = torch.empty_like(real, device="meta")
        self._put(stand_in, real)
        return stand_in


def _found(value: Any, kinds: Any) -> list[Any]:
    """Those of some kinds among arguments or results; torch's ``tree_leaves`` takes far longer."""
    if isinstance(value, kinds):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    elif not isinstance(value, (tuple, list)):
        return []
    return [leaf for each in value for leaf in _found(each, kinds)]


def _surely_small(args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> bool:
    """Whether what a call makes has at most `LARGEST` entries, whatever it does.

    They come from the entries of its tensors, each with each, and from its whole numbers.
    """
    numbers = _found((args, kwargs), (int, float))
    if not given and any(isinstance(number, float) for number in numbers):
        return False  # arange(0.0, 1.0, 1e-9)
    sizes = (abs(n) for n in (*(t.numel() for t in given), *numbers) if isinstance(n, int))
    return prod(max(1, size) for size in sizes) <= LARGEST


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; on meta as well."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other exotic layouts
        return id(tensor)
