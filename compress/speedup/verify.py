"""Compare what two models compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.graph.trace import as_arguments, evaluating, rng_kept, state_kept, tensors_in

# Largest difference, relative to the largest output, that rounding explains.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.complex128: 1e-8,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def outputs_of(model: nn.Module, dummy_input: Any) -> list[torch.Tensor]:
    """All output tensors in eval mode, with a fixed seed; mode and random state as before."""
    args, kwargs = as_arguments(dummy_input)
    with torch.no_grad(), state_kept(model, values=True), evaluating(model), rng_kept():
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(model(*args, **kwargs))]


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """max |expected - got| / max |expected|; inf where shapes, or NaNs and infinities, differ."""
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, got) else float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, got = expected.to(wide), got.to(wide)
    finite = torch.isfinite(expected)
    same = torch.where(finite, got, expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    scale = float(torch.where(finite, expected, 0).abs().max())
    difference = float(torch.where(finite, (expected - same), 0).abs().max())
    return difference / scale if scale > 0 else difference


def largest_error(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """The largest relative error over all outputs."""
    if len(expected) != len(got):
        return float("inf")
    return max(map(relative_error, expected, got), default=0.0)


def tolerance_for(tensors: list[torch.Tensor]) -> float:
    return max((TOLERANCE.get(t.dtype, 0.0) for t in tensors), default=0.0)
