"""Prune a BERT with the Trainer that trains it: heads of attention and hidden units go.

    pip install compress-torch[transformers]
    python examples/transformers_trainer.py

The Trainer's model, data, collator and loss are those that the pruner measures with. Model and text
are those of `bert_text.py`: docstrings of Python's standard library, in six topics. It prints, in a
minute on one core::

    dense          301,894 parameters    78.18% right
    masked         301,894 parameters    75.45% right
    small          219,270 parameters    75.45% right
    fine-tuned     219,270 parameters    78.18% right
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from _text import docstrings
from _train import QUICK, parser
from bert_text import accuracy, as_inputs, bert
from torch.utils.data import TensorDataset
from transformers import PrinterCallback, Trainer, TrainingArguments, logging, set_seed

from compress import ModelSpeedup, TaylorFOWeightFilterPruner
from compress.adapters import TransformersEvaluator


def main() -> None:
    args = parser(__doc__, epochs=10, fine_tuning=4).parse_args()
    set_seed(args.seed)
    data = docstrings(QUICK if args.quick else None)
    model = bert().to(args.device)
    example = as_inputs([data.test[0]])
    example = {name: each.to(args.device) for name, each in example.items() if name != "labels"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, data.train, args, args.epochs, folder)
        trainer.train()
        report("dense", model, data.test)

        pruner = TaylorFOWeightFilterPruner(
            model,
            [
                {"sparsity": 0.5, "op_types": ["Linear"], "op_partial_names": ["encoder"]},
                {"exclude": True, "op_names_re": [r"output\.dense"]},  # the width of the model
            ],
            TransformersEvaluator(trainer),
            mode="dependency_aware",
            dummy_input=example,
            heads="auto",
        )
        model, masks = pruner.compress()
        report("masked", model, data.test)

        model = ModelSpeedup(model, example, masks).speedup_model()
        report("small", model, data.test)

        trainer_of(model, data.train, args, args.fine_tuning_epochs, folder).train()
        report("fine-tuned", model, data.test)


def trainer_of(
    model: torch.nn.Module,
    data: TensorDataset,
    args: argparse.Namespace,
    epochs: int,
    folder: str,
) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        weight_decay=0.05,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=as_inputs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def report(name: str, model: torch.nn.Module, test: TensorDataset) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name:12}{parameters:>10,} parameters{accuracy(model, test):>10.2%} right", flush=True)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
