"""Tell what code that no function mode sees (scripted, say) has made, from what it found made.

Constants that a model keeps somewhere, such as tables in a cache, come from nowhere as well, but
nothing of the run has flowed into them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compress.graph.values import memory_of
from compress.graph.watch import tensors_in


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
                self.memory.add(memory_of(tensor))
                self._alive.append(tensor)
        return result
