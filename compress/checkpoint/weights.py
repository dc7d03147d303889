"""Weights in safetensors files: written tensor by tensor, read one at a time, with their digests.

The format is 8 bytes (the header's length, little-endian), the header (JSON: each tensor's type,
shape and place), and the tensors' bytes: https://github.com/huggingface/safetensors. The library's
own writer takes all tensors at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.checkpoint.recipe import TensorRecord
from compress.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes: what safetensors reads


@dataclass(frozen=True)
class Layout:
    """The type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {self.shape}"


@dataclass(frozen=True)
class Place(Layout):
    """A tensor that is in a file: ``begin`` is its first byte, counted from the file's."""

    file: Path
    begin: int

    __str__ = Layout.__str__


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.dtype, tuple(tensor.shape))


# -- reading -------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where each tensor of a safetensors file lies, and the file's metadata.

    Raises:
        CheckpointError: the file is missing, truncated, not safetensors, or has a type of numbers
            that this release does not read.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected safetensors")
    try:
        with safe_open(str(file), framework="pt") as checked:  # sizes, places, the header's length
            metadata = dict(checked.metadata() or {})
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(file, name, 8 + length, each) for name, each in header.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: it cannot be read as a safetensors file ({error}): truncated, damaged or of "
            "another kind"
        ) from error
    return places, metadata


def _place(file: Path, name: str, start: int, each: Mapping[str, object]) -> Place:
    dtype, shape, offsets = each["dtype"], each["shape"], each["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} is of the type {dtype!r}; expected one of {', '.join(DTYPES)}"
        )
    assert isinstance(dtype, str)
    assert isinstance(shape, list) and isinstance(offsets, list)  # safe_open has checked it
    return Place(DTYPES[dtype], tuple(shape), file, start + offsets[0])


def read_tensor(place: Place) -> Tensor:
    """A tensor of its own memory."""
    with place.file.open("rb") as stream:
        stream.seek(place.begin)
        data = np.fromfile(stream, np.uint8, place.size)
    if data.nbytes != place.size:
        raise CheckpointError(f"{place.file}: it has become shorter while it was read")
    return torch.from_numpy(data).view(place.dtype).reshape(place.shape)


def map_tensor(place: Place) -> Tensor:
    """A tensor that reads the file where it is looked at; writing to it does not reach the file."""
    if place.size == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    data = np.memmap(place.file, np.uint8, "c", place.begin, (place.size,))
    return torch.from_numpy(data).view(place.dtype).reshape(place.shape)


# -- writing -------------------------------------------------------------------------------


def in_file_order(layouts: Mapping[str, Layout]) -> list[str]:
    """As they are given, but larger numbers first, so that each tensor is aligned."""
    return sorted(layouts, key=lambda name: -layouts[name].dtype.itemsize)


def write_header(
    stream: BinaryIO, layouts: Mapping[str, Layout], metadata: Mapping[str, str]
) -> None:
    """The header of a file whose tensors follow in `in_file_order`."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in in_file_order(layouts):
        each = layouts[name]
        begin, end = end, end + each.size
        header[name] = {
            "dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(
            f"{len(text):,} bytes of names, recipe and provenance are more than the "
            f"{LARGEST_HEADER:,} that a safetensors file may begin with; shorten the provenance"
        )
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)


def write_file(
    file: Path,
    layouts: Mapping[str, Layout],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[Tensor]],
    done: Callable[[str, str], None] | None = None,
) -> None:
    """Write a file, asking ``pieces(name)`` for one tensor after the other, in parts of its rows.

    ``done(name, sha256)`` is told of each that is written.
    """
    with file.open("wb") as stream:
        write_header(stream, layouts, metadata)
        for name in in_file_order(layouts):
            sha256 = hashlib.sha256()
            for piece in pieces(name):
                data = bytes_of(piece)
                stream.write(data)
                if done is not None:
                    sha256.update(data)
            if done is not None:
                done(name, sha256.hexdigest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


# -- records -------------------------------------------------------------------------------


def record_of(tensor: Tensor, persistent: bool = True) -> TensorRecord:
    """What a recipe says of a tensor."""
    return TensorRecord(
        dtype=NAMES[tensor.dtype],
        shape=list(tensor.shape),
        sha256=hashlib.sha256(bytes_of(tensor)).hexdigest(),
        stride=list(tensor.stride()) if _is_permuted(tensor) else None,
        persistent=persistent,
    )


def _is_permuted(tensor: Tensor) -> bool:
    """Whether it fills its memory, though not row by row as a new tensor does."""
    plain = torch.empty(tensor.shape, device="meta").stride()
    return tensor.stride() != plain and _fills_memory(tensor.shape, tensor.stride())


def _fills_memory(shape: tuple[int, ...] | torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether no two places are the same number, and none is left over."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return all(step <= max(1, prod(shape)) for step in stride)


def read_checked(name: str, place: Place, record: TensorRecord) -> Tensor:
    """A tensor, laid out as it was, if it is what the recipe says; raises CheckpointError."""
    tensor = read_tensor(place)
    if hashlib.sha256(bytes_of(tensor)).hexdigest() != record.sha256:
        raise CheckpointError(
            f"{place.file}: the numbers of {name} are not those that were written (their SHA-256 "
            "differs): the file is damaged, or belongs to another recipe"
        )
    if record.stride is None:
        return tensor
    laid_out = torch.empty_strided(record.shape, record.stride, dtype=tensor.dtype)
    return laid_out.copy_(tensor)


def record_problems(places: Mapping[str, Place], records: Mapping[str, TensorRecord]) -> list[str]:
    """Where weights are not those of a recipe, by what the headers tell."""
    problems = [f"{name}: it is not in the weights" for name in records if name not in places]
    problems += [f"{name}: the recipe does not know it" for name in places if name not in records]
    for name, record in records.items():
        if name not in places:
            continue
        place, expected = places[name], f"{record.dtype} {tuple(record.shape)}"
        if str(place) != expected:
            problems.append(f"{name}: it is {place}, and the recipe says {expected}")
        stride = record.stride
        if stride is not None and (
            len(stride) != len(record.shape) or not _fills_memory(place.shape, tuple(stride))
        ):
            problems.append(f"{name}: a stride of {stride} is none of the shape {place.shape}")
    return problems
