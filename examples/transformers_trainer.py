"""Prune a BERT with the Trainer that trains it: heads of attention and hidden units go.

    pip install compress-torch[transformers]
    python examples/transformers_trainer.py

Nothing is downloaded: the BERT is a tiny one made of its config, and the sentences are made up.
Their class is the kind of word that comes up most, so that words have to be compared. It prints, in
half a minute on one core::

    dense          109,444 parameters    96.20% right
    masked         109,444 parameters    83.60% right
    small           59,844 parameters    83.60% right
    fine-tuned      59,844 parameters    96.00% right
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from compress import ModelSpeedup, TaylorFOWeightFilterPruner
from compress.adapters import TransformersEvaluator

KINDS, WORDS, LENGTH = 4, 60, 15


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            num_labels=KINDS,
        )
    )
    test, example = sentences(500, seed=1), {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, args, args.epochs, folder)
        trainer.train()
        report("dense", model, test)

        evaluator = TransformersEvaluator(trainer)  # the Trainer's model, data, collator and loss
        pruner = TaylorFOWeightFilterPruner(
            model,
            [
                {"sparsity": 0.5, "op_types": ["Linear"], "op_partial_names": ["encoder"]},
                {"exclude": True, "op_names_re": ["output.dense"]},  # the width of the whole model
            ],
            evaluator,
            mode="dependency_aware",
            dummy_input=example,
            heads="auto",
        )
        model, masks = pruner.compress()
        report("masked", model, test)

        model = ModelSpeedup(model, example, masks).speedup_model()
        report("small", model, test)

        trainer = trainer_of(model, args, args.fine_tuning_epochs, folder)
        trainer.train()
        report("fine-tuned", model, test)


def trainer_of(
    model: torch.nn.Module, args: argparse.Namespace, epochs: int, folder: str
) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=args.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=sentences(args.sentences, seed=0))
    trainer.remove_callback(PrinterCallback)
    return trainer


def sentences(count: int, seed: int) -> list[dict]:
    """Random words; the label is the kind (a quarter of the words each) that is most frequent."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    kinds = torch.nn.functional.one_hot(words % KINDS, KINDS).sum(1).argmax(1)
    return [{"input_ids": row, "labels": int(kind)} for row, kind in zip(words, kinds, strict=True)]


@torch.no_grad()
def report(name: str, model: torch.nn.Module, test: list[dict]) -> None:
    model.eval()
    logits = model(input_ids=torch.stack([each["input_ids"] for each in test])).logits
    labels = torch.tensor([each["labels"] for each in test])
    right = (logits.argmax(1) == labels).float().mean().item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name:12}{parameters:>10,} parameters{right:>10.2%} right", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="before pruning")
    parser.add_argument("--fine-tuning-epochs", type=int, default=2)
    parser.add_argument("--sentences", type=int, default=4000, help="to train with")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
