"""BatchNorm statistics measured anew, for a model whose layers have changed."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import CompressError
from compress.evaluator import Evaluator, device_of
from compress.graph.run import evaluating
from compress.progress import progress_bar
from compress.unchanged import random_kept, values_kept


def recalibrate_batch_norms(
    model: nn.Module,
    evaluator: Evaluator,
    batches: int | None = None,
    *,
    progress: bool = True,
) -> int:
    """Replace running means and variances by their averages over batches; needs no labels.

    Masks and cuts change what arrives at a norm, and its statistics are still of before. Batch
    means, and variances with n − 1, are averaged with equal weights, as torch does with
    ``momentum=None``: Li et al. 2020, EagleEye (adaptive batch normalization); Wu & Johnson
    2021, Rethinking "Batch" in BatchNorm (PreciseBN). All else is in eval mode. Modes,
    momenta, weights and random numbers are as before after it; after an error the statistics, too.

    Args:
        model: masked or small; its norms' running statistics change in place.
        evaluator: gives the batches; no loss is computed.
        batches: how many; None is one pass over all.
        progress: False is no progress bar.

    Returns:
        How many norms there were; those without running statistics have nothing to replace.

    Raises:
        CompressError: the evaluator has no batch.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    with (
        values_kept(model, on_error_only=True),
        random_kept(evaluator.train_loader),
        evaluating(model),
        progress_bar("recalibrating", batches, progress) as advance,
        torch.no_grad(),
    ):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in evaluator.batches(batches, device_of(model)):
                evaluator.forward(model, batch)
                advance()
            _refuse_unused(model, norms)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)


def _refuse_unused(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    names = {id(module): path for path, module in model.named_modules()}
    unused = [names[id(n)] for n in norms if n.num_batches_tracked == 0]
    if unused:
        raise CompressError(
            f"no batch used {', '.join(map(repr, unused))}, so there are no statistics of them; "
            "pass batches that do, or leave the norms as they are"
        )
