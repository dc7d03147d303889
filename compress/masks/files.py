"""Mask files: safetensors, written whole or not at all, read without running anything."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import MaskError
from compress.files import write_atomically
from compress.masks.entries import raise_all

FORMAT = "compress.masks"
FORMAT_VERSION = 1


def write_masks(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Write masks by full name; raises MaskError where the file cannot be written."""
    tensors = {name: mask.cpu().contiguous().clone() for name, mask in masks.items()}
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise MaskError(f"{os.fspath(path)}: the masks cannot be saved: {error}") from error


def read_masks(name: str) -> dict[str, Tensor]:
    """The tensors of a mask file by full name; raises MaskError on anything else."""
    if not os.path.exists(name):
        raise MaskError(f"{name}: no such file; expected one written by Masks.save")
    if not os.path.isfile(name):
        raise MaskError(f"{name}: it is no file; expected one written by Masks.save")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(name, metadata)
            names = file.keys()
            tensors = {key: file.get_tensor(key) for key in names}
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, MaskError):
            raise
        what = f"{name}: it cannot be read as a safetensors file ({error})"
        if _is_of_torch_save(name):
            raise MaskError(
                f"{what}: torch.save wrote it; expected one written by Masks.save. Masks that NNI "
                "saved are read by compress.compat.nni.load_masks"
            ) from error
        raise MaskError(
            f"{what}: truncated, or of another kind; expected one written by Masks.save"
        ) from error
    wrong = [
        f"{key!r}: got {tensor.dtype}; expected bool or uint8"
        for key, tensor in tensors.items()
        if tensor.dtype not in (torch.bool, torch.uint8)
    ]
    raise_all(f"{name}: these are not masks", wrong)
    return tensors


def _is_of_torch_save(name: str) -> bool:
    """Whether a file begins as a zip archive or, before torch 1.6, as a pickle."""
    with open(name, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _check_metadata(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise MaskError(
            f"{name}: a safetensors file, but not of masks (its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); expected one written by Masks.save"
        )
    version = metadata.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= FORMAT_VERSION:
        raise MaskError(
            f"{name}: masks of format version {version!r}; this release reads up to "
            f"{FORMAT_VERSION}; install a newer compress"
        )
