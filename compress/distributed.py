"""The same masks in every process of a distributed training."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn

from compress.masks import Masks, applied_masks, suspend_masks


def process_count() -> int:
    """How many processes train together; 1 where ``torch.distributed`` is not initialised."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return int(distributed.get_world_size())


def process_rank() -> int:
    """Which of them this is, from 0."""
    return int(distributed.get_rank()) if process_count() > 1 else 0


def broadcast_masks(model: nn.Module) -> Masks:
    """Give ``model`` the masks that it has in the first process, in place; returns them.

    For pruners that look at data, of which each process has another part. Every process has to call
    it; the weights under the masks have to be the same in all, as DDP keeps them. With one process
    nothing happens.

    Args:
        model: the model itself, not its ``DistributedDataParallel``.
    """
    own = applied_masks(model)
    if process_count() == 1:
        return own
    first: list[Any] = [{path: dict(entries) for path, entries in own.to("cpu").items()}]
    distributed.broadcast_object_list(first, src=0)
    masks = Masks(first[0])
    if masks != own:
        suspend_masks(model)
        masks.apply(model)
    return masks


def gathered(value: Any) -> list[Any]:
    """The ``value`` of each process, in all of them."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * process_count()
    distributed.all_gather_object(found, value)
    return found


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if process_count() > 1:
        distributed.barrier()
