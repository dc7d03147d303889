"""Prune a Llama: groups of keys and values with their query heads, and hidden units of the MLPs.

    pip install compress-torch[transformers]
    python examples/llama_text.py
    python examples/llama_text.py --sparsity 0.25 --folder small-llama

It is a small Llama with grouped-query attention, made of its config and trained from nothing to
write the reference of the Python language letter by letter; the last tenth is the test. The pruned
one is saved as transformers saves models, and loaded. It prints, in a minute on a busy core::

                   perplexity   read/s   written/s      parameters   …   latency ms (p10–p90)
     ──────────────────────────────────────────────────────────────────────────────────────────
      dense              7.17   21,981         481          0.16 M   …       5.82 (2.04–6.98)
      small             22.84   63,801         641   87.23 k (54%)   …       2.01 (1.32–6.07)
      fine-tuned         6.86   65,987         844   87.23 k (54%)   …       1.94 (1.36–6.27)
    num_attention_heads: 8 -> 4
    num_key_value_heads: 4 -> 2
    loaded: perplexity 6.86; it writes: …
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping

import torch
from _text import letters
from _train import parser, train_with
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, logging

from compress import Evaluator, ModelSpeedup, TaylorFOWeightFilterPruner
from compress.checkpoint import update_config
from compress.measure import Table, compare, latencies, table

WRITTEN = 64  # letters, to measure how fast a model writes


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    text = letters()
    pieces = text.train[:64] if args.quick else text.train
    train = DataLoader(pieces, batch_size=16, shuffle=True, collate_fn=as_inputs)
    evaluator = Evaluator(
        train, optimizer_factory=adam
    )  # a dict has labels: Llama returns the loss
    test = text.test[:64].to(args.device)
    example = {"input_ids": test[:1]}

    model = llama(len(text.alphabet), text.train.shape[1]).to(args.device)
    train_with(evaluator, model, args.epochs)
    models = {"dense": copy.deepcopy(model)}

    pruner = TaylorFOWeightFilterPruner(
        model,
        [{"sparsity": args.sparsity, "op_names_re": ["[qkv]_proj$", "gate_proj$", "up_proj$"]}],
        evaluator,
        training_batches=20,
        mode="dependency_aware",
        dummy_input=example,
        heads="auto",
    )
    model, masks = pruner.compress()
    models["masked"] = copy.deepcopy(model)
    model = ModelSpeedup(model, example, masks).speedup_model()
    models["small"] = copy.deepcopy(model)

    train_with(evaluator, model, args.fine_tuning_epochs)
    models["fine-tuned"] = model
    print(numbers(models, example, test))

    with tempfile.TemporaryDirectory() as folder:
        folder = args.folder or folder
        for name, (before, after) in update_config(model, example).items():
            print(f"{name}: {before} -> {after}")
        model.save_pretrained(folder)
        loaded = LlamaForCausalLM.from_pretrained(folder).to(args.device).eval()
    print(f"loaded: perplexity {perplexity(loaded, test):.2f}; it writes:")
    written = loaded.generate(test[:1, :32], max_new_tokens=96, do_sample=True, temperature=0.7)
    print("".join(text.alphabet[number] for number in written[0]))


def llama(letters: int, length: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=letters, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
        max_position_embeddings=2 * length, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def as_inputs(pieces: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(pieces), "labels": torch.stack(pieces)}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.05)


@torch.no_grad()
def perplexity(model: nn.Module, test: Tensor) -> float:
    """Of a letter: how many letters the model hesitates between."""
    return float(model.eval()(input_ids=test, labels=test).loss.exp())


class Writer(nn.Module):
    """A model that writes `WRITTEN` letters, with its cache, when it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.generate(
            input_ids, min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, do_sample=False
        )


def numbers(models: Mapping[str, nn.Module], example: dict[str, Tensor], test: Tensor) -> Table:
    torch.set_num_threads(1)
    measured = compare(models, example)
    writing = latencies({n: Writer(m) for n, m in models.items()}, example, warmup=1, repeats=5)
    length = example["input_ids"].shape[1]

    def speed(letters: int, milliseconds: float) -> str:
        return f"{letters / milliseconds * 1e3:,.0f}"

    columns = {
        "perplexity": {n: f"{perplexity(m, test):.2f}" for n, m in models.items()},
        "read/s": {n: speed(length, each.latency.median_ms) for n, each in measured.items()},
        "written/s": {n: speed(WRITTEN, each.median_ms) for n, each in writing.items()},
    }
    return table(measured, columns)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, epochs=2, fine_tuning=1)
    options.add_argument("--sparsity", type=float, default=0.5, help="of heads and hidden units")
    options.add_argument("--folder", help="where to save; a folder for now, by default")
    return options.parse_args()


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
