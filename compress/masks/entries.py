"""What a user may give as masks, checked and copied; and how problems are told."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import MaskError


def copy_entry(path: object, parameters: object, problems: list[str]) -> dict[str, Tensor]:
    """Boolean copies of one module's masks; what is wrong is added to ``problems``."""
    if not isinstance(path, str):
        problems.append(f"{path!r}: got {typed(path)} as a module path; expected a string")
        return {}
    if not isinstance(parameters, Mapping):
        problems.append(
            f"{path!r}: got {typed(parameters)}; expected a dict {{parameter name: 0/1 tensor}}, "
            "as in {'conv1': {'weight': mask}}"
        )
        return {}
    copied: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if value is None:  # as NNI has it for a layer without bias
            continue
        if not isinstance(name, str) or not name or "." in name:
            problems.append(
                f"{path!r}: got the parameter name {name!r}; expected the parameter's own name, "
                "such as 'weight', and the rest in the module path"
            )
            continue
        problem = _value_problem(value)
        if problem:
            problems.append(f"{full_name(path, name)!r}: {problem}")
        else:
            copied[name] = value.detach().to(torch.bool, copy=True)
    return copied


def _value_problem(value: object) -> str:
    """Why this is no mask; empty if it is one."""
    if not isinstance(value, Tensor):
        return f"got {typed(value)}; expected a tensor of 0 and 1, or of bools"
    if value.is_meta:
        return "got a tensor on the meta device, which has no values; expected 0 and 1, or bools"
    if value.layout != torch.strided or value.is_quantized:
        return f"got a {value.layout} tensor of {value.dtype}; expected a dense one (.to_dense())"
    if value.dtype != torch.bool:
        wrong = value.detach()[~((value == 0) | (value == 1))]
        if wrong.numel():
            return (
                f"got {wrong.numel()} of {value.numel()} entries that are neither 0 nor 1, the "
                f"first {wrong[0].item()}; expected 0 (masked) and 1 (kept), or bools"
            )
    return ""


def raise_all(what: str, problems: list[str]) -> None:
    if problems:
        raise MaskError("\n  ".join([f"{what}:", *problems]))


def typed(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
