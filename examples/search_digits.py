"""Searching how much of each layer can go, on digits: a search beside the same sparsity everywhere.

    pip install compress-torch[demo]
    python examples/search_digits.py
    python examples/search_digits.py --search netadapt --flops 0.3 --folder runs/netadapt

All layers of this network are needed alike, so that the search finds no better than the same
sparsity everywhere. The first command prints, in ten seconds on one core::

      trial       performance   weights masked   parameters M   MFLOPs
     ──────────────────────────────────────────────────────────────────
      dense                 1
      5 (taken)        0.6167            25.4%          0.005   179.90
      7                0.6167            25.4%          0.005   179.90
      …
    SimulatedAnnealingPruner: 21 trials
                 accuracy     parameters      mult-adds   size MB   latency ms (p10–p90)
     ────────────────────────────────────────────────────────────────────────────────────
      dense        99.17%        10.14 k         0.60 M     0.041       0.09 (0.09–0.10)
      searched     98.33%   5.11 k (50%)   0.30 M (50%)     0.021       0.08 (0.08–0.11)
      uniform      98.89%   5.19 k (51%)   0.30 M (50%)     0.021       0.08 (0.08–0.10)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import copy

import torch
from _digits import DigitNet, Digits
from _train import comparison, parser
from torch import nn

from compress import GlobalPruner, ModelSpeedup, NetAdaptPruner, SimulatedAnnealingPruner
from compress.search import SearchPruner

CONVOLUTIONS = [{"op_types": ["Conv2d"]}]
EVALUATED = 300  # training images, for the search; the test images are for the table


def main() -> None:
    options = parser(__doc__, epochs=8)
    options.add_argument("--search", choices=["annealing", "netadapt"], default="annealing")
    options.add_argument("--flops", type=float, default=0.5, help="the fraction that goes")
    options.add_argument("--folder", help="for the journal, to stop and go on")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, model = Digits(args.quick, args.device), DigitNet().to(args.device)
    data.fit(model, args.epochs)

    pruner = search(args.search, model, data, args.flops, args.folder)
    dense = copy.deepcopy(model)
    model, masks = pruner.compress()
    print(pruner.result)
    small = ModelSpeedup(model, data.sample, masks).speedup_model()
    data.fit(small, args.epochs)

    uniform = copy.deepcopy(dense)
    GlobalPruner(
        uniform, CONVOLUTIONS, cost="flops", target=1 - args.flops, strategy="local",
        base_algo="l1", dummy_input=data.sample,
    ).prune()  # fmt: skip
    data.fit(uniform, args.epochs)

    models = {"dense": dense, "searched": small, "uniform": uniform}
    print(comparison(models, data.sample, data.accuracy))


def search(
    name: str, model: nn.Module, data: Digits, flops: float, folder: str | None
) -> SearchPruner:
    """A search for where so many FLOPs can go."""
    images, labels = (
        part[-EVALUATED:].to(data.sample.device) for part in (data.images, data.labels)
    )

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(images).argmax(1) == labels).float().mean())

    config_list = [{**CONVOLUTIONS[0], "sparsity": flops}]
    if name == "annealing":
        return SimulatedAnnealingPruner(
            model, config_list, evaluate, cost="flops", experiment_data_dir=folder
        )
    return NetAdaptPruner(
        model,
        config_list,
        short_term_fine_tuner=lambda candidate: data.evaluator.train(candidate, 1, progress=False),
        evaluator=evaluate,
        cost="flops",
        sparsity_per_iteration=0.1,
        experiment_data_dir=folder,
    )


if __name__ == "__main__":
    main()
