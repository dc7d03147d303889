"""What a unit is worth: pure functions of a weight, or of what data says, to a score per unit.

A unit is a filter (an output channel), or one entry in `magnitude`, `lamp`, `wanda`, `movement`,
`connection_sensitivity` and `gradient_flow`. Low scores go first. Scores are computed in float32 at
least, on the weight's device; no criterion knows a sparsity.

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
    return _entries(weight).abs()


def taylor_first_order(weight: Tensor, gradient: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Σ(w·g)² over the entries of each filter, ``(out,)``, to be summed over batches.

    ``gradient`` is the loss's, of the weight's shape. Molchanov et al. 2019, Importance Estimation
    for Neural Network Pruning, section 3: the first-order importance I = (g w)² of each entry, and
    that of a filter as their sum.
    """
    return (filters(weight, axis, groups) * filters(gradient, axis, groups)).square().sum(dim=1)


def optimal_brain_damage(
    weight: Tensor, curvature: Tensor, axis: int = 0, groups: int = 1
) -> Tensor:
    """½ Σ h·w² over the entries of each filter, ``(out,)``.

    LeCun et al. 1990, Optimal Brain Damage: the saliency h·w²/2 of the fourth step of its recipe.
    ``curvature`` is the diagonal of the loss's Hessian, of the weight's shape.
    """
    squares = filters(weight, axis, groups).square()
    return 0.5 * (filters(curvature, axis, groups) * squares).sum(dim=1)


def apoz(zeros: Tensor, count: int) -> Tensor:
    """1 - the share of zeros among each channel's activations, ``(out,)``; low where it is dead.

    ``zeros``, ``(out,)``, counts them among ``count`` activations of a channel. Hu et al. 2016,
    Network Trimming, eq. 1 (Average Percentage of Zeros), from 1 so that the lowest go.
    """
    return 1 - zeros / count


def mean_activation(total: Tensor, count: int) -> Tensor:
    """The mean of each channel's ``count`` activations, ``(out,)``, of their sums ``total``.

    Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference,
    section 2.2.
    """
    return total / count


def lamp(weight: Tensor) -> Tensor:
    """w² / Σ v² over the entries v that are not smaller, for each entry, flat, ``(numel,)``.

    Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning, section 2. Equal
    entries are in the order of their index, as there; a layer's largest entry scores 1, entries of
    0 score 0.
    """
    squares = weight.detach().flatten().double().square()
    ordered, order = squares.sort(stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0)
    return torch.zeros_like(squares).scatter_(0, order, ordered / rest.clamp(min=1e-300))


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w|·‖x‖₂ for each entry, ``(out, in)``; they compete within a row.

    ``weight`` is (out, in); ``norms``, ``(in,)``, are those of each input feature over all tokens.
    Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models, eq. 1.
    """
    norms = norms.to(weight.device)
    return weight.detach().abs().to(norms.dtype) * norms


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|g·w| of each entry, flat, ``(numel,)``: what the loss feels of a gate on that connection.

    ``gradient`` is the loss's, of the weight's shape. Lee et al. 2019, SNIP: Single-shot Network
    Pruning based on Connection Sensitivity, eq. 5 without the sum over all connections, which
    changes no ranking.
    """
    return magnitude(_entries(weight) * _entries(gradient))


def filter_sensitivity(weight: Tensor, gradient: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Σ|g·w| of each filter, ``(out,)``: the sensitivity of all of its connections.

    Not that of one gate for the filter, |Σ g·w|: a norm that follows takes back any scaling of the
    filter, so that this is 0 for all of them.
    """
    product = filters(weight, axis, groups) * filters(gradient, axis, groups)
    return product.abs().sum(dim=1)


def gradient_flow(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """w·Hg of each entry, flat, ``(numel,)``: how much of ‖g‖² rests on it, to first order.

    ``hessian_gradient`` is Hg, the loss's Hessian times its gradient, of the weight's shape. Wang
    et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow: there
    S(-θ) = -θ ⊙ Hg, half the change of ‖g‖² where a weight goes, and the highest go (algorithm 1);
    this is -S, of which the lowest go.
    """
    return _entries(weight) * _entries(hessian_gradient)


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """-w·g for each entry, flat, ``(numel,)``, to be summed over training steps.

    High where training moves a weight away from 0. Sanh et al. 2020, Movement Pruning, eq. 3
    without the learning rate, which changes no ranking.
    """
    return -(_entries(weight) * _entries(gradient))


def _entries(tensor: Tensor) -> Tensor:
    """Flat, ``(numel,)``, float32 at least."""
    tensor = tensor.detach().flatten()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
