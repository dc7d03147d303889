"""What can be done with a model that a pruner has masked: made plain, and saved."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from compress.errors import CompressError, ConfigError
from compress.export.onnx_file import ONNX_PACKAGES, require_onnx, to_onnx
from compress.files import write_atomically
from compress.masks import Masks, masked_state_dict, remove_masks


class MaskedModel(ABC):
    """A model, and the masks that a pruner has put on it."""

    model: nn.Module

    @property
    @abstractmethod
    def masks(self) -> Masks:
        """A copy of the masks of now."""

    def unwrap_model(self) -> nn.Module:
        """Write the masks' zeros into the parameters and take the masks off, in place.

        Returns:
            The same model, now a plain one: same classes, names and `Parameter` objects. A second
            call changes nothing.
        """
        remove_masks(self.model)
        return self.model

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Save the pruned model, as NNI v1 does; the model is as masked as before.

        Args:
            model_path: for its ``state_dict()`` with the masks applied, under the plain names.
            mask_path: for the masks, if wanted (safetensors).
            onnx_path: for an ONNX file of the model in eval mode, if wanted, as
                `compress.export.to_onnx` writes and checks it; needs
                ``pip install compress-torch[onnx]``.
            input_shape: shape of the model's input, batch included, for ONNX; it takes no other.
            device: where to run the ONNX export; where the model is, by default.

        Raises:
            CompressError: nothing is masked yet, or what ONNX needs is missing; nothing is written
                then. The model cannot be exported; there is no ONNX file then.
        """
        masks = self.masks
        if not masks:
            raise CompressError(f"{type(self).__name__} has no masks yet; call compress() first")
        if onnx_path is not None:
            _check_onnx(input_shape)
        state = masked_state_dict(self.model)
        write_atomically(model_path, lambda path: torch.save(state, path))
        if mask_path is not None:
            masks.save(mask_path)
        if onnx_path is not None and input_shape is not None:
            _export_onnx(self.model, onnx_path, input_shape, device)


def _check_onnx(input_shape: Sequence[int] | None) -> None:
    if input_shape is None:
        raise ConfigError(
            "export_model: got onnx_path without input_shape; expected the shape of the model's "
            "input, such as input_shape=(1, 3, 224, 224)"
        )
    require_onnx("export_model: onnx_path", ONNX_PACKAGES)


def _export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    device: str | torch.device | None,
) -> None:
    """Write ONNX for one input of this shape; ``model`` is not touched."""
    if device is not None:
        model = deepcopy(model).to(device)
    first = next(model.parameters())
    # Drawn by a generator of its own, so that the user's random state can be left alone.
    sample = torch.randn(*input_shape, generator=torch.Generator().manual_seed(0))
    to_onnx(model, sample.to(first.device, first.dtype), path, dynamic_batch=False)
