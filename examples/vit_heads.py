"""Prune whole heads of a vision transformer, and hidden units of its MLPs: digits.

    pip install compress-torch[demo] timm
    python examples/vit_heads.py
    python examples/vit_heads.py --sparsity 0.75

`heads="auto"` takes whole heads, so that those that stay are as wide as before. The first command
prints, in half a minute on one core::

    dense         epoch 24/24  loss 0.015  test accuracy 97.22%
    fine-tuned    epoch 8/8  loss 0.015  test accuracy 96.39%
    dense: 8×8 + 256, 8×8 + 256, 8×8 + 256, 8×8 + 256
    small: 4×8 + 128, 4×8 + 128, 4×8 + 128, 4×8 + 128
                   accuracy     parameters      mult-adds   size MB   latency ms (p10–p90)
     ──────────────────────────────────────────────────────────────────────────────────────
      dense          97.22%         0.20 M         0.22 M      0.81      0.71 (0.63–13.25)
      masked         94.72%         0.20 M         0.22 M      0.81      1.96 (1.37–14.32)
      small          94.72%   0.10 M (51%)   0.12 M (55%)      0.42      0.62 (0.54–13.07)
      fine-tuned     96.39%   0.10 M (51%)   0.12 M (55%)      0.42      0.61 (0.54–11.66)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import argparse
import copy

import torch
from _data import digits
from _train import accuracy, comparison, fit, loaders, parser
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from compress import Evaluator, ModelSpeedup, TaylorFOWeightFilterPruner


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    train, test = loaders(digits(size=16), args.quick)
    example = torch.zeros(1, 1, 16, 16, device=args.device)

    model = vit().to(args.device)
    fit("dense", model, train, test, args.epochs, optimizer=adam(model, 3e-3))
    models = {"dense": copy.deepcopy(model)}

    pruner = TaylorFOWeightFilterPruner(
        model,
        [{"sparsity": args.sparsity, "op_names_re": [r"attn\.qkv$", r"mlp\.fc1$"]}],
        Evaluator(train, nn.functional.cross_entropy),
        mode="dependency_aware",
        dummy_input=example,
        heads="auto",
    )
    model, masks = pruner.compress()
    models["masked"] = copy.deepcopy(model)
    model = ModelSpeedup(model, example, masks).speedup_model()
    models["small"] = copy.deepcopy(model)

    optimizer = adam(model, 2e-3)
    fit("fine-tuned", model, train, test, args.fine_tuning_epochs, optimizer=optimizer)
    models["fine-tuned"] = model

    for name in ("dense", "small"):
        print(f"{name}: {shape_of(models[name])}")
    print(comparison(models, example, lambda each: accuracy(each, test)))


def vit() -> nn.Module:
    """Four blocks on 4×4 patches of 16×16 pixels."""
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=8
    )


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)


def shape_of(model: nn.Module) -> str:
    blocks = [(each.attn.num_heads, each.attn.head_dim, each.mlp.fc1) for each in model.blocks]
    return ", ".join(f"{heads}×{dim} + {mlp.out_features}" for heads, dim, mlp in blocks)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=24, fine_tuning=8)
    options.add_argument("--sparsity", type=float, default=0.5, help="of heads and hidden units")
    return options.parse_args()


if __name__ == "__main__":
    main()
