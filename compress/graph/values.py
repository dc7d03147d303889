"""Values in a run on meta: what the inputs alone decide is computed beside it, for real.

Models look at their masks (``if padding_mask.all()``), at lengths and at numbers that they make
themselves. None of that depends on parameters, and all of it is small: so such a model needs no run
on its real parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

LARGEST = 2**18  # entries of a tensor: those of an image, and all are kept for as long as the run


class InputValues:
    """The real tensor behind each stand-in on meta that no parameter has a part in."""

    def __init__(self) -> None:
        self._real: dict[int, tuple[Tensor, Tensor]] = {}  # held, so that the ids stay theirs
        self._device = torch.device("cpu")

    def give(self, stand_in: Tensor, tensor: Tensor) -> None:
        """Say what an input is; a copy of it, as a model may write on its inputs."""
        if tensor.numel() <= LARGEST and not tensor.is_meta:
            self._put(stand_in, tensor.detach().clone())

    def _put(self, stand_in: Tensor, real: Tensor) -> None:
        self._real[id(stand_in)] = stand_in, real
        self._device = real.device

    def forget(self, stand_in: Tensor) -> None:
        """It was written with something that is not known."""
        self._real.pop(id(stand_in), None)

    def decide(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether all that a call works on is known."""
        if args and isinstance(args[0], Tensor) and id(args[0]) not in self._real:
            return False  # nearly all calls
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if not tensors:
            return func in _device_constructors()
        return all(id(tensor) in self._real for tensor in tensors)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call that is decided returns: tensors as stand-ins, anything else as it is.

        Raises:
            Exception: of the call on meta, where it fails for real as well.
        """
        try:
            result = func(*args, **kwargs)
        except Exception:  # it needs values: bool(mask), nonzero(); or it fails for real, too
            real = self._really(func, args, kwargs)
            return tree_map_only(Tensor, self._stand_in, real)
        if any(v.numel() > LARGEST for v in tree_leaves(result) if isinstance(v, Tensor)):
            self._forget_written(args, kwargs)
            return result
        try:
            real = self._really(func, args, kwargs)
        except Exception:  # only meta can do it
            self._forget_written(args, kwargs)
            return result
        found, wanted = tree_leaves(result), tree_leaves(real)
        if list(map(_shape, found)) != list(map(_shape, wanted)):
            return tree_map_only(Tensor, self._stand_in, real)
        for stand_in, tensor in zip(found, wanted, strict=True):
            if isinstance(stand_in, Tensor):
                self._put(stand_in, tensor)
        return result if any(isinstance(v, Tensor) for v in found) else real

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._real[id(value)][1]
            if isinstance(value, torch.device) and value.type == "meta":
                return self._device
            return self._device if isinstance(value, str) and value == "meta" else value

        args, kwargs = tree_map(real, (args, kwargs))
        return func(*args, **kwargs)

    def _stand_in(self, real: Tensor) -> Tensor:
        stand_in = torch.empty_like(real, device="meta")
        self._put(stand_in, real)
        return stand_in

    def _forget_written(self, args: Any, kwargs: dict[str, Any]) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.forget(tensor)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)
