"""The masks on a model: read, taken off for a while, or written into the parameters for good."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor, nn

from compress.masks.apply import write_zeros
from compress.masks.parametrization import AppliedMask, applied_to, raw_parameter
from compress.masks.torch_prune import TorchMask, torch_masks
from compress.masks.value import Masks


@dataclass
class SuspendedMasks:
    """Masks taken off a model for a while; also a context manager that restores them.

    Attributes:
        masks: what was applied, empty where nothing was.
    """

    masks: Masks
    _applied: list[AppliedMask | TorchMask] = field(repr=False)

    def restore(self) -> None:
        """Put every mask back where it was. A second call does nothing."""
        while self._applied:
            self._applied[0].put_on()
            self._applied.pop(0)

    def __enter__(self) -> SuspendedMasks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def masks_on_model(model: nn.Module) -> list[AppliedMask | TorchMask]:
    """Every mask on ``model``: ours, and those of ``torch.nn.utils.prune``.

    Raises:
        MaskError: one of them cannot be taken off, or torch's are no masks of whole parameters.
    """
    return [*torch_masks(model), *applied_to(model)]


def applied_masks(model: nn.Module) -> Masks:
    """A copy of the masks that ``model`` computes with now; empty where there are none.

    Those of ``torch.nn.utils.prune`` count, under the plain names.

    A tied parameter is listed under the modules that the masks named; a module registered under
    several paths under the first.
    """
    return _named(masks_on_model(model))


def _named(found: list[AppliedMask | TorchMask]) -> Masks:
    entries: dict[str, dict[str, Tensor]] = {}
    for applied in found:
        if applied.named:
            entries.setdefault(applied.path, {})[applied.name] = applied.mask
    return Masks(entries)


def suspend_masks(model: nn.Module) -> SuspendedMasks:
    """Take all masks off ``model``, ours and torch's: plain parameters with the unmasked values.

    Names, order of the parameters, `Parameter` objects and classes are those of the plain model
    (torch moves what it prunes to the end; there it stays, as after its ``prune.remove``). Other
    people's parametrizations are left alone.
    Raises:
        MaskError: something was parametrised on top of a mask, or torch prunes parameters that
            modules share in one of them only; the model is untouched.
    """
    applied = masks_on_model(model)
    masks = _named(applied)
    for one in applied:
        one.take_off()
    return SuspendedMasks(masks, applied)


def remove_masks(model: nn.Module) -> Masks:
    """Write the zeros of all masks, ours and torch's, into the parameters; take the masks off.

    Returns:
        What was applied, as `applied_masks`. A model without masks is left as it is.

    Raises:
        MaskError: as `suspend_masks`.
    """
    masks = applied_masks(model)
    write_zeros(masks_on_model(model))
    return masks


def masked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` as the plain model has it: plain names in order, masked entries 0.

    ``model`` keeps its masks. Only masked parameters are copied, once each where they are tied.

    Raises:
        MaskError: as `suspend_masks`.
    """
    with suspend_masks(model) as suspended:
        masks = {id(raw_parameter(one.module, one.name)): one.mask for one in suspended._applied}
        state: dict[str, Tensor] = model.state_dict()
        zeroed: dict[int, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            key = id(parameter)
            if key in masks and name in state:
                if key not in zeroed:
                    zeroed[key] = parameter.detach().masked_fill(~masks[key], 0)
                state[name] = zeroed[key]
    return state
