"""Prune a trained network: mask, shrink, fine-tune.

    pip install compress-torch[demo]
    python examples/prune_after_training.py
    python examples/prune_after_training.py --pruner taylor --sparsity 0.7

The first command prints, in ten seconds on one core::

    dense         epoch 5/5  loss 0.003  test accuracy 98.33%    4.5 s
    1,226,442 -> 201,425 parameters (16.4% left), largest difference to the masked model 1.5e-07
    fine-tuned    epoch 2/2  loss 0.144  test accuracy 96.94%    0.6 s
                   accuracy     parameters      mult-adds   size MB   latency ms (p10–p90)
     ──────────────────────────────────────────────────────────────────────────────────────
      dense          98.33%         1.23 M        12.10 M      4.92       1.30 (1.25–1.39)
      small           9.72%   0.20 M (16%)   2.00 M (17%)      0.81       0.40 (0.39–0.46)
      fine-tuned     96.94%   0.20 M (16%)   2.00 M (17%)      0.81       0.39 (0.38–0.46)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import argparse
import copy

import torch
from _data import digits
from _train import accuracy, comparison, fit, loaders, parser, resnet8

from compress import Evaluator, L1FilterPruner, ModelSpeedup, TaylorFOWeightFilterPruner


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = digits(size=8)
    train, test = loaders(data, args.quick)
    example = data.test[0][0].unsqueeze(0).to(args.device)

    model = fit("dense", resnet8().to(args.device), train, test, args.epochs)
    models = {"dense": copy.deepcopy(model)}

    config_list = [{"sparsity": args.sparsity, "op_types": ["Conv2d"]}]
    coupled = {"mode": "dependency_aware", "dummy_input": example}
    if args.pruner == "taylor":
        evaluator = Evaluator(train, torch.nn.functional.cross_entropy)
        pruner = TaylorFOWeightFilterPruner(model, config_list, evaluator, **coupled)
    else:
        pruner = L1FilterPruner(model, config_list, **coupled)
    model, masks = pruner.compress()
    speedup = ModelSpeedup(model, example, masks)
    small = speedup.speedup_model()
    print(speedup.report.summary())
    models["small"] = copy.deepcopy(small)

    models["fine-tuned"] = fit("fine-tuned", small, train, test, args.fine_tuning_epochs, lr=0.02)

    print(comparison(models, example, lambda each: accuracy(each, test)))


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=5, fine_tuning=2)
    options.add_argument("--pruner", choices=["l1", "taylor"], default="l1")
    options.add_argument("--sparsity", type=float, default=0.6, help="of the filters of each layer")
    return options.parse_args()


if __name__ == "__main__":
    main()
