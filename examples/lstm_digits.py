"""Prune the hidden units of an LSTM: digits, read row by row.

    pip install compress-torch[demo]
    python examples/lstm_digits.py
    python examples/lstm_digits.py --sparsity 0.75

A hidden unit of a layer is a row of each of its four gates. `L1FilterPruner` masks the units whose
weights are smallest, where the config_list names the LSTM, and speedup takes all that goes with
them: their columns in the recurrent weights and in the layer that reads them. The first command
prints, in ten seconds on one core::

    116,170 -> 30,442 parameters (26.2% left), largest difference to the masked model 5.9e-08
    hidden units: 48 of 96
                   accuracy      parameters      mult-adds   size MB   latency ms (p10–p90)
     ───────────────────────────────────────────────────────────────────────────────────────
      dense          97.78%          0.12 M         0.92 M      0.46       0.19 (0.18–0.26)
      masked         78.06%          0.12 M         0.92 M      0.46       0.88 (0.75–2.01)
      small          78.06%   30.44 k (26%)   0.24 M (26%)      0.12       0.15 (0.14–0.24)
      fine-tuned     96.11%   30.44 k (26%)   0.24 M (26%)      0.12       0.14 (0.13–0.28)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import argparse
import copy

import torch
from _data import digits
from _train import accuracy, comparison, fit, loaders, parser
from torch import Tensor, nn

from compress import L1FilterPruner, ModelSpeedup


class Rows(nn.Module):
    """Reads images (n, 1, 8, 8) as sequences of 8 rows; the last state tells the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 96, num_layers=2, batch_first=True)
        self.fc = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.squeeze(1))
        return self.fc(states[:, -1])


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    train, test = loaders(digits(size=8), args.quick)
    example = torch.zeros(1, 1, 8, 8, device=args.device)

    model = Rows().to(args.device)
    fit("dense", model, train, test, args.epochs, optimizer=adam(model, 5e-3))
    models = {"dense": copy.deepcopy(model)}

    config_list = [{"sparsity": args.sparsity, "op_types": ["LSTM"]}]
    model, masks = L1FilterPruner(model, config_list).compress()
    models["masked"] = copy.deepcopy(model)
    speedup = ModelSpeedup(model, example, masks)
    model = speedup.speedup_model()
    print(speedup.report.summary())
    print(f"hidden units: {model.lstm.hidden_size} of 96")
    models["small"] = copy.deepcopy(model)

    optimizer = adam(model, 2e-3)
    fit("fine-tuned", model, train, test, args.fine_tuning_epochs, optimizer=optimizer)
    models["fine-tuned"] = model
    print(comparison(models, example, lambda each: accuracy(each, test)))


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=12, fine_tuning=4)
    options.add_argument("--sparsity", type=float, default=0.5, help="of the hidden units")
    return options.parse_args()


if __name__ == "__main__":
    main()
