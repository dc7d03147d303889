"""Winning tickets on digits: sparse networks that train well from their first weights, not others.

    pip install compress-torch[demo]
    python examples/lottery_ticket_digits.py
    python examples/lottery_ticket_digits.py --rewind-step 20

Each round masks more single weights of the trained network, rewinds the rest and trains again
(Frankle & Carbin 2019). Beside each ticket: the same masks on weights drawn anew. With
--rewind-step the weights are those after so many steps (Frankle et al. 2020). The first command
prints, in a quarter of a minute on one core::

    round  weights left    ticket  drawn anew
        0        100.0%    99.17%      98.89%
        1         49.6%    98.89%      98.61%
        2         24.6%    99.44%      98.89%
        3         12.2%    99.44%      95.83%
        4          6.1%    97.50%      95.83%
        5          3.0%    86.67%      64.44%
"""

from __future__ import annotations

import torch
from _digits import DigitNet, Digits, sgd
from _train import parser

from compress import LotteryTicketPruner
from compress.training import fine_tune


def main() -> None:
    options = parser(__doc__, epochs=6)
    options.add_argument("--sparsity", type=float, default=0.97)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--rewind-step", type=int, default=0)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, model = Digits(args.quick, args.device), DigitNet().to(args.device)
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    pruner = LotteryTicketPruner(
        model, [{"sparsity": args.sparsity, "op_types": ["Conv2d", "Linear"]}], optimizer,
        total_iteration=args.rounds, rewind_step=args.rewind_step, lr_scheduler=scheduler,
    )  # fmt: skip
    print("round  weights left    ticket  drawn anew")
    for number in pruner.rounds():
        for _ in range(args.epochs):
            fine_tune(model, data.evaluator, 1, optimizer=optimizer)
            scheduler.step()
        torch.manual_seed(args.seed + 1000 + number)
        other = DigitNet().to(args.device)
        pruner.masks.apply(other)
        data.fit(other, args.epochs)
        left, found = 1 - pruner.masks.sparsity, (data.accuracy(model), data.accuracy(other))
        print(f"{number:5d}  {left:12.1%}  {found[0]:8.2%}  {found[1]:10.2%}")


if __name__ == "__main__":
    main()
