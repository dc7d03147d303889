"""What can be done with a model that a pruner has masked: made plain, and saved."""

from __future__ import annotations

import importlib.util
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError, ConfigError
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
            onnx_path: for an ONNX file of the model in eval mode, if wanted; needs
                ``pip install compress-torch[onnx]``.
            input_shape: shape of the model's input, batch included, for ONNX.
            device: where to run the ONNX export; where the model is, by default.

        Raises:
            CompressError: nothing is masked yet, or what ONNX needs is missing; nothing is written
                then.
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
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompressError(
            f"export_model: onnx_path needs {' and '.join(missing)}, not installed here: "
            "pip install compress-torch[onnx]"
        )


def _export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    device: str | torch.device | None,
) -> None:
    """Export a plain copy of ``model`` in eval mode; ``model`` is not touched."""
    plain = deepcopy(model)
    remove_masks(plain)
    plain.eval()
    if device is not None:
        plain.to(device)
    first = next(plain.parameters())
    # Only the shape of the input counts, so that the user's random state can be left alone.
    sample = torch.zeros(*input_shape, device=first.device, dtype=first.dtype)
    # torch 2.4 has only the exporter without dynamo. The weights go into the one file.
    wanted = {"dynamo": True, "external_data": False}
    known = inspect.signature(torch.onnx.export).parameters
    options: dict[str, Any] = {key: value for key, value in wanted.items() if key in known}

    def write(temporary: Path) -> None:
        torch.onnx.export(plain, (sample,), str(temporary), **options)

    write_atomically(path, write)
