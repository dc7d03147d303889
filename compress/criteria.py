"""What a unit of a weight is worth: pure functions from a weight to one score per unit.

A unit is a filter (an output channel) in all criteria but `magnitude`, where it is one entry. Low
scores go first. Scores are computed in float32 at least, on the weight's device; no criterion knows
a sparsity.

``axis`` is the axis of the weight that the output channels lie on: 0 for convolutions
``(out, in/groups, k...)`` and linear layers ``(out, in)``, 1 for transposed convolutions
``(in, out/groups, k...)``, where ``groups`` tells the groups' channels apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

# fpgm compares blocks of filters with all filters; this many distances at a time are kept (64 MB).
_DISTANCES_AT_A_TIME = 2**24


def filters(weight: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """The filters as rows: ``(output channels, entries per channel)``, float32 at least.

    ``groups`` matters for ``axis=1`` only: entry ``(i, j)`` of a transposed convolution's weight
    ``(in, out/groups, k...)`` belongs to output channel ``g·out/groups + j``, where ``g`` is the
    group of input channel ``i``.
    """
    weight = weight.detach()
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    if axis == 0:
        return weight.reshape(weight.shape[0], -1)
    inputs, outputs = weight.shape[0], weight.shape[1]
    grouped = weight.reshape(groups, inputs // groups, outputs, -1)
    return grouped.transpose(1, 2).reshape(groups * outputs, -1)


def l1(weight: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Σ|w| of each filter, ``(out,)``: Li et al. 2017, Pruning Filters for Efficient ConvNets."""
    return filters(weight, axis, groups).abs().sum(dim=1)


def l2(weight: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """√Σw² of each filter, ``(out,)``: the ℓ2 norm that Li et al. 2017 compare theirs with."""
    norms: Tensor = torch.linalg.vector_norm(filters(weight, axis, groups), dim=1)
    return norms


def fpgm(weight: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Σⱼ‖wᵢ − wⱼ‖₂ of each filter, ``(out,)``: low where the others can replace it.

    He et al. 2019, Filter Pruning via Geometric Median, eq. 6. Distances are taken as differences,
    not through a matrix product, so that equal filters are at distance exactly 0.
    """
    rows = filters(weight, axis, groups)
    block = max(1, _DISTANCES_AT_A_TIME // max(1, len(rows)))
    exact = "donot_use_mm_for_euclid_dist"
    blocks: tuple[Tensor, ...] = torch.split(rows, block)
    sums = [torch.cdist(some, rows, compute_mode=exact).sum(dim=1) for some in blocks]
    return torch.cat(sums)


def random(weight: Tensor, axis: int = 0, groups: int = 1, *, generator: torch.Generator) -> Tensor:
    """A uniform score in [0, 1) for each filter, ``(out,)``: the baseline of every comparison.

    Drawn on the generator's device, so that a CPU generator gives the same on every machine.
    """
    units = weight.shape[0] if axis == 0 else groups * weight.shape[1]
    return torch.rand(units, generator=generator, device=generator.device).to(weight.device)


def magnitude(weight: Tensor) -> Tensor:
    """|w| of each entry, flat, ``(numel,)``: Han et al. 2015, Learning Weights and Connections."""
    weight = weight.detach().flatten()
    return (weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight).abs()
