"""Half of the time: prune a network until its measured latency is met, on this device.

    pip install compress-torch[demo]
    python examples/latency_target.py
    python examples/latency_target.py --target 0.3 --batch 32
    python examples/latency_target.py --cost flops

`GlobalPruner` takes what is worth least for the time that it saves, over all layers, and really
cuts and times the network until the target is met within 5 %. Channel counts are those at which
the measured time of a layer drops. The first command prints, in a minute on one core::

      layer                   units   kept
     ────────────────────────────────────────────
      conv1                      64     48   75%
      layer1.0.conv1             64     32   50%
      …
      layer3.0.conv1            256     64   25%
      layer3.0.conv2            256    224   88%
      layer3.0.downsample.0     256    224   88%
    target: 50.0% of the dense model's latency; reached: 2.42 ms of 4.92 ms (49.1%), predicted
    2.45 ms (+1.5%), 2 cuts measured
                   accuracy     parameters       mult-adds   size MB   latency ms (p10–p90)
     ───────────────────────────────────────────────────────────────────────────────────────
      dense          98.33%         1.23 M        193.61 M      4.92       3.71 (3.49–9.55)
      small          18.06%   0.34 M (27%)   63.28 M (33%)      1.35       2.12 (1.71–7.30)
      fine-tuned     98.33%   0.34 M (27%)   63.28 M (33%)      1.35       2.35 (1.70–6.73)
    latency: median of 50 passes, batch 16, cpu, 1 thread
"""

from __future__ import annotations

import argparse
import copy

import torch
from _data import digits
from _train import accuracy, comparison, fit, loaders, parser, resnet8

from compress import Evaluator, GlobalPruner, ModelSpeedup


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # what is timed is what the table shows
    train, test = loaders(digits(size=8), args.quick)
    example = torch.zeros(args.batch, 1, 8, 8, device=args.device)

    model = fit("dense", resnet8().to(args.device), train, test, args.epochs)
    models = {"dense": copy.deepcopy(model)}

    pruner = GlobalPruner(
        model,
        [{"op_types": ["Conv2d"]}],
        cost=args.cost,
        target=args.target,
        dummy_input=example,
        evaluator=Evaluator(train, torch.nn.functional.cross_entropy),
        base_algo="taylorfo",
    )
    model, masks = pruner.compress()
    print(pruner.report)
    model = ModelSpeedup(model, example, masks).speedup_model()
    models["small"] = copy.deepcopy(model)

    models["fine-tuned"] = fit("fine-tuned", model, train, test, args.fine_tuning_epochs, lr=0.02)
    print(comparison(models, example, lambda each: accuracy(each, test)))


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=5, fine_tuning=3)
    costs = ["latency", "flops", "params", "memory"]
    options.add_argument("--cost", choices=costs, default="latency")
    options.add_argument("--target", type=float, default=0.5, help="of the dense network's cost")
    options.add_argument("--batch", type=int, default=16, help="images at a time, when it is timed")
    return options.parse_args()


if __name__ == "__main__":
    main()
