"""Channels go in rounds, and the dense network teaches what is left: digits.

    pip install compress-torch[demo]
    python examples/iterative_distillation.py
    python examples/iterative_distillation.py --sparsity 0.75 --schedule cubic --state rounds.state

In each round the least filters are masked, the network shrinks for real, and is trained against the
dense one. With --state it may be killed and started again. The first command prints, in a quarter
of a minute on one core::

    round  channels      cut  recalibrated  trained
        1    13, 26   79.44%        95.00%   98.89%
        2    11, 21   81.39%        96.39%   98.89%
        3     9, 17   30.56%        95.56%   98.33%
        4     7, 13   84.72%        92.78%   98.61%
              accuracy     parameters      mult-adds   size MB   latency ms (p10–p90)
     ─────────────────────────────────────────────────────────────────────────────────
      dense     99.17%        10.14 k         0.60 M     0.041       0.10 (0.09–0.12)
      small     98.61%   2.04 k (20%)   0.11 M (18%)     0.008       0.08 (0.07–0.10)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import copy

import torch
from _digits import DigitNet, Digits, sgd
from _train import comparison, parser

from compress import Evaluator, IterativePruner
from compress.schedule.schedules import SCHEDULES
from compress.training import Distillation, recalibrate_batch_norms


def main() -> None:
    options = parser(__doc__, epochs=5)
    options.add_argument("--sparsity", type=float, default=0.6, help="of the channels")
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--schedule", choices=list(SCHEDULES), default="exponential")
    options.add_argument("--state", metavar="FILE", help="to stop and go on with")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, dense = Digits(args.quick, args.device), DigitNet().to(args.device)
    data.fit(dense, 2 * args.epochs)
    model = copy.deepcopy(dense)
    teaching = Evaluator(
        data.loader, optimizer_factory=sgd, loss=Distillation(dense, data.evaluator)
    )
    pruner = IterativePruner(
        model, [{"sparsity": args.sparsity, "op_types": ["Conv2d"]}], None, "l1",
        total_iteration=args.rounds, schedule=args.schedule, speedup=True, state=args.state,
        dummy_input=data.sample, pruning_params={"mode": "dependency_aware"},
    )  # fmt: skip
    print("round  channels      cut  recalibrated  trained")
    for number in pruner.rounds():
        found = [data.accuracy(model)]
        recalibrate_batch_norms(model, data.evaluator)
        found.append(data.accuracy(model))
        data.fit(model, args.epochs, teaching)
        found.append(data.accuracy(model))
        channels = f"{model.conv1.out_channels}, {model.conv2.out_channels}"
        print(f"{number:5d}  {channels:>8}  {found[0]:7.2%}  {found[1]:12.2%}  {found[2]:7.2%}")
    print(comparison({"dense": dense, "small": model}, data.sample, data.accuracy))


if __name__ == "__main__":
    main()
