"""State in one file: safetensors with JSON in its header; whole or not there; nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import StateError
from compress.files import write_atomically
from compress.graph.walk import leaves_of
from compress.masks import suspend_masks
from compress.speedup.encoding import decode_plan, encode_plan
from compress.speedup.plan import Plan

FORMAT = "compress.state"
FORMAT_VERSION = 2
_PLAIN = (type(None), bool, int, float, str)


def write_state(path: str | os.PathLike[str], key: Mapping[str, Any], state: Any) -> None:
    """Write a state under the key of what it belongs to, whole or not at all.

    Args:
        key: JSON values.
        state: of dicts, lists, tuples, numbers, strings, tensors, arrays and plans (of which the
            structure is kept, see `compress.speedup.encoding`).

    Raises:
        StateError: something in it is of no such type, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(state, tensors, "state")
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "hash": digest(key)}
    metadata |= {"key": json.dumps(key), "state": json.dumps(encoded)}
    _remove_leftovers(Path(path))
    try:
        # save_file() would write to a file of a name of its own first, which a kill would leave.
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))
    except (OSError, SafetensorError) as error:
        raise StateError(f"{os.fspath(path)}: the state cannot be saved: {error}") from error


def read_state(path: str | os.PathLike[str], key: Mapping[str, Any]) -> Any:
    """The state of a file that `write_state` wrote under the same key; None where there is none.

    Raises:
        StateError: the file is none, or its key is another one: says what differs.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        return None
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
                raise StateError(
                    f"{name}: no state of a pruner of this release (its format is "
                    f"{metadata.get('format')!r}, version {metadata.get('version')!r}); pass the "
                    "path of another file, or of none"
                )
            _check_key(name, metadata, key)
            tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(
            f"{name}: it cannot be read as a safetensors file ({error}); expected one written by a "
            "pruner's state=; remove it to begin anew"
        ) from error
    return _decode(json.loads(metadata["state"]), tensors)


def digest(key: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def described(value: Any) -> Any:
    """A user's argument as JSON values that are the same in the next run."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): described(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)} {value.dtype}"
    name = getattr(value, "__qualname__", None)
    return type(value).__qualname__ if name is None else f"{value.__module__}.{name}"


def structure(model: nn.Module) -> dict[str, str]:
    """The class of each module and the shape of each parameter and buffer, without masks."""
    with suspend_masks(model):
        found = {
            f"module {path}": parametrize.type_before_parametrizations(module).__qualname__
            for path, module in model.named_modules()
        }
        for path, tensor, kind in leaves_of(model):
            found[f"{kind} {path}"] = f"{tuple(tensor.shape)} {tensor.dtype}"
    return found


def random_state(loader: Any) -> dict[str, Any]:
    """The state of the random numbers of torch, numpy, Python, and a loader's own generators."""
    version, words, gauss = random.getstate()
    name, array, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, list(words), gauss),
        "numpy": (str(name), np.asarray(array).astype(np.int64), *rest),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any], loader: Any) -> None:
    """Go on with the random numbers of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, array, *rest = state["numpy"]
    np.random.set_state((name, array.astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, each in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(each)


# -- what they use -------------------------------------------------------------------------


def _generators(loader: Any) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [each for each in found if isinstance(each, torch.Generator)]


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON values, in which anything but numbers and strings is ``[kind, content]``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        name = str(len(tensors))
        tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return ["array" if isinstance(value, np.ndarray) else "tensor", name]
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]]
    if isinstance(value, Mapping):
        pairs = [
            [_encode(k, tensors, where), _encode(v, tensors, f"{where}[{k!r}]")]
            for k, v in value.items()
        ]
        return ["dict", pairs]
    if isinstance(value, Plan):
        return ["plan", encode_plan(value)]
    raise StateError(
        f"{where}: a {type(value).__name__} cannot be saved; expected numbers, strings, tensors, "
        "and lists, tuples and dicts of them"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        found = [_decode(each, tensors) for each in content]
        return found if kind == "list" else tuple(found)
    return decode_plan(content)


def _check_key(name: str, metadata: Mapping[str, str], key: Mapping[str, Any]) -> None:
    if metadata.get("hash") == digest(key):
        return
    saved, now = _flat(json.loads(metadata["key"])), _flat(json.loads(json.dumps(key)))
    paths = [p for p in dict.fromkeys((*saved, *now)) if saved.get(p) != now.get(p)]
    lines = [
        f"{path}: the file has {saved.get(path, 'nothing')!r}, this is {now.get(path, 'nothing')!r}"
        for path in paths[:5]
    ]
    lines += [f"and {len(paths) - 5} more"] if len(paths) > 5 else []
    told = "\n  ".join(lines)
    raise StateError(
        f"{name}: this state belongs to something else; pass the same arguments, or the path of "
        f"another file:\n  {told}"
    )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(v, f"{path}.{k}" if path else k) for k, v in value.items()]
    elif isinstance(value, list) and value:
        parts = [_flat(v, f"{path}[{i}]") for i, v in enumerate(value)]
    else:
        return {path: value}
    return {name: each for part in parts for name, each in part.items()}


def _remove_leftovers(path: Path) -> None:
    """What writing left when it was killed."""
    for temporary in path.parent.glob(f".{path.name}.????????"):
        temporary.unlink(missing_ok=True)
