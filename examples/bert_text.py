"""Prune a BERT that tells the topic of a text: heads of attention and hidden units go.

    pip install compress-torch[transformers]
    python examples/bert_text.py

The text is the docstrings of Python's standard library, in six topics (network, numbers, processes,
python, files, markup); the commonest of them is 21 % of the test. The BERT is a small one made of
its config and trained from nothing. It prints, in a minute on one core (which other work shared, as
the 90th percentiles tell)::

    301,894 -> 219,270 parameters (72.6% left), largest difference to the masked model 1.3e-08
                   accuracy     parameters      mult-adds   size MB   latency ms (p10–p90)
     ──────────────────────────────────────────────────────────────────────────────────────
      dense          77.73%         0.30 M         0.30 M      1.21      1.50 (0.89–13.89)
      masked         75.45%         0.30 M         0.30 M      1.21     14.57 (2.20–19.07)
      small          75.45%   0.22 M (73%)   0.22 M (73%)      0.88      1.08 (0.67–13.80)
      fine-tuned     77.95%   0.22 M (73%)   0.22 M (73%)      0.88      1.29 (0.68–14.09)
    latency: median of 50 passes, batch 1, cpu, 1 thread
"""

from __future__ import annotations

import copy

import torch
from _text import LENGTH, PADDING, TOPICS, WORDS, docstrings
from _train import QUICK, comparison, parser, train_with
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from compress import Evaluator, ModelSpeedup, TaylorFOWeightFilterPruner


def main() -> None:
    args = parser(__doc__, epochs=10, fine_tuning=4).parse_args()
    torch.manual_seed(args.seed)
    data = docstrings(QUICK if args.quick else None)
    train = DataLoader(data.train, batch_size=32, shuffle=True, collate_fn=as_inputs)
    # Its batches are dicts with labels, for which BERT returns the loss.
    evaluator = Evaluator(train, optimizer_factory=adam)
    example = as_inputs([data.test[0]])
    example = {name: each.to(args.device) for name, each in example.items() if name != "labels"}

    model = bert().to(args.device)
    train_with(evaluator, model, args.epochs)
    models = {"dense": copy.deepcopy(model)}

    pruner = TaylorFOWeightFilterPruner(
        model,
        [
            {"sparsity": 0.5, "op_types": ["Linear"], "op_partial_names": ["encoder"]},
            {"exclude": True, "op_names_re": [r"output\.dense"]},  # the width of the whole model
        ],
        evaluator,
        mode="dependency_aware",
        dummy_input=example,
        heads="auto",
    )
    model, masks = pruner.compress()
    models["masked"] = copy.deepcopy(model)
    speedup = ModelSpeedup(model, example, masks)
    model = speedup.speedup_model()
    print(speedup.report.summary())
    models["small"] = copy.deepcopy(model)

    train_with(evaluator, model, args.fine_tuning_epochs)
    models["fine-tuned"] = model
    print(comparison(models, example, lambda each: accuracy(each, data.test)))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
        num_labels=len(TOPICS),
        hidden_dropout_prob=0.2,
        pad_token_id=PADDING,
    )
    return BertForSequenceClassification(config)


def as_inputs(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    words = torch.stack([each for each, _ in examples])
    labels = torch.stack([label for _, label in examples])
    return {"input_ids": words, "attention_mask": (words != PADDING).long(), "labels": labels}


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    inputs = as_inputs(list(test))
    labels = inputs.pop("labels")
    device = next(model.parameters()).device
    model.eval()
    logits = model(**{name: each.to(device) for name, each in inputs.items()}).logits
    return float((logits.argmax(1).cpu() == labels).float().mean())


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)


if __name__ == "__main__":
    main()
