"""Automated gradual pruning while a network trains on digits (Zhu & Gupta 2017).

    pip install compress-torch[demo]
    python examples/agp_digits.py
    python examples/agp_digits.py --algorithm l1 --sparsity 0.5 --tensorboard runs

Single weights go by default; l1, l2, fpgm take whole filters. With --tensorboard sparsity, loss and
accuracy of each epoch are written for it. The first command prints, in ten seconds on one core::

    epoch  sparsity    loss  accuracy
        0     0.00%   1.229    87.22%
        2     0.00%   0.109    90.00%
      …
        6    74.56%   0.070    97.50%
        8    86.65%   0.133    94.72%
       10    89.86%   0.069    98.33%
       14    89.99%   0.024    99.17%
    8,423 of 10,138 parameters are 0
"""

from __future__ import annotations

from typing import Any

import torch
from _digits import DigitNet, Digits, sgd
from _train import parser
from torch.nn import functional as F

from compress import AGPPruner
from compress.schedule.bases import ALGORITHMS


def main() -> None:
    options = parser(__doc__, epochs=15)
    options.add_argument("--sparsity", type=float, default=0.9)
    options.add_argument("--algorithm", choices=list(ALGORITHMS), default="level")
    options.add_argument("--tensorboard", metavar="DIR", help="a folder to log to")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, model = Digits(args.quick, args.device), DigitNet().to(args.device)
    optimizer = sgd(model.parameters())
    types = ["BatchNorm2d"] if args.algorithm == "slim" else ["Conv2d"]
    config_list = [{"initial_sparsity": 0.0, "final_sparsity": args.sparsity, "start_epoch": 2,
                    "end_epoch": max(4, args.epochs - 3), "op_types": types}]  # fmt: skip
    pruner = AGPPruner(
        model, config_list, optimizer, pruning_algorithm=args.algorithm, evaluator=data.evaluator
    )
    pruner.compress()
    log = writer(args.tensorboard)
    print("epoch  sparsity    loss  accuracy")
    for epoch in range(args.epochs):
        pruner.update_epoch(epoch)
        losses = []
        for images, labels in data.loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        row = {
            "sparsity": pruner.masks.sparsity,
            "loss": sum(losses) / len(losses),
            "accuracy": data.accuracy(model),
        }
        for name, value in row.items() if log is not None else ():
            log.add_scalar(name, value, epoch)
        print(f"{epoch:5d}  {row['sparsity']:8.2%}  {row['loss']:6.3f}  {row['accuracy']:8.2%}")
    if log is not None:
        log.close()
    pruner.unwrap_model()
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{zeros:,} of {total:,} parameters are 0")


def writer(folder: str | None) -> Any:
    """A SummaryWriter of torch's, or None."""
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


if __name__ == "__main__":
    main()
