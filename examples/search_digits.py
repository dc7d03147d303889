"""Searching how much of each layer can go, on digits: a search beside the same sparsity everywhere.

    python examples/search_digits.py
    python examples/search_digits.py --search netadapt --flops 0.3 --folder runs/netadapt

Prints (python examples/search_digits.py):

@@OUTPUT@@
"""

from __future__ import annotations

import copy

import torch
from _digits import DigitNet, Digits, parser
from torch import nn

from compress import (
    GlobalPruner,
    ModelSpeedup,
    NetAdaptPruner,
    SimulatedAnnealingPruner,
)
from compress.measure import compare, table
from compress.search import SearchPruner

CONVOLUTIONS = [{"op_types": ["Conv2d"]}]
HELD_OUT = 300  # training images that the search evaluates with; the test images are for the table


def main() -> None:
    options = parser(__doc__, epochs=8)
    options.add_argument("--search", choices=["annealing", "netadapt"], default="annealing")
    options.add_argument("--flops", type=float, default=0.5, help="the fraction that goes")
    options.add_argument("--folder", help="for the journal, to stop and go on")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, model = Digits(args.quick), DigitNet()
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
    accuracies = {name: f"{data.accuracy(each):.2%}" for name, each in models.items()}
    print(table(compare(models, data.sample), {"accuracy": accuracies}))


def search(
    name: str, model: nn.Module, data: Digits, flops: float, folder: str | None
) -> SearchPruner:
    """A search for where so many FLOPs can go."""
    images, labels = (tensor[-HELD_OUT:] for tensor in data.evaluator.train_loader.dataset.tensors)  # type: ignore[union-attr]

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
